"""How the two ends of a mirror reach each other."""

from __future__ import annotations

from typing import Protocol


class MirrorLink(Protocol):
    """Messages of at most `wire.MAX_MESSAGE` bytes, whole and in order, between two hosts that trust each other's name.

    What comes out of it is the other host's and is checked; nobody else can say something on it.
    """

    async def send(self, message: bytes | int) -> None:
        """:param message: bytes, or a file of memory that has them; it stays the caller's.

        :raises ToolstackError: the connection is over.
        """

    async def receive(self) -> bytes:
        """The next message; waits for as long as it takes. :raises ToolstackError: the connection is over."""
