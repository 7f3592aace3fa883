"""One instruction from the journal to its outcome: plan, run the steps, undo on failure, resume after a crash.

Everything that happens is in the journal before and after, so this code may be killed at any line: the next
start calls `Executor.run` with the same id and it goes on from what the journal and the world show.
"""

from __future__ import annotations

import contextvars
import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent import clock, trace
from agent.api import Check, Host, Plan, Step, TooLate
from agent.context import Interrupted, StepContext, current_domain, log_fields, never
from agent.errors import InstructionError, JournalError
from agent.faults import boundary
from agent.journal import Entry, Journal, Phase, StepState
from agent.loader import Verb
from agent.notices import Notices
from agent.patience import patiently
from agent.plain import json_object, one_line
from agent.wire import Reply
from agent.work import Work, failure, remains, request_id

LOG = logging.getLogger(__name__)

_FAULTS = (Exception, SystemExit)
"""What a plugin may do wrong, ``sys.exit()`` included."""
OUTCOME_UNKNOWN = "instruction.outcome_unknown"


class Executor:
    """:param stopping: set when the agent ends; waiting steps give way.

    :param unknown_seconds: how long a step whose outcome cannot be seen is asked again.
    :param progress: takes what a step tells of its progress, with the instruction's id and domain.
    :param ended: is told of each outcome when it is durable; `notices` tell of it by the outbox.
    :param keep_seconds: how long an outcome is kept; `keep_read_seconds` that of a verb that only reads.
    """

    def __init__(
        self,
        journal: Journal,
        verbs: Mapping[str, Verb],
        host: Host,
        stopping: threading.Event,
        *,
        unknown_seconds: float = 300.0,
        keep_seconds: float = 604800.0,
        keep_read_seconds: float = 600.0,
        now: Callable[[], float] = time.time,
        progress: Callable[[dict[str, Any]], None] = lambda data: None,
        ended: Callable[[Reply], None] = lambda reply: None,
        notices: Notices | None = None,
    ) -> None:
        self._notices = notices or Notices(host.name, now, native=False)
        self._ended = ended
        self._progress = progress
        self._journal = journal
        self._verbs = verbs
        self._host = host
        self._stopping = stopping
        self.unknown_seconds = unknown_seconds
        self.keep_seconds = keep_seconds
        self.keep_read_seconds = keep_read_seconds
        self._now = now
        self._stored: dict[str, Callable[[Exception | None], None]] = {}
        self._cancelled: set[str] = set()

    def run(self, ident: str, stored: Callable[[Exception | None], None] | None = None) -> bool:
        """Carry the instruction to its end. Returns quietly when it is finished already.

        :param stored: do not wait until the outcome is durable; this is called then, in some thread, or with the
            journal's error.
        :returns: whether `stored` is or was called. False: there is nothing to wait for.
        :raises Interrupted: the agent is being stopped; it resumes later.
        :raises JournalError: the journal cannot be written; call again.
        """
        entry = self._journal.entry(ident)
        if entry is None or entry.phase in (Phase.DONE, Phase.FAILED):
            return False
        if stored is None:
            self._run(entry)
            return False
        self._stored[ident] = stored
        try:
            self._run(entry)
        finally:
            left = self._stored.pop(ident, None)
        return left is None

    def cancel(self, ident: str) -> None:
        """Have an instruction that runs give way at its next step, or where it waits; the journal has it noted."""
        self._cancelled.add(ident)

    def _run(self, entry: Entry) -> None:
        ident = entry.instruction.id
        with log_fields(ident, entry.domain, request_id(entry), trace.of(entry.instruction.context)):
            verb = self._verbs.get(entry.instruction.verb)
            if verb is None:
                self._without_plugin(entry)
            elif entry.phase is Phase.ACCEPTED:
                self._start(entry, verb)
            else:
                self._resume(entry, verb)

    def _without_plugin(self, entry: Entry) -> None:
        name = entry.instruction.verb
        if entry.phase is not Phase.ACCEPTED:
            LOG.error("%s is half done and its plugin is missing: install it and restart the agent", name)
            return
        known = ", ".join(sorted(self._verbs))
        self._fail(
            entry, InstructionError("instruction.unknown_verb", f"there is no verb {name!r}: give one of {known}")
        )

    def _start(self, entry: Entry, verb: Verb) -> None:
        instruction = entry.instruction
        if instruction.context:
            LOG.info("%s begins, asked for by %s", instruction.verb, json.dumps(instruction.context, sort_keys=True))
        else:
            LOG.info("%s begins", instruction.verb)
        try:
            if instruction.deadline is not None and self._now() >= instruction.deadline:
                raise InstructionError(
                    "instruction.expired",
                    f"the deadline passed {self._now() - instruction.deadline:.1f} s before it could begin: "
                    "send it again with a later one",
                    retryable=True,
                )
            if entry.cancelled is not None:
                raise InstructionError("instruction.cancelled", "it was cancelled before it began")
            verb.check(instruction.args)
            plan = verb.plugin.plan(instruction.args, self._host)
            data = json_object(plan.to_json())
        except JournalError:
            raise
        except _FAULTS as exc:
            self._fail(entry, exc)
            return
        if plan.steps and not verb.plugin.read_only:  # without steps there is nothing to resume
            notices = self._notices.begins(instruction, plan.domain)
            self._journal.planned(instruction.id, data, plan.domain, notices)
        boundary(f"{instruction.verb}:planned")
        with log_fields(instruction.id, plan.domain):
            self._forward(self._work(entry, verb, plan), 0)

    def _resume(self, entry: Entry, verb: Verb) -> None:
        """Go on after a crash or a stop."""
        LOG.info("%s resumes (%s)", entry.instruction.verb, entry.phase.value)
        try:
            plan = Plan.from_json(entry.plan or {}, verb.plugin.step_kinds)
        except Exception:
            LOG.exception("%s cannot resume: its journalled plan is not readable by this plugin", verb.plugin.verb)
            return
        work = self._work(entry, verb, plan)
        for record in entry.steps:
            work.states[record.index] = record.state
            work.seconds[record.index] = record.seconds
            if record.output is not None:
                work.ctx.outputs[record.name] = record.output
        if entry.phase is Phase.UNDOING:
            self._take_back(work, dict(entry.error or {}))
            return
        begun = next((i for i, state in enumerate(work.states) if state is StepState.BEGUN), None)
        if begun is not None:
            try:
                verdict = self._look(work, begun)
            except (Interrupted, JournalError):
                raise
            except _FAULTS as exc:
                self._settle_failure(work, begun, exc)
                return
            LOG.info("step %s was interrupted: %s", plan.steps[begun].name, verdict.value)
            if verdict is Check.DONE:
                self._mark(work, begun, StepState.DONE)
        self._forward(work, next((i for i, s in enumerate(work.states) if s is not StepState.DONE), len(plan.steps)))

    def _settle_failure(self, work: Work, index: int, exc: BaseException) -> None:
        error = failure(work.entry, exc, work.plan.steps[index])
        if work.committed:
            self._give_up(work, error, index)
        elif error["code"] == OUTCOME_UNKNOWN:
            # Nobody can say whether it happened: taking it back blindly could destroy what is wanted.
            self._finish(work, error | {"undone": False})
        else:
            self._undo(work, error, index)

    def _give_up(self, work: Work, error: dict[str, Any], index: int) -> None:
        """What cannot be taken back could not be finished either."""
        LOG.error("%s cannot be finished: %s", work.name, error["message"])
        self._mark(work, index, StepState.FAILED)
        self._finish(work, error | {"undone": False})

    def _forward(self, work: Work, first: int) -> None:
        for index in range(first, len(work.plan.steps)):
            step = work.plan.steps[index]
            committed = work.committed
            if committed:
                work.ctx.deadline, work.ctx.cancelled = None, never
            if self._stopping.is_set():
                raise Interrupted  # a boundary between steps is a good place to be stopped at
            try:
                self._check_deadline(work, step)
                work.ctx.check_wanted()
                self._mark(work, index, StepState.BEGUN)
                boundary(f"{work.name}:{step.name}:begun")
                started = time.monotonic()
                run = functools.partial(step.run, work.ctx)
                output = json_object((patiently(work.ctx, self.unknown_seconds, run) if committed else run()) or {})
                seconds = time.monotonic() - started
                boundary(f"{work.name}:{step.name}:ran")
            except (Interrupted, JournalError):
                raise
            except _FAULTS as exc:
                error = failure(work.entry, exc, step)
                if committed:
                    self._give_up(work, error, index)
                else:
                    self._undo(work, error, index if work.states[index] is StepState.BEGUN else None)
                return
            work.ctx.outputs[step.name] = output
            self._mark(work, index, StepState.DONE, output, seconds)
            boundary(f"{work.name}:{step.name}:done")
        try:
            result = json_object(work.verb.plugin.result(work.entry.instruction.args, work.plan, work.ctx))
        except _FAULTS as exc:
            # Every step is done: that the outcome cannot be described does not make it a failure.
            LOG.warning("%s is done, its result cannot be read: %s", work.name, exc)
            result = {"detail": one_line(f"done; its result could not be read: {exc}")}
        self._finish(work, None, result)

    def _undo(self, work: Work, error: dict[str, Any], failed: int | None) -> None:
        """`error` ends the instruction: write that down, then take back what was done."""
        LOG.info("%s fails: %s", work.name, error["message"])
        if work.journalled:
            self._journal.undoing(work.entry.instruction.id, error, failed)
        if failed is not None:
            work.states[failed] = StepState.FAILED
        self._take_back(work, error)

    def _take_back(self, work: Work, error: dict[str, Any]) -> None:
        """Undo every step that was begun, newest first, then report `error`."""
        work.ctx.cancelled = never
        for index in reversed(range(len(work.plan.steps))):
            step = work.plan.steps[index]
            if work.states[index] in (None, StepState.UNDONE):
                continue
            boundary(f"{work.name}:{step.name}:undoing")
            try:
                patiently(work.ctx, self.unknown_seconds, functools.partial(step.undo, work.ctx))
            except (Interrupted, JournalError):
                raise
            except TooLate as late:
                self._turn(work, index, late.output)
                return
            except _FAULTS as exc:
                why = failure(work.entry, exc, step)
                LOG.error("step %s cannot be undone: %s", step.name, why["message"])
                error = error | {"message": f"{error['message']}; step {step.name} not undone: {why['message']}"}
                continue
            boundary(f"{work.name}:{step.name}:undone")
            self._mark(work, index, StepState.UNDONE)
        left = [step for step, state in zip(work.plan.steps, work.states, strict=True) if remains(step, state)]
        self._finish(work, error | {"undone": not left})

    def _turn(self, work: Work, index: int, output: dict[str, Any]) -> None:
        """While it was taken back it was seen that the point of no return had been passed: forward again."""
        step = work.plan.steps[index]
        LOG.info("%s goes on: step %s cannot be taken back any more", work.name, step.name)
        if work.journalled:
            self._journal.forward(work.entry.instruction.id)
        work.ctx.outputs[step.name] = json_object(output)
        self._mark(work, index, StepState.DONE, work.ctx.outputs[step.name])
        self._forward(work, index + 1)

    def _look(self, work: Work, index: int) -> Check:
        """What became of an interrupted step. :raises InstructionError: nobody can say (outcome_unknown)."""
        step = work.plan.steps[index]
        verdict: Check | None = patiently(work.ctx, self.unknown_seconds, lambda: Check(step.check(work.ctx)))
        if verdict is None:
            raise InstructionError(
                OUTCOME_UNKNOWN,
                f"the agent was interrupted in step {step.name!r} and cannot see whether it happened: look at the "
                "domain before sending anything else for it",
            )
        return verdict

    def _check_deadline(self, work: Work, step: Step) -> None:
        deadline = work.ctx.deadline
        if deadline is not None and clock.elapsed() >= deadline:
            raise InstructionError(
                "instruction.deadline_exceeded",
                f"the deadline passed before step {step.name!r}: send it again with a later one",
                retryable=True,
            )

    def _work(self, entry: Entry, verb: Verb, plan: Plan) -> Work:
        instruction = entry.instruction
        about = {"instruction": instruction.id, "verb": instruction.verb, "uuid": plan.domain}
        ctx = StepContext(
            self._host,
            instruction.id,
            self._stopping,
            None if instruction.deadline is None else clock.elapsed() + instruction.deadline - self._now(),
            tell=lambda data: self._progress(about | data),
            cancelled=lambda: entry.cancelled is not None or instruction.id in self._cancelled,
        )
        count = len(plan.steps)
        return Work(entry, verb, ctx, plan, [None] * count, [0.0] * count)

    def _mark(
        self,
        work: Work,
        index: int,
        state: StepState,
        output: dict[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> None:
        step = work.plan.steps[index]
        if work.journalled:
            self._journal.step(work.entry.instruction.id, index, step.name, state, output, seconds)
        work.states[index] = state
        work.seconds[index] += seconds

    def _finish(self, work: Work, error: dict[str, Any] | None, result: dict[str, Any] | None = None) -> None:
        steps = tuple(
            {"name": step.name, "title": step.title, "state": state.value, "seconds": round(seconds, 6)}
            for step, state, seconds in zip(work.plan.steps, work.states, work.seconds, strict=True)
            if state is not None
        )
        boundary(f"{work.name}:finishing")
        self._store(work.entry, error, result, steps, f"{work.name}:finished")

    def _fail(self, entry: Entry, exc: BaseException) -> None:
        """It failed before anything was begun."""
        error = failure(entry, exc)
        LOG.info("%s refused: %s", entry.instruction.verb, error["message"])
        self._store(entry, error | {"undone": True}, None, ())

    def _store(
        self,
        entry: Entry,
        error: dict[str, Any] | None,
        result: dict[str, Any] | None,
        steps: tuple[dict[str, Any], ...],
        mark: str = "",
    ) -> None:
        """:param mark: boundary to pass when the outcome is durable."""
        instruction = entry.instruction
        reply = Reply(
            id=instruction.id,
            host=instruction.host,
            verb=instruction.verb,
            result=result,
            error=error,
            steps=steps,
            accepted=entry.received,
            finished=self._now(),
            traceparent=instruction.context.get(trace.PARENT, ""),
        )
        verb = self._verbs.get(instruction.verb)
        reads = verb is not None and verb.plugin.read_only
        keep = self.keep_read_seconds if reads else self.keep_seconds
        notices = () if verb is None or reads else self._notices.ends(instruction, current_domain(), reply)

        def told() -> None:
            boundary(mark)
            self._ended(reply)
            LOG.info("%s %s", instruction.verb, "done" if error is None else f"failed ({error['code']})")

        self._cancelled.discard(instruction.id)
        stored = self._stored.pop(instruction.id, None)
        if stored is None:
            self._journal.finish(reply, keep, notices)
            told()
            return
        context = contextvars.copy_context()  # the fields of this instruction's log lines

        def done(exc: Exception | None) -> None:
            if exc is None:
                context.run(told)
            stored(exc)

        self._journal.finish_later(reply, keep, done, notices)
