"""From a message to a worker: make it durable, keep the order of each domain, run domains side by side.

`Dispatcher.receive` is called by the consumer and returns when the message may be acknowledged. Workers (a
fixed number for each lane, see `agent.api.Plugin`) run instructions; two with the same domain key never run at once and
run in the order they came.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from agent import dialects, oslo, wire
from agent.context import Interrupted
from agent.errors import JournalCorrupt, JournalError, MessageError
from agent.executor import Executor
from agent.heartbeats import Heartbeats
from agent.journal import Accepted, Journal, Phase, Refused
from agent.loader import Verb
from agent.locks import Job, Queues
from agent.signing import Signer

LOG = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
QUICK_WORKERS = 4


class Dispatcher:
    """:param max_pending: instructions accepted and not finished; beyond it the consumer holds messages back.

    :param on_change: called in a worker after each instruction (a reply may be in the outbox).
    :param on_fatal: called when the journal is damaged: the agent must end.
    :param oslo_service: what methods are there for senders of oslo.messaging's form.
    :param heartbeats: is told which callers want to hear from their calls.
    :ivar interrupted: something that ran was stopped before its end.
    :param signer: only messages that it has signed are taken.
    :param count: is told what became of each message, and of a refused one the error's code.
    """

    def __init__(
        self,
        host: str,
        journal: Journal,
        verbs: Mapping[str, Verb],
        executor: Executor,
        stopping: threading.Event,
        *,
        workers: int = 8,
        max_pending: int = 1000,
        max_message_bytes: int = wire.MAX_BYTES,
        on_change: Callable[[], None] = lambda: None,
        on_fatal: Callable[[Exception], None] = lambda exc: None,
        oslo_service: oslo.Service = oslo.SERVICE,
        heartbeats: Heartbeats | None = None,
        count: Callable[[str, str], None] = lambda outcome, code: None,
        signer: Signer | None = None,
    ) -> None:
        self._signer = signer
        self._count = count
        self._host = host
        self._journal = journal
        self._verbs = verbs
        self._executor = executor
        self._stopping = stopping
        self.max_pending = max_pending
        self._max_message_bytes = max_message_bytes
        self._on_change = on_change
        self._on_fatal = on_fatal
        self._oslo_service = oslo_service
        self._heartbeats = heartbeats or Heartbeats()
        counts = {"work": max(1, workers), "quick": QUICK_WORKERS, "drain": 1}
        self.queues = Queues(counts)
        self.interrupted = False
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"{lane}-{n}", daemon=True)
            for lane, count in counts.items()
            for n in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def drain(self, timeout: float) -> bool:
        """Begin nothing more and wait for what runs; False when some of it still does after `timeout` seconds.

        What waits stays in the journal for the next start. Set `stopping` and drain again to make waiting steps
        give way.
        """
        self.queues.drain()
        end = time.monotonic() + timeout
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        try:
            self._journal.settle()
        except JournalError as exc:
            LOG.error("outcomes are not stored yet and will be at the next start: %s", exc)
        return True

    def room(self) -> int:
        """How many messages more may be taken in."""
        return max(0, self.max_pending - self.queues.pending)

    def alive(self) -> bool:
        """Whether every worker runs."""
        return all(thread.is_alive() for thread in self._threads)

    def has_room(self) -> bool:
        return self.room() > 0

    @property
    def pending(self) -> int:
        return self.queues.pending

    def recover(self) -> int:
        """Queue what an earlier life of the agent left unfinished; how many."""
        for waiter in self._journal.listeners():
            self._heartbeats.watch(waiter.id, waiter.reply_to, waiter.correlation, waiter.heartbeat)
        idents = self._journal.unfinished()
        for ident in idents:
            entry = self._journal.entry(ident)
            if entry is not None:
                job = self._job(entry.instruction)
                self.queues.submit(job if job.key else job._replace(key=entry.domain))
        return len(idents)

    def receive(self, *raws: wire.Raw) -> None:
        """Take in messages. When this returns they are durable or quarantined, and may be acknowledged.

        :raises JournalError: they could not be stored; do not acknowledge any.
        """
        taken = [(raw, self._decode(raw)) for raw in raws]
        items = [item for _, item in taken if item is not None]
        outcomes = iter(self._journal.take_in(items))
        reused = []
        answered = False
        for raw, item in taken:
            outcome = None if item is None else next(outcomes)
            answered = answered or outcome is not Accepted.NEW
            if not isinstance(item, wire.Instruction):
                self._count("refused" if isinstance(item, Refused) else "ping", _code(item))
                continue
            self._count((outcome or Accepted.NEW).value, "")
            if outcome is Accepted.REUSED:
                reused.append(self._refused(raw, _reused(item)))
                continue
            if outcome is not None:
                self._taken(item, outcome)
        if reused:
            self._journal.take_in(reused)
        if answered:
            self._on_change()

    def cancel_queued(self, ident: str) -> bool:
        """End an instruction that no worker has yet and that is marked as cancelled; False: it is not queued.

        :raises JournalError: its outcome cannot be stored now; it is queued again.
        """
        job = self.queues.remove(ident)
        if job is None:
            return False
        try:
            entry = self._journal.entry(ident)
            if entry is not None and entry.phase is not Phase.ACCEPTED:
                self.queues.put_back(job)  # it was begun by an earlier life of the agent: a worker takes it back
                return False
            self._executor.run(ident)
        except BaseException:
            self.queues.put_back(job)
            raise
        self._ended(job)
        return True

    def cancel_running(self, ident: str) -> None:
        """Tell whoever carries out an instruction that it is to give way."""
        self._executor.cancel(ident)

    def again(self, seq: int, raw: wire.Raw, came: float) -> tuple[str, str]:
        """Take in a message of the quarantine, in one transaction with taking it out of there.

        :param came: when, seconds since the epoch: what it says of its age counts from then.
        :returns: what became of it, and the id of the instruction.
        :raises MessageError: it is still refused, and stays. :raises KeyError: it is not there any more.
        """
        try:
            item = self._checked(raw, came)
            outcome = self._journal.release(seq, item)
            if outcome is Accepted.REUSED and isinstance(item, wire.Instruction):
                raise _reused(item)
        except MessageError as exc:
            self._journal.refused.refused_again(seq, exc)
            raise
        self._count("ping" if outcome is None else outcome.value, "")
        if isinstance(item, wire.Instruction) and outcome is not None:
            self._taken(item, outcome)
        self._on_change()
        return ("answered" if outcome is None else outcome.value), getattr(item, "id", "")

    def _taken(self, item: wire.Instruction, outcome: Accepted) -> None:
        # Known before the instruction can end.
        if item.heartbeat and outcome is not Accepted.REPLAYED:
            self._heartbeats.watch(item.id, item.reply_to, item.correlation, item.heartbeat)
        if outcome is Accepted.NEW:
            self.queues.submit(self._job(item))
        else:
            LOG.info("instruction %s came again: %s", item.id, outcome.value)

    def _decode(self, raw: wire.Raw) -> wire.Instruction | wire.Outgoing | Refused | None:
        try:
            return self._checked(raw, time.time())
        except MessageError as exc:
            return self._refused(raw, exc)

    def _checked(self, raw: wire.Raw, now: float) -> wire.Instruction | wire.Outgoing | None:
        """:raises MessageError: with the code that names what is wrong."""
        if self._signer is not None and raw.size == len(raw.body):  # what was cut is refused for its size
            self._signer.check(raw, now)
        return dialects.decode(raw, self._host, self._max_message_bytes, self._oslo_service, now)

    def _refused(self, raw: wire.Raw, why: MessageError) -> Refused:
        LOG.warning("message refused (%s): %s", why.code, why.message)
        return Refused(raw, why, dialects.encode_refusal(raw, why, self._host, self._max_message_bytes))

    def _job(self, instruction: wire.Instruction) -> Job:
        verb = self._verbs.get(instruction.verb)
        if verb is None:
            return Job(instruction.id, "", "work")
        try:
            key = verb.plugin.domain_of(instruction.args)
        except (Exception, SystemExit):
            LOG.debug("%s gives no domain for its arguments", instruction.verb, exc_info=True)
            key = ""
        return Job(instruction.id, key, verb.plugin.lane)

    def _work(self, lane: str) -> None:
        while (job := self.queues.take(lane)) is not None:
            try:
                deferred = self._run(job)
            except Interrupted:
                self.interrupted = True
                return
            if not deferred:
                self._ended(job)

    def _ended(self, job: Job) -> None:
        self._heartbeats.forget(job.ident)
        self.queues.done(job)
        self._on_change()

    def _run(self, job: Job) -> bool:
        """Whether `_stored` is told of the end. :raises Interrupted: the agent is being stopped."""
        while True:
            try:
                return self._executor.run(job.ident, lambda exc: self._stored(job, exc))
            except JournalCorrupt as exc:
                self._on_fatal(exc)
                raise Interrupted from exc
            except JournalError as exc:
                LOG.error("instruction %s waits: %s", job.ident, exc)
            except Interrupted:
                raise
            except Exception:
                # Ours, not the plugin's. It stays in the journal; the next start tries it again.
                LOG.exception("instruction %s is left unfinished by a mistake in the agent", job.ident)
                return False
            if self._stopping.wait(RETRY_SECONDS):
                raise Interrupted

    def _stored(self, job: Job, exc: Exception | None) -> None:
        """The outcome is durable, or the journal could not take it."""
        if exc is None:
            self._ended(job)
        elif isinstance(exc, JournalCorrupt):
            self._on_fatal(exc)
        else:
            LOG.error("instruction %s waits: %s", job.ident, exc)
            again = threading.Timer(RETRY_SECONDS, self.queues.again, (job,))
            again.daemon = True
            again.start()


def _code(item: object) -> str:
    return item.why.code if isinstance(item, Refused) else ""


def _reused(instruction: wire.Instruction) -> MessageError:
    text = f"the id {instruction.id} belongs to another instruction: give each its own"
    return MessageError(text, code="instruction.id_reused")
