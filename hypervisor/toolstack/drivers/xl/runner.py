"""Runs ``xl``: an argument list, bounded in time and output, killed with its children, its end judged.

Real ``xl`` returns 0 with a complaint on stderr for some requests (a trigger that a PV guest cannot take), so that
both are read: what is not known to be harmless is a failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from hypervisor.errors import (
    DomainNotFound,
    HostFailure,
    HostUnavailable,
    InsufficientMemory,
    KernelInvalid,
    NameInUse,
    OperationTimeout,
    StreamInvalid,
    ToolstackError,
    WrongState,
)

LOG = logging.getLogger(__name__)

QUICK = 30.0
"""Seconds for a command that looks or switches."""
ATTACH = 90.0
"""Seconds for one that attaches or detaches a device: libxl gives its hotplug script 40, and each end 10."""
BUILD = 180.0
"""Seconds for one that builds or ends a domain."""
STREAM = 1800.0
"""Seconds for one that writes or reads all of a domain's memory."""

MAX_OUTPUT = 16 << 20
MAX_COMPLAINT = 300
GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL: ``xl`` releases its lock on SIGTERM, and sudo passes that one on."""

HARMLESS = re.compile(
    r"Parsing config (from|file) |Saving to |Loading new save file |\s*Savefile contains xl domain config"
    r"|(xc|libxl): (info|debug|detail|progress): |xc: (Saving|Restoring|Frames|Suspending|End of stream)"
    r"|Shutting down domain \d|Rebooting domain \d|PV control interface not available: sending ACPI "
    r"|Dumping core of domain|WARNING: |(xc|libxl): (warning|notice): |libxl: [^ ]*: (warning|notice|debug)"
)
"""Beginnings of lines on stderr of commands that succeed (xl and libxl 4.17)."""

_CAUSES: tuple[tuple[str, type[ToolstackError], str], ...] = (
    (r"is an invalid domain identifier|[Dd]omain .* does not exist", DomainNotFound, "list them"),
    (
        r"killing execution of .* because of timeout",
        OperationTimeout,
        "a hotplug script took longer than libxl waits: is dom0 overloaded, or a device's file out of reach?",
    ),
    (r"Bad mfn 0x?[0-9a-f]* for p2m frame list", WrongState, "its guest has not booted far enough: try again then"),
    (
        r"[Nn]ot enough (free )?memory|failed to free memory|[Oo]ut of memory|[Cc]annot allocate memory|ERROR_NOMEM",
        InsufficientMemory,
        "ask for less or destroy a domain",
    ),
    (r"[Dd]omain with name .* already exists|domain name .* (in use|already)", NameInUse, "give another name"),
    (r"a password is required|not allowed to|[Pp]ermission denied|must be root", HostFailure, "see docs/xl.md"),
    (
        r"cannot (connect|open).*xenst|[Ff]ailed to connect to xenstored|open xenstore|cannot init xl context"
        r"|privcmd|xenstore: Connection",
        HostUnavailable,
        "is this a dom0, and does xenstored run? ask reeve doctor",
    ),
    (r"xc_dom_|[Kk]ernel image|panic: xc_dom|invalid kernel", KernelInvalid, "give a kernel for this domain type"),
    (
        r"libxl_stream_read|restoring domain|xc: .*([Rr]estore|[Rr]ecord|from stream|Invalid marker)"
        r"|[Ss]avefile has|File has wrong magic number",
        StreamInvalid,
        "give another file",
    ),
)


@dataclass(frozen=True, slots=True)
class Output:
    """How a command ended.

    :ivar status: exit status; negative: the number of the signal that ended it.
    """

    command: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    def complaints(self) -> list[str]:
        """Lines of stderr that are not known to be harmless."""
        lines = (line.strip() for line in self.stderr.splitlines())
        return [line for line in lines if line and not HARMLESS.match(line)]

    def failure(self) -> ToolstackError | None:
        """What is wrong, or None: it ended with 0 and had nothing to complain of."""
        complaints = self.complaints()
        if self.status == 0 and not complaints:
            return None
        text = shown("; ".join(complaints)) or "it said nothing"
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        for pattern, error, cure in _CAUSES:
            if re.search(pattern, self.stderr):
                return error(f"xl {self.command[0]}: {text} ({how}): {cure}")
        return HostFailure(f"xl {self.command[0]} failed with {how}: {text}: see xl's log under /var/log/xen")


@dataclass(frozen=True, slots=True)
class Runner:
    """:param program: ``xl`` or its path.

    :param prefix: what comes before it, for example ``("sudo", "-n")``. As an ordinary user cannot kill what root
        runs, ``timeout`` is put between, which ends the command on root's side.
    :param environment: added to the few variables the command gets.
    """

    program: str = "xl"
    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, args: Sequence[str], timeout: float) -> list[str]:
        """The whole argument list."""
        for arg in args:
            if "\0" in arg:
                raise HostFailure(f"xl {args[0]}: an argument holds a NUL byte")
        guard = ["timeout", f"--kill-after={GRACE:g}", f"{timeout + 1:.0f}"] if self.prefix else []
        return [*self.prefix, *guard, self.program, *args]

    def variables(self) -> dict[str, str]:
        """The command's environment: nothing of ours but the search path, and messages in English."""
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        return {"PATH": path.lstrip(":"), "LC_ALL": "C", **self.environment}

    def run(self, *args: str, timeout: float = QUICK, give_up: Callable[[], None] | None = None) -> str:
        """Run ``xl args`` and return what it printed.

        :param give_up: called twice a second or more; what it raises ends the command.
        :raises ToolstackError: it failed, complained, or cannot be run. :raises OperationTimeout: it took too long.
        """
        output = self.attempt(*args, timeout=timeout, give_up=give_up)
        failure = output.failure()
        if failure is not None:
            raise failure
        return output.stdout

    def attempt(self, *args: str, timeout: float = QUICK, give_up: Callable[[], None] | None = None) -> Output:
        """As `run`, but the caller judges its end."""
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                self.command(args, timeout),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.variables(),
                cwd="/",  # Debian's xl is a shell script, which complains where our folder was removed
                start_new_session=True,
            )
        except OSError as exc:
            name = exc.filename or self.program
            raise HostUnavailable(f"{name} cannot be run: {exc.strerror}: install Xen's tools (xen-utils)") from exc
        try:
            out, err = _collect(process, args[0], began + timeout, give_up or (lambda: None))
        finally:
            if process.poll() is None:
                kill(process)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        LOG.debug("xl %s: status %s after %.3f s", args[0], process.returncode, time.monotonic() - began)
        return Output(args, process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def shown(text: str) -> str:
    """Foreign text for an error line: printable, one line, bounded."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= MAX_COMPLAINT else clean[:MAX_COMPLAINT] + "…"


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and everything in its session: asked first, then without asking."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            process.wait(GRACE)
            break
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # a child that outlived its parent
    if process.poll() is None:
        LOG.error("process %d (xl) cannot be killed: it is another user's", process.pid)


def _collect(
    process: subprocess.Popen[bytes], verb: str, deadline: float, give_up: Callable[[], None]
) -> tuple[bytes, bytes]:
    """What it prints, until it ends. A child of its own that keeps the pipes open does not hold us."""
    assert process.stdout is not None and process.stderr is not None
    texts: dict[IO[bytes], bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for pipe in texts:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            give_up()
            left = deadline - time.monotonic()
            if left <= 0:
                raise OperationTimeout(
                    f"xl {verb} did not end in time and was killed: look at the host, then try again"
                )
            ended = process.poll() is not None
            ready = selector.select(0 if ended else min(left, 0.5))
            if ended and not ready:
                break
            for key, _ in ready:
                _read_some(selector, key.fileobj, texts, verb)  # type: ignore[arg-type]
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise OperationTimeout(f"xl {verb} did not end in time and was killed: look at the host") from None
    return bytes(texts[process.stdout]), bytes(texts[process.stderr])


def _read_some(selector: selectors.BaseSelector, pipe: IO[bytes], texts: dict[IO[bytes], bytearray], verb: str) -> None:
    data = os.read(pipe.fileno(), 65536)
    if not data:
        selector.unregister(pipe)
    texts[pipe] += data
    if len(texts[pipe]) > MAX_OUTPUT:
        raise HostFailure(f"xl {verb} printed more than {MAX_OUTPUT >> 20} MiB and was killed: is it xl?")
