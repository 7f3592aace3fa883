"""Every option of the agent (oslo.config), its default folders, and the settings they come to.

Read in this order, later ones win: ``/etc/reeve/agent.conf``, for an ordinary user also
``$XDG_CONFIG_HOME/reeve/agent.conf``, then the environment (``OS_GROUP__OPTION``) and the command line.
``etc/reeve/agent.conf.sample`` is generated from here (``oslo-config-generator --namespace reeve.agent``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oslo_config import cfg

from agent import conf_broker, conf_images, conf_observe, conf_oslo, conf_placement, conf_quarantine, conf_signing, wire
from agent.errors import AgentError, ConfigError
from agent.journal.quarantine import Limits
from agent.rpc.tls import BrokerTls

SYSTEM_CONFIG = Path("/etc/reeve/agent.conf")

AGENT = (
    cfg.StrOpt(
        "host",
        sample_default="<the machine's host name>",
        help="Name under which instructions address this node: letters, digits, '.', '_' and '-'. Its queue is "
        "reeve.<host>. Domains stay ours when it changes.",
    ),
    cfg.StrOpt(
        "state-dir",
        sample_default="/var/lib/reeve",
        help="Folder for what must survive a restart: agent/ (journal, lock), broker/ (the folder broker), images/, "
        "config-drives/, image-cache/, guest-disks/. For an ordinary user the default is "
        "$XDG_STATE_HOME/reeve. One agent per folder.",
    ),
    cfg.IntOpt(
        "workers",
        default=8,
        min=1,
        max=256,
        help="Instructions carried out at the same time, at most; those that agents send each other have "
        "workers of their own.",
    ),
    cfg.IntOpt(
        "drain-seconds",
        default=30,
        min=0,
        mutable=True,
        help="After SIGTERM: seconds to wait for running instructions. The rest resumes at the next start.",
    ),
    cfg.IntOpt(
        "unknown-seconds",
        default=300,
        min=1,
        mutable=True,
        help="How long the agent asks again when it cannot see whether an interrupted step has happened, before it "
        "reports instruction.outcome_unknown.",
    ),
    cfg.StrOpt(
        "save-dir",
        sample_default="/var/lib/reeve/saved",
        help="Folder for the files that the verbs save and restore write and read: memory of guests. Default: saved/ "
        "in state_dir.",
    ),
    cfg.StrOpt(
        "core-dir",
        sample_default="/var/lib/reeve/cores",
        help="Folder for the files that the verb dump_core writes: memory of guests. Default: cores/ in state_dir.",
    ),
    cfg.IntOpt(
        "resize-confirm-seconds",
        default=0,
        min=0,
        help="A cold resize that is neither confirmed nor reverted counts as confirmed after so many seconds, unless "
        "its instruction says otherwise; 0: never by itself.",
    ),
    cfg.ListOpt("allowed-verbs", default=[], help="The only verbs this agent carries out; empty for all installed."),
)
JOURNAL = (
    cfg.StrOpt(
        "path",
        sample_default="/var/lib/reeve/agent/journal.sqlite",
        help="The journal's file. Default: agent/journal.sqlite in state_dir.",
    ),
    cfg.IntOpt(
        "keep-seconds",
        default=7 * 86400,
        min=60,
        mutable=True,
        help="How long finished instructions are kept: the same id gets the same answer and is not done again.",
    ),
    cfg.IntOpt(
        "keep-read-seconds",
        default=600,
        min=0,
        mutable=True,
        help="The same for instructions that only read (list, show), which may be many and may be done again.",
    ),
)
LIMITS = (
    cfg.IntOpt(
        "max-message-bytes", default=wire.MAX_BYTES, min=1024, max=64 << 20, help="Largest message accepted, bytes."
    ),
    cfg.IntOpt(
        "max-pending",
        default=1000,
        min=1,
        mutable=True,
        help="Instructions accepted and not finished, at most; further messages wait at the broker.",
    ),
)
DRIVER = (
    cfg.StrOpt("name", default="embedded", help="How domains are run: an entry point of reeve.drivers."),
    cfg.StrOpt(
        "socket",
        sample_default="/run/reeve/hypervisor.sock",
        help="Control socket of reeve-hypervisor, for the embedded driver. Default: the driver's own.",
    ),
    cfg.DictOpt("settings", default={}, help="Further settings of the driver, as key:value,key:value."),
)
IMAGES = (
    cfg.StrOpt(
        "dir",
        sample_default="/var/lib/reeve/images",
        help="The image store: one folder per image with a manifest.json, as `reeve image build` makes it. "
        "Default: images/ in state_dir.",
    ),
    cfg.StrOpt(
        "config-drive-dir",
        sample_default="/var/lib/reeve/config-drives",
        help="Folder for config drives, one file per domain; of this node alone. It must lie below one of the folders "
        "from which reeve-hypervisor takes images (image_folders). Default: config-drives/ in state_dir.",
    ),
    cfg.StrOpt(
        "grub-x86-64",
        default="/usr/lib/grub-xen/grub-x86_64-xen.bin",
        help="GRUB for Xen PV guests of 64 bits: the loader of domains that boot from a disk (Debian: grub-xen-host).",
    ),
    cfg.StrOpt(
        "grub-i386",
        default="/usr/lib/grub-xen/grub-i386-xen.bin",
        help="The same for guests of 32 bits (PAE).",
    ),
)
RESOURCES = (
    cfg.FloatOpt(
        "vcpu-ratio", default=16.0, min=0.1, max=1000, mutable=True, help="vCPUs that may be given per host CPU."
    ),
    cfg.IntOpt("reserved-memory-mib", default=0, min=0, mutable=True, help="Host memory that no domain may have, MiB."),
)
REPORTS = (
    cfg.IntOpt(
        "interval",
        default=60,
        min=1,
        mutable=True,
        help="Seconds between full capacity reports; changes are sent at once.",
    ),
)
GROUPS: Mapping[str, Sequence[cfg.Opt]] = {
    "agent": AGENT,
    "broker": conf_broker.OPTIONS,
    "oslo": conf_oslo.OPTIONS,
    "journal": JOURNAL,
    "limits": LIMITS,
    "driver": DRIVER,
    "images": (*IMAGES, *conf_images.OPTIONS),
    "resources": RESOURCES,
    "reports": REPORTS,
    "placement": conf_placement.OPTIONS,
    "quarantine": conf_quarantine.OPTIONS,
    "signing": conf_signing.OPTIONS,
    "notifications": conf_observe.NOTIFICATIONS,
    "http": conf_observe.HTTP,
    "log": conf_observe.LOGGING,
}


PLUGIN_SETTINGS = (
    "image_dir", "config_drive_dir", "grub_x86_64", "grub_i386", "save_dir", "core_dir", "resize_confirm_seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The options with every default filled in. Times in seconds.

    :ivar files: the configuration files that were read.
    """

    host: str
    state_dir: Path
    workers: int
    drain_seconds: int
    unknown_seconds: int
    allowed_verbs: tuple[str, ...]
    broker_url: str
    broker_tls: BrokerTls
    prefetch: int
    broker_quorum: bool
    poll_seconds: float
    reply_seconds: int
    oslo: conf_oslo.OsloSettings
    journal_path: Path
    keep_seconds: int
    keep_read_seconds: int
    max_message_bytes: int
    max_pending: int
    driver: str
    driver_settings: Mapping[str, str]
    image_dir: Path
    config_drive_dir: Path
    grub_x86_64: Path
    grub_i386: Path
    images: conf_images.ImageSettings
    save_dir: Path
    core_dir: Path
    resize_confirm_seconds: int
    vcpu_ratio: float
    reserved_memory_mib: int
    report_interval: int
    placement: conf_placement.PlacementSettings
    quarantine: Limits
    signing: conf_signing.SigningSettings
    notifications: conf_observe.NotificationSettings
    http: conf_observe.HttpSettings
    log: conf_observe.LogSettings
    files: tuple[str, ...]

    def for_plugins(self) -> dict[str, str]:
        """What plugins may read (`agent.api.Host.settings`)."""
        return {name: str(getattr(self, name)) for name in PLUGIN_SETTINGS}


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """For oslo-config-generator (entry point ``oslo.config.opts``)."""
    return [(group, list(options)) for group, options in GROUPS.items()]


