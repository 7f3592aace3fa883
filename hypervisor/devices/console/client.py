"""Somebody attached to a guest's console: a bounded queue each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

BUFFER_MAX = 1 << 18
"""Bytes of output kept for one client that does not read."""


class InputSink(Protocol):
    def send_input(self, data: bytes) -> int: ...


class ConsoleClient:
    """Made by `ConsoleRing.attach`.

    A client that reads too slowly loses output, is told how much where it is
    missing, and finds it in the log; the guest never waits for it.

    :param on_output: called when `take` has something after it had nothing.
    :param on_input_space: called when `send` may accept more after it did not.
    """

    def __init__(self, sink: InputSink, on_output: Callable[[], None], on_input_space: Callable[[], None]) -> None:
        self._sink = sink
        self._on_output = on_output
        self.on_input_space = on_input_space
        self._buffer = bytearray()
        self._skipped = 0
        self.ended = False

    def take(self, most: int = 65536) -> bytes:
        """Up to `most` bytes that the guest printed; ``b""`` when there are none now (or none ever: `ended`)."""
        data = bytes(self._buffer[:most])
        del self._buffer[:most]
        if self._skipped and not self._buffer:
            note = f"\r\n[{self._skipped} bytes of console output left out here: see the console log]\r\n"
            self._buffer += note.encode()
            self._skipped = 0
        return data

    @property
    def pending(self) -> int:
        """Bytes that `take` has."""
        return len(self._buffer)

    def send(self, data: bytes) -> int:
        """Type something. :returns: bytes accepted; wait for `on_input_space` to send the rest."""
        return 0 if self.ended else self._sink.send_input(data)

    def deliver(self, data: bytes) -> None:
        """The guest printed something."""
        was_empty = not self._buffer
        room = BUFFER_MAX - len(self._buffer)
        if self._skipped or room < len(data):
            # Once there is a gap nothing more is taken until it is told of, or the order would be lost.
            room = 0 if self._skipped else room
            self._skipped += len(data) - room
            data = data[:room]
        self._buffer += data
        if was_empty and self._buffer:
            self._on_output()

    def end(self) -> None:
        """The console is gone; what is buffered can still be taken."""
        self.ended = True
        self._on_output()
