"""What the host process is told, apart from where it was told it (`hypervisor.host.conf`)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

REAL_RUNTIME = "hypervisor.host.pv_runtime:PvRuntime"


@dataclasses.dataclass(frozen=True, slots=True)
class HostSettings:
    """
    :ivar state_dir: everything that is kept; one host process at a time.
    :ivar socket: control socket; `xenstored_socket` the one of Debian's xenstore tools.
    :ivar memory_mib: what domains may use altogether, MiB; 0 for `memory_share` per cent of what is available.
    :ivar cpus: host CPUs that vCPUs may run on; 0 for all that this process may use.
    :ivar sandbox: ``required`` or ``auto``.
    :ivar build_timeout: seconds in which a domain must be built.
    :ivar console_log_kib: of console output kept for each domain, twice.
    :ivar restart_interval: seconds a domain must have run before it is restarted at once.
    :ivar cache_dir: unpacked kernels.
    :ivar fast_path: of `hypervisor.native.MODES`: plain traps of guests by compiled code.
    :ivar cpu_policy: what new domains may know of their processors (`hypervisor.cpu.policy`).
    :ivar driver_log_kib: what a driver process may write into its log.
    :ivar image_folders: below which images of disks must lie; empty: the folders that the option's help names.
    :ivar shared_folders: the same storage on all hosts, at the same path.
    :ivar migration_address: on which movers of other hosts are awaited; `migration_name` under which they know it (and
        its certificate does), "" for the address; `migration_ports` first and last port, 0 and 0 for any.
    :ivar migration_ca: PEM file with what other hosts' certificates must be signed by; `migration_certificate` and
        `migration_key` this host's own. "": this host takes part in no migration.
    :ivar device_backends: ``module:attribute`` by kind of device, instead of `hypervisor.devices.registry`'s.
    """

    state_dir: Path
    socket: Path
    xenstored_socket: Path
    memory_mib: int = 0
    memory_share: int = 90
    cpus: int = 0
    sandbox: str = "auto"
    build_timeout: float = 60.0
    console_log_kib: int = 1024
    restart_interval: float = 1.0
    max_clients: int = 64
    cache_dir: str = ""
    engine: str = ""
    linear_page_tables: bool = False
    fast_path: str = "auto"
    cpu_policy: str = "engine"
    driver_log_kib: int = 4096
    image_folders: tuple[str, ...] = ()
    shared_folders: tuple[str, ...] = ()
    device_backends: tuple[tuple[str, str], ...] = ()
    migration_address: str = "127.0.0.1"
    migration_name: str = ""
    migration_ports: tuple[int, int] = (0, 0)
    migration_ca: str = ""
    migration_certificate: str = ""
    migration_key: str = ""
    runtime: str = REAL_RUNTIME
    networks: tuple[str, ...] = ("default user",)
    log_level: int = 20

    @property
    def migration_files(self) -> tuple[str, ...]:
        """Authority's certificate, own certificate, own key; empty: this host is not set up for migration."""
        files = (self.migration_ca, self.migration_certificate, self.migration_key)
        return files if all(files) else ()

    @property
    def can_migrate(self) -> bool:
        return bool(self.migration_files)

    @property
    def effective_cpus(self) -> int:
        return self.cpus or len(os.sched_getaffinity(0))


def available_mib(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable of the host, MiB."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
