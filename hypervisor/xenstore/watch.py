"""Watches: who wants to hear of which paths.

Source: ``docs/misc/xenstore.txt``, section Watches. Matching costs one look-up
for each level of the changed path, however many watches there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hypervisor.xenstore import path as paths
from hypervisor.xenstore.errors import AlreadyExists, NotFound
from hypervisor.xenstore.perms import Who
from hypervisor.xenstore.store import Store
from hypervisor.xenstore.tree import Change

O = TypeVar("O", bound=Hashable)  # noqa: E741 - the owner's type


@dataclass(frozen=True, slots=True)
class Watch:
    """One watch.

    :ivar path: canonical.
    :ivar token: the client's own word for it, sent back with each event.
    :ivar prefix: characters of the path to leave out in events (the client gave a relative path).
    :ivar depth: levels below `path` that matter; -1 for all.
    """

    path: str
    token: bytes
    prefix: int = 0
    depth: int = -1

    @property
    def size(self) -> int:
        return len(self.path) + len(self.token)

    def to_json(self) -> list[Any]:
        return [self.path, self.token.decode("latin-1"), self.prefix, self.depth]

    def event(self, path: str) -> bytes:
        """The payload of a WATCH_EVENT for a changed path."""
        return path[self.prefix :].encode("latin-1") + b"\0" + self.token + b"\0"


class WatchTable(Generic[O]):
    """All watches of all owners, found by owner or by path."""

    def __init__(self) -> None:
        self._by_owner: dict[O, dict[tuple[str, bytes], Watch]] = {}
        self._by_path: dict[str, dict[O, dict[bytes, Watch]]] = {}

    def add(self, owner: O, watch: Watch) -> None:
        """:raises AlreadyExists: the owner has one with the same path and token."""
        own = self._by_owner.setdefault(owner, {})
        if (watch.path, watch.token) in own:
            raise AlreadyExists(f"a watch on {watch.path} with this token is there")
        own[watch.path, watch.token] = watch
        self._by_path.setdefault(watch.path, {}).setdefault(owner, {})[watch.token] = watch

    def remove(self, owner: O, path: str, token: bytes) -> None:
        """:raises NotFound: the owner has no such watch."""
        if self._by_owner.get(owner, {}).pop((path, token), None) is None:
            raise NotFound(f"no watch on {path} with this token")
        owners = self._by_path[path]
        del owners[owner][token]
        if not owners[owner]:
            del owners[owner]
        if not owners:
            del self._by_path[path]

    def remove_all(self, owner: O) -> None:
        for path, token in list(self._by_owner.get(owner, {})):
            self.remove(owner, path, token)
        self._by_owner.pop(owner, None)

    def of(self, owner: O) -> list[Watch]:
        return list(self._by_owner.get(owner, {}).values())

    def count(self, owner: O) -> int:
        return len(self._by_owner.get(owner, {}))

    def matching(self, change: Change) -> Iterator[tuple[O, list[Watch]]]:
        """Owners and those of their watches that a change concerns (permissions are not looked at)."""
        level = 0
        path = change.path
        while True:
            for owner, watches in list(self._by_path.get(path, {}).items()):
                hit = [w for w in watches.values() if w.depth < 0 or level <= w.depth]
                if hit:
                    yield owner, hit
            if not change.subtree or path == "/" or path.startswith("@"):
                return
            path = paths.parent(path)
            level += 1

    def special(self, name: str, domid: int) -> Iterator[tuple[O, Watch, str]]:
        """Owners, watches and event paths for a special event about a domain.

        A depth of 1 asks for ``@name/<domid>``; a watch on that path hears of that domain only.
        """
        single = f"{name}/{domid}"
        for path in (name, single):
            for owner, watches in list(self._by_path.get(path, {}).items()):
                for watch in list(watches.values()):
                    if path == single or watch.depth != 0:
                        yield owner, watch, single if path == single or watch.depth > 0 else name


def may_hear(who: Who, change: Change, store: Store) -> bool:
    """Whether a change may be told: the node is or was readable, or its parent is."""
    if any(acl.readable(who) for acl in change.acls):
        return True
    parent = store.get(paths.parent(change.path))
    return parent is not None and parent.acl.readable(who)
