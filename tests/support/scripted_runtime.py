"""A guest without an engine: what the "kernel" file says, done on real rings in real processes.

The file begins with ``#scripted`` and holds one word a line: ``print TEXT``, ``wait`` (for ever, echoing
typed lines and obeying control/shutdown), ``deaf`` (wait, obeying nothing), ``poweroff``, ``reboot``,
``watchdog``, ``suspend``, ``crash``, ``segv``, ``raise``, ``spin``, ``await`` (until the process gets
SIGUSR1), ``drop-host`` (the channel breaks), ``try CALL`` (a system call that must be refused), ``once WORD``
(only in the domain's first incarnation), ``die-in-build``, ``hang-in-build``, ``store-check`` and
``store-hostile KIND`` (see `store_guests`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import store_guests

from hypervisor.errors import KernelInvalid, MemoryTooSmall, RamdiskInvalid
from hypervisor.host.runtime import CONSOLE_PORT, STORE_PORT, BuildRequest, Ended, RuntimeFacts
from hypervisor.toolstack.api import ShutdownReason

MAGIC = "#scripted"
PAGE = 4096
CAPABILITIES = ("pv", "console", "reboot", "adoption", "smp", "disk", "nic", "hotplug", "resize", "disk-resize")


class Ring:
    """A guest's half of a byte ring: offsets of data, size and indices (cons, prod)."""

    def __init__(self, memory: mmap.mmap, page: int, data: int, size: int, cons: int, prod: int) -> None:
        self._memory, self._base, self._size = memory, page * PAGE, size
        self._data, self._cons, self._prod = self._base + data, self._base + cons, self._base + prod

    def _get(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._memory, at)[0])

    def write(self, data: bytes) -> int:
        cons, prod = self._get(self._cons), self._get(self._prod)
        data = data[: self._size - ((prod - cons) & 0xFFFFFFFF)]
        for index, byte in enumerate(data):
            self._memory[self._data + (prod + index) % self._size] = byte
        struct.pack_into("<I", self._memory, self._prod, (prod + len(data)) & 0xFFFFFFFF)
        return len(data)

    def read(self) -> bytes:
        cons, prod = self._get(self._cons), self._get(self._prod)
        count = (prod - cons) & 0xFFFFFFFF
        data = bytes(self._memory[self._data + (cons + index) % self._size] for index in range(count))
        struct.pack_into("<I", self._memory, self._cons, prod)
        return data


class ScriptedGuest:
    def __init__(
        self, request: BuildRequest, memory: mmap.mmap, notify_host: Callable[[int], None], words: list[str]
    ) -> None:
        self._words = words
        self._notify_host = notify_host
        store, console = request.nr_pages - 1, request.nr_pages - 2
        self.boot: dict[str, Any] = {"store_mfn": request.base_mfn + store, "console_mfn": request.base_mfn + console}
        self._out = Ring(memory, console, 1024, 2048, 3080, 3084)
        self._in = Ring(memory, console, 0, 1024, 3072, 3076)
        self._requests = Ring(memory, store, 0, 1024, 2048, 2052)
        self._replies = Ring(memory, store, 1024, 1024, 2056, 2060)
        self._store_page = memoryview(memory)[store * PAGE : (store + 1) * PAGE]
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._go = threading.Event()
        self._packets = b""
        self._typed = b""
        self._deaf = False
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    # -- what the host calls ------------------------------------------------------------------------------------

    def pause(self) -> None:
        self._go.clear()

    def unpause(self) -> None:
        self._go.set()
        os.eventfd_write(self._bell, 1)

    def notify(self, port: int) -> None:
        os.eventfd_write(self._bell, 1)

    def moving(self) -> None:
        return None

    def core(self) -> None:
        """No registers, no dump."""

    def saver(self) -> None:
        """Nor can it be saved."""

    def limit_memory(self, pages: int) -> None:
        """It does not follow."""

    def set_cap(self, percent: int) -> None:
        """It does not follow."""

    def link_target(self) -> None:
        """It grants nothing."""

    def stats(self) -> dict[str, Any]:
        main = threading.main_thread().ident
        assert main is not None
        return {"cpu_time_ns": time.clock_gettime_ns(time.pthread_getcpuclockid(main))}

    # -- what the guest does ------------------------------------------------------------------------------------

    def run(self) -> Ended:
        for word in self._words:
            ended = self._do(word)
            if ended is not None:
                return ended
        return self._wait()

    def _do(self, word: str) -> Ended | None:
        self._go.wait()
        name, _, rest = word.partition(" ")
        if name == "print":
            self._print(rest.encode() + b"\r\n")
        elif name in ("poweroff", "reboot", "watchdog", "suspend"):
            return Ended(ShutdownReason(name))
        elif name == "crash":
            return Ended(ShutdownReason.CRASH, "scripted crash")
        elif name == "segv":
            ctypes.string_at(8)
        elif name == "raise":
            raise RuntimeError("scripted bug")
        elif name == "await":
            signal.sigwait({signal.SIGUSR1})
        elif name == "drop-host":
            drop_host()
        elif name == "spin":
            while True:
                self._go.wait()
        elif name == "deaf":
            self._deaf = True
            return self._wait()
        elif name == "store-check":
            store_guests.check_all(self._store_ring(), lambda line: self._print(line.encode() + b"\r\n"))
        elif name == "store-hostile":
            store_guests.hostile(rest, self._store_ring())
        elif name == "try":
            self._print(f"{rest}: {attempt(rest)}\r\n".encode())
        return None

    def _print(self, data: bytes) -> None:
        while data:
            data = data[self._out.write(data) :]
            self._notify_host(CONSOLE_PORT)
            if data:
                self._sleep()

    def _sleep(self) -> None:
        select.select([self._bell], [], [])
        os.eventfd_read(self._bell)

    def _wait(self) -> Ended:
        if not self._deaf:
            self._xenstore(4, b"control/shutdown\0t\0")  # XS_WATCH
        while True:
            self._go.wait()
            for reason in self._shutdown_requests():
                return Ended(reason)
            self._typed += self._in.read()
            while b"\n" in self._typed:
                line, _, self._typed = self._typed.partition(b"\n")
                self._print(line.strip() + b"\r\n")
            self._sleep()

    def _store_ring(self) -> store_guests.StoreRing:
        def ring_bell() -> None:
            self._notify_host(STORE_PORT)

        return store_guests.StoreRing(self._requests, self._replies, ring_bell, self._sleep, self._store_page)

    def _xenstore(self, kind: int, payload: bytes) -> None:
        self._requests.write(struct.pack("<4I", kind, 0, 0, len(payload)) + payload)
        self._notify_host(STORE_PORT)

    def _shutdown_requests(self) -> list[ShutdownReason]:
        """Read control/shutdown on each watch event; a value in the answer is the request."""
        self._packets += self._replies.read()
        found = []
        while len(self._packets) >= 16:
            kind, _, _, size = struct.unpack_from("<4I", self._packets)
            if len(self._packets) < 16 + size:
                break
            payload, self._packets = self._packets[16 : 16 + size], self._packets[16 + size :]
            if kind == 15:  # XS_WATCH_EVENT
                self._xenstore(2, b"control/shutdown\0")  # XS_READ
            elif kind == 2 and payload:
                found.append(ShutdownReason(payload.decode()))
        return found


