"""A Debian disk as a cloud has it: made by an instruction, boots by PV-GRUB with its own kernel, configures itself from
its config drive, answers SSH from the host, reboots, grows and shrinks while it works.

Needs Debian's mirror, mmdebstrap, qemu-utils, slirp4netns, grub-xen-host and an SSH client. REEVE_KILLS says how often
the driver of its disks is killed (10; the whole is 100), REEVE_HOTPLUGS how often a disk comes and goes meanwhile (2;
the whole is 20).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess
from root_image import RootImageMissing, overlay, root_image

from agent.configdrive import Drives
from agent.configdrive.request import drive_files, first_boot
from agent.rpc.client import Client
from hypervisor.toolstack.api import DomainSpec, DomainState, Toolstack
from hypervisor.toolstack.devices import DeviceInfo, DeviceState

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from run_xtf import _connect, _stop  # the same start and stop as the other guests' host

GRUB = Path("/usr/lib/grub-xen/grub-x86_64-xen.bin")
KILLS = int(os.environ.get("REEVE_KILLS") or 10)
HOTPLUGS = int(os.environ.get("REEVE_HOTPLUGS") or 2)
BOOT_SECONDS = 900.0
STEP_SECONDS = 240.0
MAC = "00:16:3e:aa:00:01"
# What a first boot does for a general cloud and takes minutes here: keys of all kinds, locales, package sources.
USER_DATA = """#cloud-config
ssh_genkeytypes: [ed25519]
locale: false
cloud_init_modules: [migrator, seed_random, set_hostname, update_hostname, users_groups, ssh]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts_user]
growpart: {mode: 'off'}
users: [default]
runcmd: [[touch, /var/lib/first-boot-is-over]]
"""

pytestmark = pytest.mark.timeout(2400)


def missing(text: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(text)
    pytest.skip(text)


@dataclasses.dataclass
class Guest:
    """A domain that answers SSH."""

    toolstack: Toolstack
    client: Client
    spec: DomainSpec
    drive: dict[str, Any]
    key: Path
    port: int

    def ssh(self, command: str, seconds: float = 60.0) -> str:
        """What a command in the guest prints. :raises subprocess.SubprocessError: it failed, or SSH did."""
        return subprocess.run(
            [*self._client(), command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        ).stdout

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._client(), command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _client(self) -> list[str]:
        """One connection for all commands: a handshake takes the guest seconds."""
        control = (f"ControlPath={self.key}.ssh", "ControlMaster=auto", "ControlPersist=600")
        trust = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null")
        options = ("BatchMode=yes", "ConnectTimeout=10", *trust, *control)
        flags = [part for option in options for part in ("-o", option)]
        return ["ssh", "-q", *flags, "-i", str(self.key), "-p", str(self.port), "debian@127.0.0.1"]

    def hang_up(self) -> None:
        """End the connection, which would outlive the guest."""
        subprocess.run([*self._client()[:-1], "-O", "exit", "guest"], capture_output=True, timeout=30, check=False)

    def answers(self) -> bool:
        try:
            return self.ssh("true", 30) == ""
        except subprocess.SubprocessError:
            return False

    def wait(self, what: str, ready: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready():
            state = self.toolstack.get_domain(self.spec.uuid).state
            log = self.toolstack.console_log(self.spec.uuid, 8000).decode(errors="replace")
            assert state not in (DomainState.CRASHED, DomainState.SHUTDOWN), f"{state}\n{log}"
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}\n{log}"
            time.sleep(0.5)  # a poll with a deadline

    def number(self, command: str) -> int:
        try:
            return int(self.ssh(command))
        except (subprocess.SubprocessError, ValueError):
            return -1


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def base() -> Path:
    for tool, package in (("ssh", "openssh-client"), ("slirp4netns", "slirp4netns")):
        if shutil.which(tool) is None:
            missing(f"{tool} is not installed: apt-get install {package}")
    if not GRUB.is_file():
        missing("no GRUB for PV guests: apt-get install grub-xen-host")
    try:
        return root_image()
    except RootImageMissing as exc:
        missing(f"no Debian root image: {exc}")
        raise


@contextlib.contextmanager
def host(folder: Path, images: list[Path], port: int) -> Iterator[Toolstack]:
    """A host process whose user network leads `port` of the loopback address to the guest's SSH."""
    config, sock, log = folder / "hypervisor.conf", folder / "sock", folder / "host.log"
    config.write_text(
        f"[hypervisor]\ncpus = 8\nimage_folders = {','.join(map(str, images))}\n"
        f"networks = default user forward=tcp:127.0.0.1:{port}-10.0.2.15:22\n"
    )
    program = shutil.which("reeve-hypervisor")
    assert program
    state = folder / "state" / "hypervisor"
    command = [program, "--config-file", str(config), "--state-dir", str(state), "--socket", str(sock)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--memory-mib", "2048"], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    toolstack: Toolstack = _connect(sock, process, log)
    try:
        yield toolstack
    finally:
        for info in toolstack.list_domains():
            toolstack.destroy(info.uuid)
        toolstack.close()
        _stop(process)


@pytest.fixture(scope="module")
def guest(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Made and destroyed by instructions; a destroyed one leaves no config drive."""
    folder = tmp_path_factory.mktemp("disk")
    images, port = folder / "images", free_port()
    images.mkdir()
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=60)
    ident = str(uuid.uuid4())
    network = {"nic": 0, "addresses": ["10.0.2.15/24"], "gateways": ["10.0.2.2"], "dns": ["10.0.2.3"]}
    public = key.with_suffix(".pub").read_text().strip()
    args: dict[str, Any] = {
        "uuid": ident,
        "name": "web",
        "loader": "pv-grub",
        "memory_mib": 256,
        "max_memory_mib": 768,
        "max_vcpus": 4,
        "disks": [{"id": "xvda", "path": str(overlay(base, images / "root.qcow2")), "format": "qcow2"}],
        "nics": [{"mac": MAC, "addresses": ["10.0.2.15"]}],
        "config_drive": {"ssh_keys": [public], "user_data": USER_DATA, "networks": [network]},
    }
    agent = AgentProcess(folder, driver=("--driver-name", "embedded", "--driver-socket", str(folder / "sock")))
    drives = folder / "state" / "config-drives"
    with host(folder, [images, base.parent, drives], port) as toolstack:
        agent.start()
        try:
            with agent.client() as client:
                made = client.call("create", args, timeout=120)
                assert made.ok, (made.error, agent.log)
                found = Guest(toolstack, client, toolstack.get_spec(ident), args["config_drive"], key, port)
                try:
                    found.wait("an answer by SSH", found.answers, BOOT_SECONDS)
                    yield found
                finally:
                    found.hang_up()
                assert client.call("destroy", {"uuid": ident}, timeout=120).ok
                assert list(drives.iterdir()) == []
        finally:
            agent.stop()


def test_it_configured_itself(guest: Guest) -> None:
    assert guest.ssh("hostname").strip() == "web"
    assert "10.0.2.15/24" in guest.ssh("ip -4 -br address show dev eth0")
    assert guest.ssh("findmnt -no SOURCE /").strip() == "/dev/xvda"
    assert guest.ssh("cat /sys/hypervisor/uuid").strip() == guest.spec.uuid
    guest.wait("the end of the first boot", lambda: guest.number("ls /var/lib/first-boot-is-over | wc -l") == 1, 300)
    assert b"web login:" in guest.toolstack.console_log(guest.spec.uuid, 1 << 20)


# Work that says when it was disturbed: stress looks at its workers, fio at its checksums.
WORK = (
    "rm -f /tmp/enough; until [ -e /tmp/enough ]; do stress -q --cpu 2 --vm 1 --vm-bytes 48M --timeout 10 || exit 1; "
    "sudo fio --name=work --filename=/var/tmp/work --size=8M --bs=16k --rw=randwrite --direct=1 --ioengine=libaio "
    "--iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=terse || exit 1; done"
)


def test_it_grows_and_shrinks_at_work(guest: Guest) -> None:
    tools, ident = guest.toolstack, guest.spec.uuid

    def resize(**wanted: int) -> None:
        answer = guest.client.call("resize", {"uuid": ident, "wait_seconds": STEP_SECONDS, **wanted}, timeout=600)
        assert answer.ok, answer.error

    def memory() -> int:
        return guest.number("awk '/MemTotal/ {print $2}' /proc/meminfo")

    before = memory()
    load = guest.start(WORK)
    resize(vcpus=4)
    guest.wait("four vCPUs", lambda: guest.number("nproc") == 4, STEP_SECONDS)
    resize(memory_mib=768)
    guest.wait("more memory", lambda: memory() >= before + 480 * 1024, STEP_SECONDS)
    assert load.poll() is None, load.communicate()
    resize(memory_mib=256)
    guest.wait("memory given back", lambda: 0 < memory() <= before + 16 * 1024, STEP_SECONDS)
    assert tools.get_domain(ident).memory_mib <= 260
    resize(vcpus=1)
    guest.wait("one vCPU", lambda: guest.number("nproc") == 1, STEP_SECONDS)
    guest.ssh("touch /tmp/enough")
    out, err = load.communicate(timeout=STEP_SECONDS)
    assert load.returncode == 0, out + err
    trouble = guest.ssh("sudo dmesg --level=emerg,alert,crit,err,warn | grep -E 'WARNING|BUG|Oops|stall|oom' || true")
    assert trouble == ""


def test_its_disk_grows(guest: Guest) -> None:
    size = 2 << 30
    guest.toolstack.resize_disk(guest.spec.uuid, "xvda", size)
    guest.wait("the new size", lambda: guest.number("cat /sys/block/xvda/size") * 512 == size, STEP_SECONDS)
    guest.ssh("sudo resize2fs /dev/xvda", STEP_SECONDS)
    assert guest.number("df --output=size -B1M / | tail -1") > 1800


def driver_process(guest: Guest) -> int | None:
    """Of the guest's disks: known by its name and its log."""
    name = f"reeve-disk{guest.toolstack.get_domain(guest.spec.uuid).domid}"
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().strip() == name and guest.spec.uuid in os.readlink(folder / "fd/1"):
                return int(folder.name)
    return None


def disk(guest: Guest, name: str = "xvda") -> DeviceInfo | None:
    """If it is there and served."""
    found = [item for item in guest.toolstack.list_devices(guest.spec.uuid) if item.id == name]
    return found[0] if found and found[0].state is DeviceState.CONNECTED else None


def storage_daemon(driver: int) -> int:
    """Of the root disk, which is qcow2; `driver` has its log in the folder of the domain."""
    log = Path(os.readlink(f"/proc/{driver}/fd/1"))
    (domains,) = (folder for folder in log.parents if folder.name == "domains")
    (pid,) = domains.parent.glob(f"disks/{log.relative_to(domains).parts[0]}-xvda/pid")
    return int(pid.read_text())


class Kills:
    """Kills of the process that serves the guest's disks, each after the one before was replaced.

    Of the storage daemon behind the root disk as well, each third time.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._before = self._restarts()
        self.done = 0

    def _restarts(self) -> int:
        served = disk(self._guest)
        return served.stats["restarts"] if served else -1

    def another(self) -> None:
        self._guest.wait("the driver's return", lambda: self._restarts() == self._before + self.done, STEP_SECONDS)
        pid = driver_process(self._guest)
        if pid is not None:
            if self.done % 3 == 2:
                with contextlib.suppress(ProcessLookupError):  # it may be starting again
                    os.kill(storage_daemon(pid), signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            self.done += 1


FIO = "--direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --output-format=terse"


def fio_passed(load: subprocess.Popen[str]) -> None:
    out, err = load.communicate(timeout=STEP_SECONDS)
    assert load.returncode == 0, out + err


@pytest.mark.timeout(7200)
def test_fio_verifies_through_kills_and_hotplug(guest: Guest) -> None:
    """It checks what it wrote on the root disk, and on one that comes and goes, while the driver of both is killed,
    and the storage daemon of the first."""
    job = f"sudo fio --name=check --filename=/var/tmp/fio --size=32M --bs=16k --rw=randwrite --loops=2 {FIO}"
    kills = Kills(guest)
    load = guest.start(job)
    for cycle in range(HOTPLUGS):
        wanted = KILLS * (cycle + 1) // HOTPLUGS
        plug(guest)
        try:
            # Each time over what the time before has left, which is verified first.
            passes = [("--rw=read --verify_only",)] * bool(cycle) + [("--rw=randwrite", "--do_verify=1")]
            for words in passes:
                other = guest.start(
                    f"sudo fio --name=plug --filename=/dev/xvdb --size=8M --bs=4k {' '.join(words)} {FIO}"
                )
                while other.poll() is None:
                    if load.poll() is not None:
                        fio_passed(load)
                        load = guest.start(job)
                    if kills.done < wanted:
                        kills.another()
                    else:
                        time.sleep(0.2)  # a poll with fio's end as its deadline
                fio_passed(other)
        finally:
            unplug(guest)
    while kills.done < KILLS:
        if load.poll() is not None:
            fio_passed(load)
            load = guest.start(job)
        kills.another()
    fio_passed(load)
    assert kills.done >= KILLS
    errors = guest.ssh("sudo dmesg --level=emerg,alert,crit,err | grep -iE 'xvd|blkfront|ext4|I/O' || true")
    assert errors == "", errors


def plug(guest: Guest) -> None:
    """A raw disk beside the root image, the same each time."""
    path = Path(guest.spec.disks[0].path).with_name("plug.img")
    if not path.exists():
        path.write_bytes(bytes(16 << 20))
    answer = guest.client.call(
        "attach_disk", {"uuid": guest.spec.uuid, "disk": {"id": "xvdb", "path": str(path)}}, timeout=STEP_SECONDS
    )
    assert answer.ok, answer.error
    guest.wait("the disk in the guest", lambda: guest.number("ls /dev/xvdb | wc -l") == 1, STEP_SECONDS)


def unplug(guest: Guest) -> None:
    args = {"uuid": guest.spec.uuid, "id": "xvdb", "wait_seconds": 120}
    answer = guest.client.call("detach_disk", args, timeout=STEP_SECONDS)
    assert answer.ok and answer.result is not None and not answer.result["forced"], answer.error
    guest.wait(
        "the disk's end in the guest", lambda: guest.number("ls /dev/xvdb 2>/dev/null | wc -l") == 0, STEP_SECONDS
    )


def test_it_survives_a_reboot(guest: Guest) -> None:
    """And configures itself anew, from a drive of the other format, as it is told to forget the first boot."""
    domid = guest.toolstack.get_domain(guest.spec.uuid).domid
    boot = guest.ssh("cat /proc/sys/kernel/random/boot_id")
    rewrite_drive(guest, "changed")
    with contextlib.suppress(subprocess.SubprocessError):
        guest.ssh("sudo cloud-init clean && sudo rm /var/lib/first-boot-is-over && sudo systemctl reboot")
    guest.hang_up()
    guest.wait("a new domid", lambda: guest.toolstack.get_domain(guest.spec.uuid).domid != domid, STEP_SECONDS)
    guest.wait("an answer by SSH", guest.answers, BOOT_SECONDS)
    assert guest.ssh("cat /proc/sys/kernel/random/boot_id") != boot
    assert guest.ssh("hostname").strip() == "changed"
    assert "DataSourceConfigDrive" in guest.ssh("sudo cat /var/lib/cloud/instance/datasource")
    assert "10.0.2.15/24" in guest.ssh("ip -4 -br address show dev eth0")


def rewrite_drive(guest: Guest, hostname: str) -> None:
    """As a create with the format `configdrive` would have written it."""
    folder = Path(guest.spec.disks[1].path).parent
    args = {**guest.drive, "format": "configdrive", "hostname": hostname}
    first = first_boot(args, guest.spec.uuid, guest.spec.name, guest.spec.nics)
    Drives(folder).write(guest.spec.uuid, *drive_files(args, first), "tests")
