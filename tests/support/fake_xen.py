"""Plays a Xen 4.17 machine as ``xl`` shows it, for the xl driver's tests.

`FakeXen.program` is what stands for ``xl``. Domains live here, in memory; their nodes in the xenstored given, as libxl
writes them. What is printed has the forms of the recorded outputs (`SAMPLES`); the columns of ``list -v`` were not
recorded, they follow Xen's ``tools/xl/xl_list.c``. Errors have the words of 4.17 as far as they are known.

Guests do what words of their command line say: ``off``, ``reboot`` (on the first boot), ``crash``; ``deaf``.
Without ``deaf`` a guest answers shutdown, reboot and suspend, and echoes what is typed.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_xen_devices import FakeDevices
from xenstored_thread import Xenstored
from xs_client import XsClient

from hypervisor.toolstack.stream import envelope, libxc
from hypervisor.toolstack.stream.source import Source
from hypervisor.xenstore.wire import Op

SAMPLES = Path(__file__).parent.parent / "unit/hypervisor/toolstack/drivers/xl/samples"
MEMORY, CPUS, BANNER = 1024, 4, b"contract-guest-is-up\r\n"
HEADER = (
    "Name                                        ID   Mem VCPUs\tState\tTime(s)   UUID                            "
    "Reason-Code\tSecurity Label"
)
XENSTORED_UUID = "00000000-0000-0000-0000-000000000000"


class Complaint(Exception):
    """What ``xl`` says on stderr, and its exit status."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


@dataclasses.dataclass(slots=True)
class Domain:
    domid: int
    name: str
    uuid: str
    config: dict[str, Any]
    memory: int
    vcpus: int
    flags: str = "p"  # p, r, s (ended)
    reason: int | None = None
    booted: bool = False
    typed: str = ""
    gone: bool = False
    shown: int = 0  # bytes of its log that a console that comes now does not get
    weight: int = 256
    cap: int = 0

    @property
    def words(self) -> list[str]:
        return str(self.config.get("cmdline", "")).split()


