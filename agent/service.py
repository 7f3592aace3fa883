"""``reeve-agent``: the parts wired together, their threads, signals, start and end.

Start: lock the state folder, open the journal, connect the driver, load the plugins, resume what is unfinished,
then take messages. End (SIGTERM, SIGINT): take no more messages, wait for running instructions, send their
replies, close. Being killed instead is safe: the journal and the broker hold everything.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agent import conf, housekeeping, logs, oslo, reload
from agent.api import Host
from agent.configdrive.drives import Drives
from agent.control import Control
from agent.dispatcher import Dispatcher
from agent.errors import AgentError, ConfigError
from agent.executor import Executor
from agent.folder_lock import lock_folder
from agent.health import Health, gauges
from agent.heartbeats import Heartbeats
from agent.images.remote.fetcher import Fetcher
from agent.journal import Journal
from agent.lifecycle import Lifecycle
from agent.loader import Verb, load_driver, load_verbs
from agent.local_images import LocalImages
from agent.metrics import Metrics
from agent.monitor import Monitor
from agent.notices import Notices, OsloTopics
from agent.notices import queues as notice_queues
from agent.placement.build import make_reconciler
from agent.placement.reconciler import Reconciler
from agent.reports import Reporter
from agent.resources import ResourceClaims
from agent.rpc import connection as broker
from agent.rpc.consumer import Consumer
from agent.rpc.peers import BrokerPeers
from agent.rpc.publisher import Publisher
from agent.rpc.queues import OsloQueues, declare_notifications, native
from agent.usage import DESCRIPTION, EPILOG
from hypervisor import sdnotify
from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import Toolstack

LOG = logging.getLogger(__name__)

SIGNAL_SECONDS = 1.0
"""Longest wait of the main thread: a signal that comes just before a wait does not end it."""
HOUSEKEEPING_SECONDS = 60.0
FLUSH_SECONDS = 5.0
GIVE_WAY_SECONDS = 5.0
EXIT_UNFINISHED = 75
"""EX_TEMPFAIL of sysexits.h: ended as asked, but the time to drain was too short for what ran."""
DRIVER_PAUSE = 5.0
SWITCH_SECONDS = 0.001


class Service:
    """One agent. `start`, then `run` until `stop` is called, then `close`.

    :param toolstack: a connected driver; by default the configured one.
    :param argv: the command line that `reload` reads again, along with the files.
    """

    def __init__(self, settings: conf.Settings, toolstack: Toolstack | None = None, argv: Sequence[str] = ()) -> None:
        self.settings = settings
        self.argv = tuple(argv)
        self._wake = threading.Event()
        self._reload = threading.Event()
        self.stopping = threading.Event()  # waiting steps give way
        self.ended = threading.Event()
        self.fatal: Exception | None = None
        self._toolstack = toolstack
        self._closers: list[Any] = []
        self.placement: Reconciler | None = None

    def start(self) -> None:
        """:raises AgentError, ToolstackError: why it cannot run; everything opened so far is closed."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        settings = self.settings
        broker.connect(settings.broker_url, tls=settings.broker_tls)  # what is not usable is said now, not by a thread
        self.signer = settings.signing.signer()
        if settings.broker_tls.insecure:
            LOG.warning("%s", settings.broker_tls.warning)
        self._closers.append(lock_folder(settings.state_dir / "agent").close)
        self.journal = Journal(settings.journal_path, limits=settings.quarantine)
        self._closers.append(self.journal.close)
        verbs, self.broken_plugins = load_verbs(files=settings.files)
        if settings.allowed_verbs:
            verbs = {name: verb for name, verb in verbs.items() if name in settings.allowed_verbs}
        self.toolstack = self._toolstack or self._driver()
        if self._toolstack is None:
            self._closers.append(self.toolstack.close)
        self.control = Control(self.journal)
        host = self._host(verbs)
        self.drives = Drives(settings.config_drive_dir)
        self.drives.prepare()
        self.sources.prepare()
        self._wire(verbs, host)
        if resumed := self.dispatcher.recover():
            LOG.info("%d unfinished instructions resume", resumed)
        self.publisher.start()
        self.dispatcher.start()
        self.lifecycle.start()
        self.reporter.start()
        for consumer in self.consumers:
            consumer.start()
        if self.placement is not None:
            self.placement.start()
            self._closers.append(self.placement.stop)
        self.monitor.start()
        self._closers.append(self.monitor.stop)
        sdnotify.ready(f"host {settings.host}, driver {self.toolstack.name}")
        LOG.info(
            "agent for host %s: driver %s, broker %s, verbs %s",
            settings.host,
            self.toolstack.name,
            broker.redact(settings.broker_url),
            ", ".join(sorted(verbs)) or "none",
        )

    def _host(self, verbs: Mapping[str, Verb]) -> Host:
        """What plugins see of this node."""
        settings = self.settings
        self.claims = ResourceClaims(
            self.toolstack,
            self.journal,
            vcpu_ratio=settings.vcpu_ratio,
            reserved_mib=settings.reserved_memory_mib,
        )
        self.placement = make_reconciler(settings.placement, self.journal.node_id(), self.claims, self.toolstack)
        self.sources = Fetcher(settings.images)
        return Host(
            name=settings.host,
            owner=f"reeve/{self.journal.node_id()}",
            toolstack=self.toolstack,
            claims=self.claims,
            images=LocalImages(settings.image_dir),
            settings=settings.for_plugins(),
            peers=BrokerPeers(
                settings.broker_url,
                self.stopping,
                self.journal.enqueue,
                poll_seconds=settings.poll_seconds,
                max_message_bytes=settings.max_message_bytes,
                tls=settings.broker_tls,
                signer=self.signer,
                quorum=settings.broker_quorum,
            ),
            sources=self.sources,
            control=self.control,
            options={name: verb.options for name, verb in verbs.items()},
        )

    def _wire(self, verbs: dict[str, Verb], host: Host) -> None:
        """Make the parts that have threads and join them; none is started."""
        settings = self.settings
        heartbeats = Heartbeats(wake=lambda: self.publisher.wake())
        self.metrics = metrics = Metrics(
            verbs, lambda: gauges(self), self.toolstack, importlib.metadata.version("reeve")
        )
        notices, prepare, seq = self._notices()
        self.executor = executor = Executor(
            self.journal,
            verbs,
            host,
            self.stopping,
            unknown_seconds=float(settings.unknown_seconds),
            keep_seconds=float(settings.keep_seconds),
            keep_read_seconds=float(settings.keep_read_seconds),
            progress=lambda data: self.reporter.send("progress", data),
            ended=metrics.ended,
            notices=notices,
        )
        self.dispatcher = Dispatcher(
            settings.host,
            self.journal,
            verbs,
            executor,
            self.stopping,
            workers=settings.workers,
            max_pending=settings.max_pending,
            max_message_bytes=settings.max_message_bytes,
            on_change=self._changed,
            on_fatal=self._fail,
            oslo_service=oslo.Service(
                namespaces=frozenset(settings.oslo.namespaces), call_deadlines=settings.oslo.call_deadlines
            ),
            heartbeats=heartbeats,
            count=metrics.message,
            signer=self.signer,
        )
        self.control.dispatcher = self.dispatcher
        self.publisher = Publisher(
            settings.broker_url,
            self.journal,
            reply_seconds=float(settings.reply_seconds),
            heartbeats=heartbeats,
            prepare=prepare,
            tls=settings.broker_tls,
            signer=self.signer,
            on_fatal=self._fail,
        )
        self.lifecycle = Lifecycle(self.toolstack, self.journal, notices, self.publisher.wake)
        self.consumer = self._consumer()
        self.consumers = [self.consumer]
        if settings.oslo.enabled and not broker.is_filesystem(settings.broker_url):
            # With a connection of its own: what is wrong with these queues does not stop native instructions.
            self.consumers.append(self._consumer(self._oslo_queues()))
        self.reporter = Reporter(
            settings.host,
            self.toolstack,
            self.claims,
            self.publisher.report,
            interval=float(settings.report_interval),
            seq=seq,
            lifecycle=self.lifecycle.happened,
            extra=lambda: {"verbs": sorted(verbs), "broken_plugins": self.broken_plugins, "owner": host.owner},
        )

        health = Health(self)
        self.monitor = Monitor(settings.http, metrics, health.live(), health.ready())

    def _notices(self) -> tuple[Notices, Callable[[Any], None], Iterator[int]]:
        """What makes notifications, what makes their queues at the broker, and the numbers of all reports."""
        given, seq = self.settings.notifications, itertools.count(1)
        oslo_too = given.oslo and not broker.is_filesystem(self.settings.broker_url)
        topics = OsloTopics(self.settings.oslo.exchange, given.topics) if oslo_too else None
        notices = Notices(self.settings.host, time.time, native=given.native, topics=topics, seq=seq)
        if topics is None:
            return notices, lambda connection: None, seq
        made, names = self._oslo_queues(), notice_queues(given.topics)
        return notices, lambda connection: declare_notifications(connection, made, names), seq

    def _consumer(self, queues: OsloQueues | None = None) -> Consumer:
        settings = self.settings
        return Consumer(
            settings.broker_url,
            settings.host,
            self.dispatcher.receive,
            self.dispatcher.room,
            self._fail,
            prefetch=settings.prefetch,
            poll_seconds=settings.poll_seconds,
            max_message_bytes=settings.max_message_bytes,
            sources=queues.sources() if queues else (native(settings.host, settings.broker_quorum),),
            tls=settings.broker_tls,
        )

    def _oslo_queues(self) -> OsloQueues:
        given = self.settings.oslo
        return OsloQueues(
            exchange=given.exchange,
            topic=given.topic,
            server=self.settings.host,
            mode=given.queues,
            transient_quorum=given.transient_quorum,
            auto_delete=given.auto_delete,
            expires=given.fanout_ttl,
            delivery_limit=given.delivery_limit,
            identity=self.journal.node_id().replace("-", ""),
        )

    def run(self) -> None:
        """Keep house until `stop`. :raises Exception: what made going on impossible."""
        due = time.monotonic() + HOUSEKEEPING_SECONDS
        while True:
            self._wake.wait(min(SIGNAL_SECONDS, max(0.0, due - time.monotonic())))
            self._wake.clear()
            if self.ended.is_set():
                break
            if self._reload.is_set():
                self._reload.clear()
                reload.carry_out(self)
            housekeeping.look_again(self)
            if time.monotonic() < due:
                continue
            due = time.monotonic() + HOUSEKEEPING_SECONDS
            housekeeping.keep_house(self)
        if self.fatal is not None:
            raise self.fatal

    def stop(self) -> None:
        """End `run`; may be called from a signal handler. Once more: do not wait for what runs either."""
        if self.ended.is_set():
            self.stopping.set()
        self.ended.set()
        self._wake.set()

    def reload(self) -> None:
        """Have `run` read the configuration again; may be called from a signal handler."""
        self._reload.set()
        self._wake.set()

    def close(self) -> bool:
        """Drain and release everything; safe on a half-started service.

        :returns: whether every instruction that was begun is finished. What is not resumes at the next start.
        """
        drained = True
        if hasattr(self, "monitor"):
            seconds = float(self.settings.drain_seconds)
            sdnotify.stopping(seconds + GIVE_WAY_SECONDS + FLUSH_SECONDS + 10, "waiting for running instructions")
            for consumer in self.consumers:
                consumer.stop()
            drained = self.dispatcher.drain(seconds)
            if not drained:
                LOG.info("instructions still run: they stop at the next step and resume at the next start")
            self.stopping.set()
            self.dispatcher.drain(GIVE_WAY_SECONDS)
            drained = drained and not self.dispatcher.interrupted
            self.reporter.stop()
            self.lifecycle.stop()
            if self.publisher.connected.is_set():
                self.publisher.flush(FLUSH_SECONDS)
            self.publisher.stop()
        self.stopping.set()
        while self._closers:
            with contextlib.suppress(Exception):
                self._closers.pop()()
        return drained

    def _driver(self) -> Toolstack:
        """The configured driver; while its host does not answer it is tried again."""
        while True:
            try:
                return load_driver(self.settings.driver, self.settings.driver_settings)
            except ToolstackError as exc:
                if not exc.retryable:
                    raise
                LOG.warning("driver %s: %s; trying again", self.settings.driver, exc)
            if self.ended.wait(DRIVER_PAUSE):
                raise ConfigError(f"stopped before driver {self.settings.driver!r} could reach its host")

    def _changed(self) -> None:
        self.publisher.wake()
        self.reporter.changed()
        self.claims.on_change()

    def _fail(self, exc: Exception) -> None:
        self.fatal = exc
        self.ended.set()
        self._wake.set()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``reeve-agent``: 0 ended, 75 ended with work left, 1 could not run, 2 wrong options."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = conf.load(None, argv, description=DESCRIPTION, epilog=EPILOG)
        logs.setup(settings.log.level, settings.log.file, settings.log.format)
    except (ConfigError, OSError) as exc:
        sys.stderr.write(f"reeve-agent: {exc}\n")
        return 2
    service = Service(settings, argv=argv)
    started = time.monotonic()
    # Threads that only pass work on to each other: by default one may wait 5 ms for another that computes.
    sys.setswitchinterval(SWITCH_SECONDS)

    def on_signal(number: int, _frame: object) -> None:
        LOG.info("signal %s: stopping", signal.Signals(number).name)
        service.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGHUP, lambda number, frame: service.reload())
    try:
        service.start()
        service.run()
    except (AgentError, ToolstackError) as exc:
        LOG.error("%s", exc)
        sys.stderr.write(f"reeve-agent: {exc.code}: {exc}\n")
        return 1
    finally:
        drained = service.close()
        LOG.info("ended after %.0f s", time.monotonic() - started)
    return 0 if drained else EXIT_UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