def default_state_dir() -> Path:
    """``/var/lib/reeve`` for root, ``$XDG_STATE_HOME/reeve`` for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/reeve")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "reeve"


def config_files() -> list[str]:
    """The configuration files that exist, in reading order."""
    found = [SYSTEM_CONFIG]
    if os.geteuid() != 0:
        found.append(Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "reeve" / "agent.conf")
    return [str(path) for path in found if os.access(path, os.R_OK)]


def load(
    files: Sequence[str] | None = None,
    argv: Sequence[str] = (),
    *,
    prog: str = "reeve-agent",
    description: str = "",
    epilog: str = "",
) -> Settings:
    """Read files, environment and command line (``--group-option``, ``--config-file``).

    Options marked as mutable may be read again while the agent runs (`agent.reload`).

    :param files: configuration files instead of the usual ones.
    :raises ConfigError: what is wrong and where.
    """
    usual = config_files() if files is None else list(files)
    about = {"prog": prog, "description": description}
    if argv:
        # oslo.config ends the process for a bad value in a file when options are also command line options.
        noise = io.StringIO()
        try:
            with contextlib.redirect_stderr(noise):
                return _settings(_values(argv, usual, cli=True, **about))
        except SystemExit as exc:
            if exc.code != 1:
                sys.stderr.write(noise.getvalue())
                if not exc.code and not noise.getvalue():
                    sys.stdout.write(f"\n{epilog}")  # as it is: the parser would run its lines together
                raise
            cause = " ".join(noise.getvalue().split())
        _values((), usual, cli=False, **about)  # says which file and section, when it is in a file
        raise ConfigError(f"the command line cannot be used: {cause}")
    return _settings(_values((), usual, cli=False, **about))


def values(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Group, option, value, as files and environment say. :raises ConfigError: what is wrong."""
    return _values((), list(files), cli=False, prog="reeve")