class FakeXen:
    """:param folder: of the socket, the program and the consoles' logs."""

    def __init__(self, folder: Path, xenstored: Xenstored) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.xenstored = folder, xenstored
        self.changed = threading.Condition()
        self.domains: dict[int, Domain] = {}
        self.next = 5
        self.booted: set[str] = set()  # UUIDs whose guest has run
        self.calls: list[list[str]] = []
        self.faults: dict[str, Callable[[list[str]], str]] = {}
        """Of a verb what happens instead: a function of the arguments that returns what is printed, or raises."""
        self.devices = FakeDevices(xenstored.path, self.changed)
        self.program = folder / "xl"
        self._listener = socket.socket(socket.AF_UNIX)
        path = folder / "xl.sock"
        self._listener.bind(str(path))
        self._listener.listen(64)
        text = Path(__file__).with_name("fake_xl.py").read_text()
        self.program.write_text(f"#!{sys.executable} -SI\nMACHINE = {str(path)!r}\n{text}")
        self.program.chmod(0o755)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self.changed:
            self.domains.clear()
            self.changed.notify_all()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self.devices.stop()

    # the program's other end

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError):
            data, files, _, _ = socket.recv_fds(link, 65536, 3)
            try:
                verb, *args = data.decode().split("\0")
                link.send(bytes([self._run(verb, args, files, link)]))
            finally:
                for file in files:
                    os.close(file)

    def _run(self, verb: str, args: list[str], files: list[int], link: socket.socket) -> int:
        self.calls.append([verb, *args])
        try:
            if verb in self.faults:
                text = self.faults[verb](args)
            elif verb == "console":
                self.console(args[0], files, link)
                text = ""
            elif verb == "save":
                self.save(*args, link)
                text = ""
            else:
                with self.changed:
                    text = getattr(self, f"do_{verb.replace('-', '_')}")(*args) or ""
                    self.changed.notify_all()
            os.write(files[1], text.encode())
        except Complaint as exc:
            os.write(files[2], f"{exc}\n".encode())
            return exc.status
        return 0

    # what others do to it

    def find(self, uuid: str) -> Domain:
        with self.changed:
            return next(domain for domain in self.domains.values() if domain.uuid == uuid)

    def free(self) -> int:
        return MEMORY - sum(domain.memory for domain in self.domains.values())

    def end(self, domain: Domain, reason: int) -> None:
        """A guest ends, as SCHEDOP_shutdown does it. Call with `changed` held."""
        domain.flags, domain.reason = "s", reason
        self.devices.run(domain.domid, False)
        self.xenstored.special("@releaseDomain", domain.domid)

    def add(self, config: dict[str, Any], flags: str = "p") -> Domain:
        """Another toolstack's domain, or ``xl create``. Call with `changed` held."""
        domid, self.next = self.next, self.next + 1
        domain = Domain(domid, config["name"], config["uuid"], config, config["memory"], config.get("vcpus", 1), flags)
        domain.weight, domain.cap = config.get("cpu_weight", 256), config.get("cap", 0)
        self.domains[domid] = domain
        domain.shown = self.log_size(domain)
        nodes = {
            "name": domain.name,
            "vm": f"/vm/{domain.uuid}",
            "memory/target": str(domain.memory << 10),
            "memory/static-max": str(config.get("maxmem", domain.memory) << 10),
            "control/shutdown": "",
        }
        with self.store() as store:
            for name, value in nodes.items():
                store.write(f"/local/domain/{domid}/{name}", value)
            store._call(Op.INTRODUCE, f"{domid}\x001\x001\0".encode())
        self.devices.start(domid, config)
        return domain

    @contextlib.contextmanager
    def store(self) -> Any:
        client = XsClient(self.xenstored.path)
        try:
            yield client
        finally:
            client.close()

    # guests

    def log_size(self, domain: Domain) -> int:
        log = self.folder / f"guest-{domain.name}.log"
        return log.stat().st_size if log.exists() else 0

    def print(self, domain: Domain, data: bytes) -> None:
        with (self.folder / f"guest-{domain.name}.log").open("ab") as file:
            file.write(data)
        self.changed.notify_all()

    def go(self, domain: Domain) -> None:
        """The guest does what it can do now."""
        if domain.flags != "r":
            return
        self.devices.run(domain.domid, "deaf" not in domain.words)
        if not domain.booted:
            domain.booted = True
            self.print(domain, BANNER)
            first = domain.uuid not in self.booted
            self.booted.add(domain.uuid)
            for word, reason in (("off", 0), ("reboot", 1), ("crash", 3)):
                if word in domain.words and (first or word != "reboot"):
                    self.end(domain, reason)
        while domain.flags == "r" and "\n" in domain.typed and "deaf" not in domain.words:
            line, _, domain.typed = domain.typed.partition("\n")
            self.print(domain, f"{line}\r\n{line.removeprefix('echo ')}\r\n".encode())

    def ask(self, domain: Domain, reason: int) -> None:
        if domain.flags == "r" and "deaf" not in domain.words:
            self.end(domain, reason)

    # verbs

    def domain(self, domid: str) -> Domain:
        if not domid.isdigit() or int(domid) not in self.domains:
            raise Complaint(f"{domid} is an invalid domain identifier (rc=-6)")
        return self.domains[int(domid)]

    def do_info(self) -> str:
        facts = {"nr_cpus": CPUS, "total_memory": MEMORY, "free_memory": self.free()}
        lines = (SAMPLES / "xl_info.txt").read_text().splitlines()
        keys = [line.partition(":")[0].strip() for line in lines]
        return "".join(
            f"{key:<23}: {facts[key]}\n" if key in facts else line + "\n" for key, line in zip(keys, lines, strict=True)
        )

    def do_list(self, verbose: str) -> str:
        assert verbose == "-v"
        rows = [HEADER, _row("Domain-0", 0, 1024, 2, "r-----", XENSTORED_UUID, "-")]
        for domid, domain in sorted(self.domains.items()):
            ended = f"---s{'-' if domain.reason is None else '-rscw'[domain.reason]}-"
            flags = {"r": "-b----", "p": "--p---", "s": ended}[domain.flags]
            reason = "-" if domain.reason is None else f"{domain.reason:x}"
            rows.append(_row(domain.name, domid, domain.memory, domain.vcpus, flags, domain.uuid, reason))
        return "\n".join(rows) + "\n"

    def do_create(self, *words: str) -> str:
        assert words[:2] == ("-e", "-p"), words
        text = Path(words[2]).read_text()
        config = {key: ast.literal_eval(value) for key, _, value in (x.partition(" = ") for x in text.splitlines())}
        if any(domain.name == config["name"] for domain in self.domains.values()):
            raise Complaint(f"libxl: error: libxl_create.c:1: Domain with name {config['name']} already exists")
        if config["memory"] > self.free():
            raise Complaint("libxl: error: libxl_mem.c:1: failed to free memory for the domain")
        self.add(config)
        return ""

    def do_unpause(self, domid: str) -> None:
        domain = self.domain(domid)
        domain.flags = "r"
        self.go(domain)

    def do_pause(self, domid: str) -> None:
        domain = self.domain(domid)
        domain.flags, domain.shown = "p", self.log_size(domain)
        self.devices.run(domain.domid, False)

    def do_shutdown(self, fallback: str, domid: str) -> None:
        assert fallback == "-F"
        self.ask(self.domain(domid), 0)
        self.changed.notify_all()
        raise Complaint(f"Shutting down domain {domid}", 0)

    def do_reboot(self, fallback: str, domid: str) -> None:
        assert fallback == "-F"
        self.ask(self.domain(domid), 1)
        self.changed.notify_all()
        raise Complaint(f"Rebooting domain {domid}", 0)

    def do_vcpu_set(self, domid: str, vcpus: str) -> None:
        domain = self.domain(domid)
        if int(vcpus) > domain.config.get("maxvcpus", domain.vcpus):
            raise Complaint(f"libxl: error: libxl_domain.c:1: Requested {vcpus} VCPUs, however maxcpus is smaller")
        if "deaf" not in domain.words:
            domain.vcpus = int(vcpus)

    def do_mem_set(self, domid: str, size: str) -> None:
        domain = self.domain(domid)
        assert size.endswith("m"), size
        if "deaf" not in domain.words:
            domain.memory = int(size[:-1])

    def do_sched_credit2(self, *words: str) -> None:
        options = dict(zip(words[::2], words[1::2], strict=True))
        domain = self.domain(options["-d"])
        domain.weight, domain.cap = int(options["-w"]), int(options["-c"])

    def do_destroy(self, domid: str) -> None:
        domain = self.domain(domid)
        domain.gone = True
        del self.domains[domain.domid]
        self.devices.end(domain.domid)
        with self.store() as store:
            store._call(Op.RELEASE, f"{domid}\0".encode())
            store.remove(f"/local/domain/{domid}")

    def save(self, how: str, domid: str, path: str, link: socket.socket) -> None:
        """The file has the layout of real ones (docs/save-format.md), and nothing in it."""
        assert how in ("-c", "-p"), how
        with self.changed:
            domain = self.domain(domid)
            node = f"/local/domain/{domid}/control/shutdown"
            with self.store() as store:
                store.write(node, "suspend")
                if "deaf" not in domain.words:
                    store.write(node, "")
                    domain.flags, domain.reason = "s", 2
        if "deaf" in domain.words:
            select.select([link], [], [])  # until the program is ended
            return
        config = {"c_info": {"type": "pv", "name": domain.name, "uuid": domain.uuid}, "b_info": {}}
        with open(path, "wb") as file:
            file.write(envelope.opening(config) + libxc.header_bytes() + bytes(8) + envelope.closing())
        with self.changed:
            domain.flags, domain.reason = "p" if how == "-p" else "r", None
            domain.shown = self.log_size(domain)
            self.go(domain)
            self.changed.notify_all()
        raise Complaint(f"Saving to {path} new xl format (info 0x3/0x0/{len(str(config))})", 0)

    def do_restore(self, *words: str) -> None:
        assert words[:2] == ("-e", "-p"), words
        with open(words[3], "rb") as file:
            envelope.read_config(Source.of_file(file))
        self.do_create(*words[:3])
        next(reversed(self.domains.values())).booted = True
        said = f"Loading new save file {words[3]} (new xl fmt info 0x3/0x0/1301)"
        raise Complaint(
            f"{said}\n Savefile contains xl domain config in JSON format\nParsing config from {words[2]}", 0
        )

    def do_block_attach(self, domid: str, text: str) -> None:
        self.devices.add_disk(self.domain(domid).domid, text)

    def do_block_list(self, domid: str) -> str:
        """Of a domain that is not there: no rows, and no complaint."""
        lines = [f"{'Vdev':<5} {'BE':<3} {'handle':<6} {'state':<5} {'evt-ch':<6} {'ring-ref':<8} {'BE-path':<30}"]
        for devid, state, path, _ in self.devices.rows(int(domid), "vbd"):
            lines.append(f"{devid:<5} {0:<3} {domid:<6} {state:<5} {-1:<6} {-1:<8} {path:<30}")
        return "\n".join(lines) + "\n"

    def do_block_detach(self, *words: str) -> None:
        *options, domid, vdev = words
        assert options in ([], ["--force"]), words
        devid = 202 << 8 | (ord(vdev[3]) - ord("a")) << 4
        if not self.devices.remove(self.domain(domid).domid, "vbd", devid, force=bool(options)):
            raise Complaint("libxl_device_disk_safe_remove failed.")

    def do_network_attach(self, domid: str, *words: str) -> None:
        self.devices.add_nic(self.domain(domid).domid, list(words))

    def do_network_list(self, domid: str) -> str:
        lines = [(SAMPLES / "xl_network-list_pv1.txt").read_text().rstrip("\n")]
        for devid, state, path, mac in self.devices.rows(int(domid), "vif"):
            lines.append(f"{devid:<3} {0:<2} {mac}{devid:6} {state:>5} {-1:6} {-1:5}/{-1:<11} {path:<30}")
        return "\n".join(lines) + "\n"

    def do_network_detach(self, domid: str, devid: str) -> None:
        """Waits 10 s for the guest, and takes it away whatever it says: `xl` has no gentle way."""
        self.devices.remove(self.domain(domid).domid, "vif", int(devid), force=True)

    def console(self, domid: str, files: list[int], link: socket.socket) -> None:
        """Both directions, until the domain is gone or the program was ended. As Xen's, it reads a terminal only."""
        assert os.isatty(files[0]) and os.isatty(files[1])
        with self.changed:
            domain = self.domain(domid)
            log = self.folder / f"guest-{domain.name}.log"
            log.touch()
            seen = domain.shown  # the console's pty keeps what nobody read; here, since the last pause
        done = threading.Event()

        def type_in() -> None:
            while not done.is_set():
                ready = select.select([files[0], link], [], [])[0]
                data = b""
                if files[0] in ready and link not in ready:
                    with contextlib.suppress(OSError):  # its terminal is gone
                        data = os.read(files[0], 4096)
                with self.changed:
                    if data in (b"", b"\x1d"):
                        done.set()
                    domain.typed += data.decode()
                    self.go(domain)
                    self.changed.notify_all()

        typist = threading.Thread(target=type_in, daemon=True)
        typist.start()
        try:
            while not done.is_set() and not (domain.gone and seen == log.stat().st_size):
                with self.changed:
                    self.changed.wait_for(
                        lambda seen=seen: domain.gone or done.is_set() or log.stat().st_size > seen  # type: ignore[misc]
                    )
                with log.open("rb") as file:
                    file.seek(seen)
                    new = file.read()
                seen += len(new)
                os.write(files[1], new)
        finally:
            done.set()
            with contextlib.suppress(OSError):
                link.send(b"\0")
                link.shutdown(socket.SHUT_RDWR)
            typist.join()


def _row(name: str, domid: int, memory: int, vcpus: int, flags: str, uuid: str, reason: str) -> str:
    return f"{name:<40} {domid:5} {memory:5} {vcpus:5}     {flags}  {0.1:8.1f} {uuid} {reason:>8} {'-':>16}"
