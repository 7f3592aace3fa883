"""Options of the host process, for ``reeve-hypervisor`` and its sample configuration."""

from __future__ import annotations

import logging
from pathlib import Path

from oslo_config import cfg, types

from hypervisor.cpu import policy
from hypervisor.errors import SpecInvalid
from hypervisor.host import protocol
from hypervisor.host.settings import REAL_RUNTIME, HostSettings

GROUP = "hypervisor"


class CpuPolicyType(types.String):
    """A level and features, checked when the configuration is read."""

    def __call__(self, value: object) -> str:
        text = str(super().__call__(value))
        try:
            policy.Choice.parse(text)
        except SpecInvalid as exc:
            raise ValueError(str(exc)) from exc
        return text


class PortRangeType(types.String):
    """``first-last`` or one port; checked when the configuration is read."""

    def __call__(self, value: object) -> str:
        text = str(super().__call__(value))
        first, last = port_range(text)
        if not 0 <= first <= last <= 65535 or (first == 0) != (last == 0):
            raise ValueError(f"{text!r} is no range of ports: give two like 49152-49215, or 0")
        return text


def port_range(text: str) -> tuple[int, int]:
    """:raises ValueError: it is none."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


OPTIONS = [
    cfg.StrOpt(
        "state_dir",
        sample_default="/var/lib/reeve/hypervisor",
        help="Folder of everything that is kept: domain records, console logs, xenstore. One host process at a time "
        "uses it. Default: /var/lib/reeve/hypervisor for root, $XDG_STATE_HOME/reeve/hypervisor for others.",
    ),
    cfg.StrOpt(
        "socket",
        sample_default="/run/reeve/hypervisor.sock",
        help="Control socket. Default: /run/reeve/hypervisor.sock for root, $XDG_RUNTIME_DIR/reeve/hypervisor.sock for "
        "others; hypervisor.sock in the state folder if that was given with --state-dir.",
    ),
    cfg.StrOpt(
        "xenstored_socket",
        sample_default="/var/lib/reeve/hypervisor/xenstored.sock",
        help="Socket for xenstore-ls, xenstore-read and the like: export XENSTORED_PATH with it. "
        "Default: xenstored.sock in the state folder.",
    ),
    cfg.IntOpt(
        "memory_mib",
        default=0,
        min=0,
        help="Memory that all domains may use together, MiB. 0: memory_share per cent of what is available at start.",
    ),
    cfg.IntOpt(
        "memory_share", default=90, min=1, max=100, help="Per cent of the available memory, if memory_mib is 0."
    ),
    cfg.IntOpt("cpus", default=0, min=0, max=4096, help="Host CPUs that vCPUs may run on. 0: all of this process."),
    cfg.StrOpt(
        "sandbox",
        default="auto",
        choices=[
            ("auto", "run with what the kernel has, and warn if seccomp is missing"),
            ("required", "make no domain without seccomp"),
        ],
        help="What a domain process must give up before guest code runs.",
    ),
    cfg.FloatOpt("build_timeout", default=60.0, min=1.0, help="Seconds in which a domain must be built."),
    cfg.IntOpt(
        "console_log_kib",
        default=1024,
        min=4,
        max=1 << 20,
        help="Console output kept for each domain, KiB, in each of two files.",
    ),
    cfg.FloatOpt(
        "restart_interval",
        default=1.0,
        min=0.0,
        help="A domain that ends by itself sooner than so many seconds after its start is not restarted before they "
        "have passed.",
    ),
    cfg.IntOpt("max_clients", default=64, min=1, max=4096, help="Connections to the control socket at once."),
    cfg.StrOpt(
        "cache_dir",
        sample_default="/var/lib/reeve/hypervisor/cache",
        help="Unpacked kernels. Default: cache in the state folder.",
    ),
    cfg.StrOpt(
        "engine", default="", help="Engine of new domains, a name of the group reeve.engines; empty: the default."
    ),
    cfg.BoolOpt(
        "linear_page_tables",
        default=False,
        help="Let guests point a page table to one of its own level, as some old kernels do (Xen's pv-linear-pt).",
    ),
    cfg.StrOpt(
        "fast_path",
        default="auto",
        choices=[
            ("auto", "by compiled code where there is some, in Python otherwise"),
            ("on", "by compiled code; make no domain without"),
            ("off", "in Python"),
        ],
        help="How the plainest traps of 64-bit guests are handled: system calls of programs, returns, page faults.",
    ),
    cfg.IntOpt(
        "driver_log_kib",
        default=4096,
        min=4,
        max=1 << 20,
        help="What a driver process of a domain's disks or nics may write into its log, KiB; one older log is kept.",
    ),
    cfg.ListOpt(
        "image_folders",
        default=[],
        sample_default=[f"/var/lib/reeve/{name}" for name in ("images", "config-drives", "image-cache", "guest-disks")],
        help="Folders below which images of disks and their backing files must lie; block devices, too (/dev/vg0). "
        "Default: images in the state folder, and images, config-drives, image-cache and guest-disks beside it if the "
        "state folder is called hypervisor.",
    ),
    cfg.ListOpt(
        "shared_folders",
        default=[],
        sample_default=["/srv/images"],
        help="Folders that are the same storage on all hosts, at the same path, as of an NFS server: disks below them "
        "stay where they are when their domain moves to another host. They must lie in image_folders, too.",
    ),
    cfg.DictOpt(
        "device_backends",
        default={},
        advanced=True,
        help="module:attribute of the back end of a kind of device, as in disk:module:attribute; tests put their own.",
    ),
    cfg.MultiStrOpt(
        "networks",
        default=["default user"],
        help="A network that nics may name, one a line: NAME internal (between domains of this host only); NAME tap "
        "interface=TAP [bridge=BRIDGE | ovs=BRIDGE] [offload=no] (needs CAP_NET_ADMIN, or a TAP made before with "
        "vnet_hdr for this user); NAME user [cidr=10.0.2.0/24] [forward=tcp:127.0.0.1:2222-10.0.2.15:22 ...] "
        "[host_loopback=yes] [mtu=1500] [dns=no] [ipv6=yes] (to the outside by slirp4netns, without privileges).",
    ),
    cfg.Opt(
        "cpu_policy",
        type=CpuPolicyType(),
        default=policy.DEFAULT,
        help="What new domains may know of their processors: a level (engine for all that there is, x86-64, x86-64-v2, "
        "x86-64-v3), then features to add or to take away, as in x86-64-v2,+aes,-popcnt. Hosts between which domains "
        "move should have the same. A domain that the engine cannot give its level is not made.",
    ),
    cfg.StrOpt(
        "migration_address",
        default="127.0.0.1",
        help="Address of this host on which domains arrive that move here from other hosts; each brings a connection.",
    ),
    cfg.StrOpt(
        "migration_name",
        default="",
        sample_default="node1.example.org",
        help="What other hosts connect to, a name or an address that stands in this host's certificate. "
        "Default: migration_address.",
    ),
    cfg.Opt(
        "migration_ports",
        type=PortRangeType(),
        default="0",
        sample_default="49152-49215",
        help="Ports on which domains arrive, first-last: as many can arrive at once. 0: any free port.",
    ),
    cfg.StrOpt(
        "migration_ca",
        default="",
        sample_default="/etc/reeve/tls/ca.pem",
        help="PEM file of the authority that signs the certificates of all hosts between which domains move. Without "
        "it, certificate and key this host takes part in no migration.",
    ),
    cfg.StrOpt(
        "migration_certificate",
        default="",
        sample_default="/etc/reeve/tls/host.pem",
        help="PEM file of this host's certificate, for client and server, and of what lies between it and the "
        "authority's. It is read anew for each migration.",
    ),
    cfg.StrOpt(
        "migration_key",
        default="",
        sample_default="/etc/reeve/tls/host.key",
        help="PEM file of the certificate's key, readable for the host process's user only.",
    ),
    cfg.StrOpt(
        "runtime",
        default=REAL_RUNTIME,
        advanced=True,
        help="module:attribute of what runs in a domain process; tests put a scripted guest here.",
    ),
    cfg.StrOpt("log_level", default="info", choices=["debug", "info", "warning", "error"], help="What is logged."),
]

CLI_OPTIONS = [
    cfg.StrOpt("state-dir", metavar="DIR", help="State folder; overrides state_dir of the configuration file."),
    cfg.StrOpt("socket", metavar="PATH", help="Control socket; overrides socket of the configuration file."),
    cfg.IntOpt("memory-mib", min=1, metavar="MIB", help="Memory for all domains; overrides memory_mib."),
    cfg.BoolOpt("debug", default=False, help="Log everything."),
]


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]


def register(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(OPTIONS, group=GROUP)
    conf.register_cli_opts(CLI_OPTIONS)


def settings(conf: cfg.ConfigOpts) -> HostSettings:
    """From parsed options."""
    group = conf[GROUP]
    state_dir = Path(conf.state_dir or group.state_dir or protocol.default_state_dir())
    if conf.socket or group.socket:
        socket = Path(conf.socket or group.socket)
    else:
        socket = state_dir / protocol.SOCKET_NAME if conf.state_dir else protocol.default_socket()
    return HostSettings(
        state_dir=state_dir,
        socket=socket,
        xenstored_socket=Path(group.xenstored_socket or state_dir / "xenstored.sock"),
        memory_mib=conf.memory_mib or group.memory_mib,
        memory_share=group.memory_share,
        cpus=group.cpus,
        sandbox=group.sandbox,
        build_timeout=group.build_timeout,
        console_log_kib=group.console_log_kib,
        restart_interval=group.restart_interval,
        max_clients=group.max_clients,
        cache_dir=group.cache_dir or str(state_dir / "cache"),
        engine=group.engine,
        linear_page_tables=group.linear_page_tables,
        fast_path=group.fast_path,
        cpu_policy=group.cpu_policy,
        driver_log_kib=group.driver_log_kib,
        image_folders=tuple(group.image_folders),
        shared_folders=tuple(group.shared_folders),
        migration_address=group.migration_address,
        migration_name=group.migration_name,
        migration_ports=port_range(group.migration_ports),
        migration_ca=group.migration_ca,
        migration_certificate=group.migration_certificate,
        migration_key=group.migration_key,
        device_backends=tuple(sorted(group.device_backends.items())),
        runtime=group.runtime,
        networks=tuple(group.networks),
        log_level=logging.DEBUG if conf.debug else getattr(logging, group.log_level.upper()),
    )