def _values(argv: Sequence[str], files: list[str], *, cli: bool, **about: Any) -> dict[str, dict[str, Any]]:
    conf = cfg.ConfigOpts()
    for group, options in GROUPS.items():
        if cli:
            conf.register_cli_opts(options, group=group)
        else:
            conf.register_opts(options, group=group)
    try:
        conf(list(argv), project="reeve", default_config_files=files, default_config_dirs=[], **about)
        # A value is only converted when it is read.
        found = {group: {option.dest: conf[group][option.dest] for option in opts} for group, opts in GROUPS.items()}
        return {**found, "": {"files": conf.config_file or ()}}
    except (cfg.Error, ValueError) as exc:
        raise ConfigError(f"the configuration cannot be used: {' '.join(str(exc).split())}") from exc


def _settings(values: Mapping[str, Mapping[str, Any]]) -> Settings:
    agent, broker, driver = values["agent"], values["broker"], values["driver"]
    state_dir = Path(agent["state_dir"]).expanduser().absolute() if agent["state_dir"] else default_state_dir()
    host = agent["host"] or socket.gethostname()
    try:
        wire.check_host_name(host)
    except AgentError as exc:
        raise ConfigError(f"[agent] host {host!r} is not usable: give letters, digits, '.', '_' or '-'") from exc
    driver_settings = {str(key): str(value) for key, value in driver["settings"].items()}
    if driver["socket"]:
        driver_settings["socket"] = driver["socket"]
    return Settings(
        host=host,
        state_dir=state_dir,
        workers=agent["workers"],
        drain_seconds=agent["drain_seconds"],
        unknown_seconds=agent["unknown_seconds"],
        allowed_verbs=tuple(agent["allowed_verbs"]),
        broker_url=broker["url"] or f"filesystem://{state_dir / 'broker'}",
        broker_tls=conf_broker.tls(broker),
        prefetch=broker["prefetch"],
        broker_quorum=broker["queues"] == conf_broker.QUORUM,
        poll_seconds=broker["poll_seconds"],
        reply_seconds=broker["reply_seconds"],
        oslo=conf_oslo.settings(values["oslo"]),
        journal_path=Path(values["journal"]["path"] or state_dir / "agent" / "journal.sqlite"),
        keep_seconds=values["journal"]["keep_seconds"],
        keep_read_seconds=values["journal"]["keep_read_seconds"],
        max_message_bytes=values["limits"]["max_message_bytes"],
        max_pending=values["limits"]["max_pending"],
        driver=driver["name"],
        driver_settings=driver_settings,
        image_dir=Path(values["images"]["dir"] or state_dir / "images"),
        config_drive_dir=Path(values["images"]["config_drive_dir"] or state_dir / "config-drives"),
        grub_x86_64=Path(values["images"]["grub_x86_64"]),
        grub_i386=Path(values["images"]["grub_i386"]),
        images=conf_images.settings(values["images"], state_dir),
        save_dir=Path(agent["save_dir"] or state_dir / "saved"),
        core_dir=Path(agent["core_dir"] or state_dir / "cores"),
        resize_confirm_seconds=agent["resize_confirm_seconds"],
        vcpu_ratio=values["resources"]["vcpu_ratio"],
        reserved_memory_mib=values["resources"]["reserved_memory_mib"],
        report_interval=values["reports"]["interval"],
        signing=conf_signing.settings(values["signing"], values["journal"]["keep_seconds"]),
        quarantine=conf_quarantine.settings(values["quarantine"], values["limits"]["max_message_bytes"]),
        placement=conf_placement.settings(values["placement"], host),
        notifications=conf_observe.notification_settings(values["notifications"]),
        http=conf_observe.HttpSettings(**values["http"]),
        log=conf_observe.log_settings(values["log"]),
        files=tuple(values[""]["files"]),
    )
