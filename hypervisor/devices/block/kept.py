"""An image behind a daemon whose death loses nothing; see `hypervisor.devices.block.unflushed`."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence

from hypervisor.devices.block.image.base import CHANGES, Action, Image, Operation
from hypervisor.devices.block.unflushed import Unflushed

MANY = 16
"""Operations that are written again at once: as many as a daemon works on."""


class Kept:
    """An `Image` that keeps what is not flushed. It owns `image`, but not what it keeps.

    :param failed: called with an errno when a flush of its own failed: what was written before may be lost.
    """

    def __init__(self, image: Image, unflushed: Unflushed, failed: Callable[[int], None]) -> None:
        self.image = image
        self._unflushed = unflushed
        self._failed = failed

    def settle(self, image: Image) -> int:
        """To be called once before `run`: write again what a daemon took along.

        What another driver before this one has written without keeping it is flushed.

        :param image: this one, or what stands before it and records its changes.
        :returns: errno; not 0: it could not be done, and may be tried again. :raises ImageGone: likewise.
        """
        unflushed = self._unflushed
        daemon = unflushed.daemon
        if not unflushed.stale and unflushed.known:
            return 0
        if unflushed.stale:
            for batch in batches(unflushed.records()):
                image.run(batch)
                if error := next((operation.error for operation in batch if operation.error), 0):
                    return error
        if error := self._flush():
            return error
        unflushed.settle(daemon)
        return 0

    def run(self, operations: Sequence[Operation]) -> None:
        unflushed = self._unflushed
        todo: list[Operation] = []
        flushes: list[tuple[Operation, int]] = []
        for operation in operations:
            if operation.action == Action.FLUSH:
                flushes.append((operation, unflushed.end))
            elif operation.action in CHANGES and not unflushed.append(operation):
                self._do(todo, flushes)
                todo, flushes = [], []
                if not self._make_room(operation):
                    continue
            todo.append(operation)
        self._do(todo, flushes)

    def close(self) -> None:
        self.image.close()

    def _do(self, todo: Sequence[Operation], flushes: Sequence[tuple[Operation, int]]) -> None:
        if todo:
            self.image.run(todo)
        for flush, end in flushes:
            if not flush.error:
                self._unflushed.drop(end)

    def _make_room(self, operation: Operation) -> bool:
        """For this change, and keep it."""
        if error := self._flush():
            self._failed(error)
            operation.error = error
            return False
        self._unflushed.drop(self._unflushed.end)
        if not self._unflushed.append(operation):
            operation.error = errno.EFBIG
        return not operation.error

    def _flush(self) -> int:
        flush = Operation(Action.FLUSH)
        self.image.run([flush])
        return flush.error


def batches(operations: Iterator[Operation]) -> Iterator[list[Operation]]:
    """Those that may be done in any order: none touches what another of its batch does."""
    batch: list[Operation] = []
    for operation in operations:
        end = operation.offset + operation.length
        if len(batch) == MANY or any(o.offset < end and operation.offset < o.offset + o.length for o in batch):
            yield batch
            batch = []
        batch.append(operation)
    if batch:
        yield batch
