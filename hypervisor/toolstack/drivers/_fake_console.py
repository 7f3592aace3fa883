"""The fake driver's attached console and event subscription: both follow the store in a thread."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Callable

from hypervisor.errors import DomainNotFound, ToolstackError
from hypervisor.toolstack.api import DomainEvent
from hypervisor.toolstack.drivers._fake_store import Store

LOG = logging.getLogger(__name__)


class FakeConsole:
    """Bytes printed from now on, through a socket pair so that `fileno` polls like a real one."""

    def __init__(self, store: Store, uuid: str, typed: Callable[[str, bytes], None]) -> None:
        self._store = store
        self._uuid = uuid
        self._typed = typed
        self._ours, self._theirs = socket.socketpair()
        kept = store.console(uuid)
        self._thread = threading.Thread(
            target=self._pump, args=(kept[1] if kept else 0,), name=f"fake-console-{uuid[:8]}", daemon=True
        )
        self._closed = False
        self._thread.start()

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return b""
        data = self._ours.recv(size)
        if not data:
            raise EOFError(f"domain {self._uuid} is gone")
        return data

    def write(self, data: bytes) -> None:
        with contextlib.suppress(DomainNotFound):  # the reader learns of it by EOFError
            self._typed(self._uuid, data)

    def fileno(self) -> int:
        return self._ours.fileno()

    def close(self) -> None:
        with self._store.changed:
            self._closed = True
            self._store.changed.notify_all()
        self._ours.close()
        self._thread.join(timeout=5)

    def _pump(self, seen: int) -> None:
        try:
            while True:
                with self._store.changed:
                    if self._closed:
                        return
                    kept = self._store.console(self._uuid)
                    if kept is None:
                        return
                    log, total = kept
                    if total == seen:
                        self._store.wait_change(None)
                        continue
                self._theirs.sendall(log[-min(total - seen, len(log)) :])
                seen = total
        except (ToolstackError, OSError) as exc:
            LOG.debug("console of %s ends: %s", self._uuid, exc)
        finally:
            self._theirs.close()


def follow_events(store: Store, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
    """Call `listener` in a thread for each event from now on; returns the function that stops it."""
    stopped = False
    start = store.last_event()

    def follow(last: int) -> None:
        try:
            while True:
                with store.changed:
                    if stopped or store.closed:
                        return
                    events = store.events_after(last)
                    if not events:
                        store.wait_change(None)
                        continue
                for last, event in events:  # noqa: B007 -- the last one seen is where the next look starts
                    if not stopped:
                        _tell(listener, event)
        except ToolstackError as exc:
            LOG.debug("event subscription ends: %s", exc)

    thread = threading.Thread(target=follow, args=(start,), name="fake-events", daemon=True)
    thread.start()

    def unsubscribe() -> None:
        nonlocal stopped
        with store.changed:
            stopped = True
            store.changed.notify_all()
        if threading.current_thread() is not thread:
            thread.join(timeout=5)

    return unsubscribe


def _tell(listener: Callable[[DomainEvent], None], event: DomainEvent) -> None:
    try:
        listener(event)
    except Exception:
        LOG.exception("a listener failed on %s of %s", event.kind, event.uuid)
