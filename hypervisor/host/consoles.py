"""One console over all incarnations of its domain: the log, and whoever is attached.

The ring backend (`hypervisor.devices.console`) lives as long as one domain
process; the hub stays from create to destroy, so a reboot ends no attachment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from hypervisor.devices.console import ConsoleClient, ConsoleLog, ConsoleRing
from hypervisor.errors import HostFailure

LOG = logging.getLogger(__name__)

LOG_NAME = "console.log"


class ConsoleHub:
    """:param directory: the domain's folder.

    :param limit: bytes of one log file; there are two.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._path = directory / LOG_NAME
        self._limit = limit
        self._log: ConsoleLog | None = None
        self._client: ConsoleClient | None = None
        self._viewers: dict[int, tuple[Callable[[bytes], None], Callable[[], None]]] = {}
        self._number = 0
        self._space = asyncio.Event()
        self._printed = 0
        self._held = False

    def open_log(self) -> ConsoleLog:
        """The log for one incarnation's ring, which closes it. :raises HostFailure: it cannot be opened."""
        try:
            self._printed = self.printed
            self._log = ConsoleLog(self._path, self._limit)
        except OSError as exc:
            raise HostFailure(f"console log {self._path} cannot be opened: {exc.strerror}; correct its rights") from exc
        return self._log

    def tail(self, size: int) -> bytes:
        """The last `size` bytes the guest printed."""
        if size <= 0:
            return b""
        if self._log is None:
            self.open_log().close()
        assert self._log is not None
        return self._log.tail(size)

    @property
    def printed(self) -> int:
        """Bytes that came into the log while this hub was there."""
        return self._printed + (self._log.written if self._log is not None else 0)

    def since(self, printed: int, most: int) -> bytes:
        """What came into the log after `printed` had come; the last `most` bytes of it."""
        return self.tail(min(most, self.printed - printed))

    def add(self, data: bytes) -> None:
        """What the guest printed elsewhere. :raises HostFailure: the log cannot be opened."""
        log = self.open_log()
        log.write(data)
        log.close()

    def connect(self, ring: ConsoleRing) -> None:
        """From now on this ring's guest prints here."""
        self._client = ring.attach(self._output, self._space.set, history=0)
        self._held = False
        self._space.set()

    def disconnect(self) -> None:
        """The guest is gone; the next one is yet to come."""
        self._client = None
        self._space.set()

    def hold(self) -> None:
        """The ring goes away for a moment, the guest stays: what is typed waits for the next `connect`."""
        self._held = True

    def unhold(self) -> None:
        """No ring will come."""
        self._held = False
        self._space.set()

    async def typed(self, data: bytes) -> None:
        """Hand it to the guest, as fast as that takes it. What is typed while no guest is there is lost."""
        while data and (self._client is not None or self._held):
            self._space.clear()
            if self._client is None:
                await self._space.wait()
                continue
            accepted = self._client.send(data)
            data = data[accepted:]
            if data:
                if self._client.ended:
                    return
                await self._space.wait()

    def attach(self, show: Callable[[bytes], None], gone: Callable[[], None]) -> Callable[[], None]:
        """`show` gets what is printed from now on, `gone` is called at destroy. Returns the way out."""
        self._number += 1
        number = self._number
        self._viewers[number] = (show, gone)
        return lambda: self._viewers.pop(number, None) and None

    def close(self) -> None:
        """The domain is destroyed."""
        self._held = False
        self.disconnect()
        viewers, self._viewers = self._viewers, {}
        for _, gone in viewers.values():
            gone()

    def _output(self) -> None:
        while self._client is not None and (data := self._client.take()):
            for show, _ in list(self._viewers.values()):
                show(data)
