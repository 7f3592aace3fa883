"""Save and restore. See docs/xl.md.

``xl save`` writes into a pipe, and what comes out goes to the file with Reeve's own key in the domain's configuration.
The domain is left suspended and paused until the file is whole; only then is it destroyed. So a file that cannot be
written costs nothing but time, it belongs to the agent's user, and what `DomainSpec` says comes back with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hypervisor.errors import HostFailure, OperationTimeout, SpecInvalid, ToolstackError, WrongState
from hypervisor.toolstack.api import DomainInfo, DomainState, SaveInfo
from hypervisor.toolstack.drivers.xl import parsers
from hypervisor.toolstack.drivers.xl.host import Host, state
from hypervisor.toolstack.drivers.xl.life import Life
from hypervisor.toolstack.drivers.xl.records import Record
from hypervisor.toolstack.drivers.xl.runner import BUILD, STREAM
from hypervisor.toolstack.stream import config as stream_config
from hypervisor.toolstack.stream import envelope, libxc
from hypervisor.toolstack.stream.source import Source

LOG = logging.getLogger(__name__)

_LIBXC = struct.Struct(">QI28x")
"""The two headers of a libxc stream: 24 and 16 bytes (docs/specs/libxc-migration-stream.pandoc)."""
_RECORD = struct.Struct("<II")
_STEP = 1 << 20


class Saving:
    """The verbs of `Capability.SAVE`; see `hypervisor.toolstack.api.Toolstack`."""

    def __init__(self, host: Host, life: Life) -> None:
        self._host, self._life = host, life

    def save(self, uuid: str, path: str, *, keep_running: bool, timeout: float) -> SaveInfo:
        began = time.monotonic()
        with self._life.acting(uuid, "save") as (row, record):
            if not path.startswith("/") or "\0" in path or os.path.lexists(path):
                raise SpecInvalid(f"save file {path!r}: give a full path where nothing is yet")
            if state(row) is not DomainState.RUNNING:
                raise WrongState(f"domain {uuid} is {state(row).value}, its guest cannot suspend: unpause it first")
            try:
                with _appearing(path) as file:
                    self._write(row, record, file, "-c" if keep_running else "-p", timeout)
                    _check(file)
            except BaseException:
                self._go_on(uuid)
                raise
            if not keep_running:
                self._host.xl.run("destroy", str(row.domid), timeout=BUILD)
                self._host.records.delete(uuid)
        if not keep_running:
            self._host.events.publish("destroyed", uuid, "saved")
        took = time.monotonic() - began
        size = os.path.getsize(path)
        return SaveInfo(uuid, record.spec.name, path, size, 0, took * 1000 if keep_running else 0.0, took)

    def restore(self, path: str, *, owner: str, name: str, uuid: str) -> DomainInfo:
        if not path.startswith("/") or "\0" in path:
            raise SpecInvalid(f"save file {path!r}: give a full path")
        try:
            with open(path, "rb") as file:
                saved = _check(file).named(owner=owner, name=name, uuid=uuid)
        except OSError as exc:
            raise SpecInvalid(f"save file {path}: {exc.strerror}: give a readable file") from exc
        run = dataclasses.replace(
            saved.spec,
            vcpus=saved.vcpus,
            max_vcpus=saved.max_vcpus,
            memory_mib=saved.memory_mib,
            max_memory_mib=saved.max_memory_mib,
        )
        return self._life.restore(saved.spec, run, path)

    def _write(self, row: parsers.Row, record: Record, file: BinaryIO, how: str, timeout: float) -> None:
        """Have ``xl`` write the domain into the file. :raises OperationTimeout: its guest did not suspend."""
        asked = time.monotonic()
        node = f"/local/domain/{row.domid}/control/shutdown"

        def give_up() -> None:
            """As libxl does after its 60 s: who has not seen the request never will; who has, ends soon."""
            if time.monotonic() - asked > timeout and self._host.store.swap(node, "suspend", ""):
                raise OperationTimeout(
                    f"the guest of domain {row.uuid} did not suspend within {timeout:g} s: it runs on"
                )

        with _piped(self._host.records.folder / f"{row.uuid}.pipe", file, _own_key(row, record)) as pipe:
            self._host.xl.run("save", how, str(row.domid), str(pipe), timeout=STREAM, give_up=give_up)

    def _go_on(self, uuid: str) -> None:
        """What failed leaves the domain running: it ran before, and nobody else acted on it."""
        try:
            row = self._host.row(uuid)
            if state(row) is DomainState.PAUSED:
                self._host.xl.run("unpause", str(row.domid))
            elif state(row) is not DomainState.RUNNING:
                LOG.error("domain %s was not saved and is left suspended by xl: reset or destroy it", uuid)
        except ToolstackError as exc:
            LOG.warning("domain %s was not saved, and whether it runs on cannot be known: %s", uuid, exc)


def _own_key(row: parsers.Row, record: Record) -> object:
    """What Reeve alone knows of a domain, in the form of `hypervisor.toolstack.stream.config`."""
    run = record.run
    sizes = (row.vcpus, run.effective_max_vcpus, run.memory_mib, run.effective_max_memory_mib)
    return stream_config.write(stream_config.SavedConfig(record.spec, *sizes))[stream_config.KEY]


def _check(file: BinaryIO) -> stream_config.SavedConfig:
    """What an image says of its domain, if it is whole: every record is there, what is in them is Xen's to judge.

    :raises StreamInvalid, StreamUnsupported.
    """
    file.seek(0)
    source = Source.of_file(file)
    saved = stream_config.read(envelope.read_config(source))
    envelope.read_libxl_header(source)
    if _LIBXC.unpack(source.take(_LIBXC.size, "libxc header")) != (libxc.MARKER, libxc.IDENT):
        source.bad("there is no libxc header")
    while True:
        kind, size = _RECORD.unpack(source.take(_RECORD.size, "record header"))
        if kind == 0:
            break
        file.seek(size + -size % 8, os.SEEK_CUR)
        source.position += size + -size % 8
    envelope.read_end(source)
    return saved


@contextlib.contextmanager
def _appearing(path: str) -> Iterator[BinaryIO]:
    """A new file that is there when it is whole. :raises HostFailure: it cannot be written."""
    part = f"{path}.part"
    try:
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w+b") as file:
            yield file
            _sync(file)
        os.link(part, path)
    except OSError as exc:
        raise HostFailure(f"save file {path} cannot be written: {exc.strerror}: give another") from exc
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _piped(path: Path, file: BinaryIO, own: object) -> Iterator[Path]:
    """A pipe by name; what is written to it is in the file at the end. :raises OSError, StreamInvalid."""
    path.unlink(missing_ok=True)  # of one that died
    os.mkfifo(path, 0o600)
    try:
        copy = _Copy(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), file, own)
        try:
            yield path
        finally:
            copy.end()
        if copy.failed is not None:
            raise copy.failed
    finally:
        path.unlink(missing_ok=True)


class _Copy:
    """Copies from a pipe to a file, in a thread. After a failure it takes what comes and drops it.

    For who writes must end as if all was well: ``xl save`` resumes its domain only then for sure.
    """

    def __init__(self, pipe: int, file: BinaryIO, own: object) -> None:
        self._pipe, self._file, self._own = pipe, file, own
        self._ended = threading.Event()
        self.failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="xl-save", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Who writes has ended: what is in the pipe still is copied."""
        self._ended.set()
        self._thread.join()
        os.close(self._pipe)

    def _run(self) -> None:
        try:
            source = Source(self._read)
            config = envelope.read_config(source)
            self._file.write(envelope.header({**config, stream_config.KEY: self._own}))
            while data := self._read(_STEP):
                self._file.write(data)
        except (OSError, ToolstackError) as exc:
            self.failed = exc
            while self._read(_STEP):
                pass

    def _read(self, size: int) -> bytes:
        """Nothing once the other end was closed, or never opened by one that has ended."""
        while True:
            ended = self._ended.is_set()  # before the look: what it wrote is there then
            try:
                data = os.read(self._pipe, size)
            except BlockingIOError:
                if ended:
                    return b""  # a child that outlived it holds the pipe
                select.select([self._pipe], [], [], 0.2)
                continue
            if data or ended:
                return data
            self._ended.wait(0.02)  # nobody has opened it yet, or all was read: its end is told