class ScriptedRuntime:
    def shed(self) -> None:
        pass

    def facts(self) -> RuntimeFacts:
        return RuntimeFacts("scripted", 4, CAPABILITIES, link="toy_device:NoLink")

    def build(
        self, request: BuildRequest, memory: mmap.mmap, notify_host: Callable[[int], None], seal: Callable[[], None]
    ) -> ScriptedGuest:
        path = Path(request.spec.boot.kernel)
        try:
            lines = path.read_text(errors="replace").split("\n")
        except OSError as exc:
            raise KernelInvalid(f"kernel {path} cannot be read: {exc.strerror}") from exc
        if lines[0] != MAGIC:
            raise KernelInvalid(f"kernel {path} is no script")
        self._check_ramdisk(request)
        words = []
        marker = Path(f"{path}.{request.spec.uuid}.once")
        first = not marker.exists()
        marker.touch()
        for line in lines[1:]:
            if line == "die-in-build":
                os._exit(3)
            if line == "hang-in-build":
                Path(f"{path}.hangs").write_text(str(os.getpid()))
                select.select([], [], [], 3)
            if line.startswith("once "):
                if not first:
                    continue
                line = line.removeprefix("once ")
            if line:
                words.append(line)
        seal()
        return ScriptedGuest(request, memory, notify_host, words)

    def _check_ramdisk(self, request: BuildRequest) -> None:
        ramdisk = request.spec.boot.ramdisk
        if ramdisk is None:
            return
        path = Path(ramdisk)
        size = path.stat().st_size if path.is_file() else 0
        if not size:
            raise RamdiskInvalid(f"ramdisk {path} is not there or empty")
        if size > request.spec.memory_mib << 20:
            raise MemoryTooSmall(f"memory_mib is {request.spec.memory_mib}: the ramdisk alone has {size >> 20} MiB")


def drop_host() -> None:
    """Say what is no message on the channel, so that the host hangs up."""
    libc = ctypes.CDLL(None)
    value, size = ctypes.c_int(), ctypes.c_uint(4)
    for fd in range(3, 64):
        libc.getsockopt(fd, 1, 30, ctypes.byref(value), ctypes.byref(size))  # SO_ACCEPTCONN
        if value.value == 0:
            libc.send(fd, b"nonsense", 8, 0x40)  # MSG_DONTWAIT


def attempt(what: str) -> str:
    """What a guest that has taken over its process might try; the answer is "refused" or what happened."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls: dict[str, Callable[[], int]] = {
        "open": lambda: libc.open(b"/etc/passwd", 0),
        "openat": lambda: libc.syscall(257, -100, b"/proc/self/maps", 0, 0),
        "creat": lambda: libc.syscall(85, b"/tmp/reeve-sandbox-escape", 0o600),
        "unlink": lambda: libc.unlink(b"/tmp/reeve-sandbox-escape"),
        "socket": lambda: libc.socket(1, 1, 0),
        "connect": lambda: libc.connect(0, b"\x01\x00/tmp/x", 8),
        "execve": lambda: libc.execve(b"/bin/true", None, None),
        "fork": lambda: libc.syscall(57),
        "clone": lambda: libc.syscall(56, 17, 0, 0, 0, 0),
        "clone3": lambda: libc.syscall(435, 0, 0),
        "ptrace": lambda: libc.ptrace(16, os.getppid(), 0, 0),
        "kill": lambda: libc.kill(os.getppid(), 0),
        "tgkill": lambda: libc.syscall(234, 1, 1, 0),
        "setown": lambda: libc.fcntl(0, 8, 1),
        "mount": lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None),
        "process_vm_readv": lambda: libc.syscall(310, 1, 0, 0, 0, 0, 0),
        "bpf": lambda: libc.syscall(321, 0, 0, 0),
        "io_uring": lambda: libc.syscall(425, 1, 0),
        "prctl": lambda: libc.prctl(4, 1, 0, 0, 0),
    }
    result = calls[what]()
    return f"refused {ctypes.get_errno()}" if result < 0 else f"worked {result}"
