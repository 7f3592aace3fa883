"""Disks and nics of the pretend Xen machine: their nodes in xenstore as libxl writes them, and what guests do then.

Of ``block-list`` nothing was recorded, of ``network-list`` the header only: their lines follow Xen 4.17's
``tools/xl/xl_block.c`` and ``xl_nic.c``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xs_client import XsClient

from hypervisor.xenstore.wire import Op

BACKENDS = "/local/domain/0/backend"
INITIALISING, INIT_WAIT, CONNECTED, CLOSING, CLOSED = "1", "2", "4", "5", "6"


class FakeDevices:
    """:param path: xenstored's socket. Call everything but `stop` with the machine's lock held, `lock`."""

    def __init__(self, path: Path, lock: threading.Condition) -> None:
        self._path, self._lock = path, lock
        self._guests: set[int] = set()  # domids of those that run and take devices up
        self._watch: XsClient | None = None

    def start(self, domid: int, config: dict[str, Any]) -> None:
        """The devices that a domain's configuration names."""
        for text in config.get("disk", []):
            self.add_disk(domid, text)
        for text in config.get("vif", []):
            self.add_nic(domid, text.split(","))

    def run(self, domid: int, runs: bool) -> None:
        """Whether the guest runs, and takes devices up and lets go of them."""
        (self._guests.add if runs else self._guests.discard)(domid)
        self._follow()

    def end(self, domid: int) -> None:
        self._guests.discard(domid)
        for kind in ("vbd", "vif"):
            for devid in self._devids(domid, kind):
                self._remove(domid, kind, devid)
        with self._store() as store:
            store.remove(f"/libxl/{domid}")

    def add_disk(self, domid: int, text: str) -> None:
        words = dict(word.split("=", 1) for word in text.split(", ") if "=" in word)
        assert {"format", "vdev", "access", "target"} <= set(words), text
        self._add(domid, "vbd", 202 << 8 | (ord(words["vdev"][3]) - ord("a")) << 4, {"params": words["target"]})

    def add_nic(self, domid: int, words: list[str]) -> None:
        values = dict(word.split("=", 1) for word in words)
        assert set(values) <= {"mac", "bridge", "devid", "rate", "ip"}, words
        self._add(domid, "vif", int(values["devid"]), {"mac": values["mac"], "bridge": values["bridge"]})

    def remove(self, domid: int, kind: str, devid: int, *, force: bool) -> bool:
        """False: the guest keeps it (libxl waits 10 s before it says so)."""
        with self._store() as store:
            state = store.read(f"{BACKENDS}/{kind}/{domid}/{devid}/state")
        if state not in (None, CLOSED) and not force:
            return False
        self._remove(domid, kind, devid)
        return True

    def rows(self, domid: int, kind: str) -> Iterator[tuple[int, str, str, str]]:
        """Number, state of the front end, back end's path, MAC."""
        for devid in self._devids(domid, kind):
            with self._store() as store:
                state = store.read(f"/local/domain/{domid}/device/{kind}/{devid}/state") or "-1"
                path = store.read(f"/libxl/{domid}/device/{kind}/{devid}/backend")
                mac = store.read(f"/libxl/{domid}/device/{kind}/{devid}/mac") or ""
            yield devid, state, str(path), mac

    def stop(self) -> None:
        if self._watch is not None:
            self._watch.shutdown()
            self._thread.join(10)
            self._watch.close()

    def _add(self, domid: int, kind: str, devid: int, values: dict[str, str]) -> None:
        self._begin()
        back, front = f"{BACKENDS}/{kind}/{domid}/{devid}", f"/local/domain/{domid}/device/{kind}/{devid}"
        ends = {"frontend": front, "backend": back}
        trees = {
            f"/libxl/{domid}/device/{kind}/{devid}": {**ends, **values},
            front: {"backend": back, "backend-id": "0", "state": INITIALISING},
            back: {"frontend": front, "frontend-id": str(domid), "online": "1", **values, "state": INIT_WAIT},
        }
        with self._store() as store:
            for path, nodes in trees.items():
                for name, value in nodes.items():
                    store.write(f"{path}/{name}", value)
        self._follow()

    def _remove(self, domid: int, kind: str, devid: int) -> None:
        with self._store() as store:
            for path in (f"/libxl/{domid}/device", f"/local/domain/{domid}/device"):
                store.remove(f"{path}/{kind}/{devid}")
            store.remove(f"{BACKENDS}/{kind}/{domid}/{devid}")

    def _devids(self, domid: int, kind: str) -> list[int]:
        with self._store() as store:
            return sorted(int(name) for name in store.names(f"/libxl/{domid}/device/{kind}"))

    @contextlib.contextmanager
    def _store(self) -> Iterator[XsClient]:
        client = XsClient(self._path)
        try:
            yield client
        finally:
            client.close()

    # guests

    def _begin(self) -> None:
        """Guests see from now on what the host asks of them."""
        if self._watch is None:
            self._watch = XsClient(self._path)
            self._watch._call(Op.WATCH, f"{BACKENDS}\0w\0".encode())
            self._thread = threading.Thread(target=self._see, args=(self._watch,), daemon=True)
            self._thread.start()

    def _see(self, watch: XsClient) -> None:
        while watch.next_event():
            with self._lock, contextlib.suppress(OSError):  # xenstored ended
                self._follow()

    def _follow(self) -> None:
        """Every guest that runs connects to what is new, and closes what it is asked to."""
        for domid in self._guests:
            for kind in ("vbd", "vif"):
                for devid in self._devids(domid, kind):
                    front, back = f"/local/domain/{domid}/device/{kind}/{devid}", f"{BACKENDS}/{kind}/{domid}/{devid}"
                    with self._store() as store:
                        then = {INIT_WAIT: CONNECTED, CLOSING: CLOSED}.get(store.read(f"{back}/state") or "")
                        for path in (front, back) if then else ():
                            store.write(f"{path}/state", str(then))
