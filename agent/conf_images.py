"""The options of the group ``[images]`` about images that are fetched; `agent.conf` has those of the image store."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oslo_config import cfg

from agent import conf_keystone
from agent.errors import ConfigError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

OPTIONS = (
    cfg.StrOpt(
        "cache-dir",
        sample_default="/var/lib/reeve/image-cache",
        help="Folder of fetched images. It must lie below one of the folders from which reeve-hypervisor takes images "
        "(image_folders). Default: image-cache/ in state_dir.",
    ),
    cfg.StrOpt(
        "disk-dir",
        sample_default="/var/lib/reeve/guest-disks",
        help="Folder of the disks and kernels that domains have from fetched images; the same holds for it, and it is "
        "best on the file system of cache_dir. Default: guest-disks/ in state_dir.",
    ),
    cfg.IntOpt(
        "cache-max-mib",
        default=102400,
        min=1,
        help="Most that fetched images and downloads under way may take in cache_dir, MiB. The least recently used go "
        "first; never one that is pinned or in use.",
    ),
    cfg.StrOpt(
        "disk-mode",
        default="overlay",
        choices=[
            ("overlay", "a qcow2 overlay on the cached image, which stays while the disk is there"),
            ("copy", "a copy of its own, in the image's format"),
        ],
        help="What a disk from a fetched image becomes, unless its source says so itself.",
    ),
    cfg.ListOpt(
        "allowed-schemes",
        default=["https"],
        help="Schemes of URLs that instructions may name and redirects may lead to: https, http.",
    ),
    cfg.ListOpt(
        "allowed-hosts",
        default=["*"],
        help="Hosts of those URLs: names or addresses, with * as a wildcard and perhaps a port, like "
        "*.example.org,mirror:8080. Glance's and Keystone's configured URLs need no place here.",
    ),
    cfg.ListOpt(
        "allowed-networks",
        default=[],
        help="Addresses that may be connected to although they are loopback, link-local, multicast or otherwise "
        "special, like 127.0.0.1/32. All others may be, if allowed_hosts has the host.",
    ),
    cfg.BoolOpt(
        "require-hash",
        default=True,
        help="Fetch only what a hash (SHA-2, SHA-3, BLAKE2) is known of: from the instruction or from Glance. Without "
        "one a server is trusted as far as TLS goes.",
    ),
    cfg.IntOpt("max-image-mib", default=51200, min=1, help="Largest file that is fetched as a disk, MiB."),
    cfg.IntOpt("max-disk-mib", default=1 << 20, min=1, help="Largest disk that a fetched image may hold, MiB."),
    cfg.IntOpt("max-kernel-mib", default=256, min=1, max=512, help="Largest kernel or ramdisk that is fetched, MiB."),
    cfg.IntOpt(
        "max-unpacked-kernel-mib", default=512, min=1, max=512, help="Most that a fetched kernel unpacks to, MiB."
    ),
    cfg.IntOpt("downloads", default=4, min=1, max=64, help="Images fetched at the same time, at most."),
    cfg.FloatOpt("connect-seconds", default=10.0, min=0.1, help="How long a connection may take to come about."),
    cfg.FloatOpt("answer-seconds", default=30.0, min=0.1, help="How long a server may take for its answer's headers."),
    cfg.FloatOpt(
        "stall-seconds",
        default=30.0,
        min=0.1,
        help="A download that is slower than min_bytes_per_second for so long is broken off and resumed.",
    ),
    cfg.IntOpt("min-bytes-per-second", default=4096, min=1, help="See stall_seconds."),
    cfg.FloatOpt("fetch-seconds", default=7200.0, min=1, help="How long one image may take in all, with all retries."),
    cfg.IntOpt("retries", default=5, min=0, max=100, help="How often a download that breaks off is resumed."),
    cfg.IntOpt(
        "keep-partial-seconds",
        default=86400,
        min=0,
        help="How old a download that was broken off may be to be resumed; older ones are removed.",
    ),
    cfg.StrOpt("proxy", default="", secret=True, help="HTTP proxy for all of this: http://[user:password@]host:port."),
    cfg.StrOpt(
        "ca-file", default="", help="Certificates of authorities to trust instead of the usual ones, a PEM file."
    ),
    cfg.StrOpt(
        "glance-url",
        default="",
        help="Glance, without /v2: https://glance:9292. Default: what Keystone's catalogue says; without both "
        "there is no Glance.",
    ),
    *conf_keystone.options("Glance", project_name="", without="Glance is asked without a token"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageSettings(conf_keystone.KeystoneSettings):
    """The part of the group ``[images]`` about fetched images. Times in seconds, sizes in MiB."""

    cache_dir: Path
    disk_dir: Path
    cache_max_mib: int = 102400
    disk_mode: str = "overlay"
    allowed_schemes: tuple[str, ...] = ("https",)
    allowed_hosts: tuple[str, ...] = ("*",)
    allowed_networks: tuple[Network, ...] = ()
    require_hash: bool = True
    max_image_mib: int = 51200
    max_disk_mib: int = 1 << 20
    max_kernel_mib: int = 256
    max_unpacked_kernel_mib: int = 512
    downloads: int = 4
    connect_seconds: float = 10.0
    answer_seconds: float = 30.0
    stall_seconds: float = 30.0
    min_bytes_per_second: int = 4096
    fetch_seconds: float = 7200.0
    retries: int = 5
    keep_partial_seconds: int = 86400
    proxy: str = dataclasses.field(default="", repr=False)
    ca_file: str = ""
    glance_url: str = ""


def settings(values: Mapping[str, Any], state_dir: Path) -> ImageSettings:
    """:raises ConfigError: a value that cannot be one."""
    made = {name: values[name] for name in (field.name for field in dataclasses.fields(ImageSettings))}
    for name, default in (("cache_dir", "image-cache"), ("disk_dir", "guest-disks")):
        made[name] = Path(values[name] or state_dir / default).absolute()
    for name in ("allowed_schemes", "allowed_hosts"):
        made[name] = tuple(item.lower() for item in values[name])
    if unknown := set(made["allowed_schemes"]) - {"http", "https"}:
        raise ConfigError(f"[images] allowed_schemes: {min(unknown)!r} is not known: give http or https")
    try:
        made["allowed_networks"] = tuple(ipaddress.ip_network(item) for item in values["allowed_networks"])
    except ValueError as exc:
        raise ConfigError(f"[images] allowed_networks: {exc}: give networks like 127.0.0.1/32") from exc
    for name in ("proxy", "glance_url", "auth_url"):
        conf_keystone.check_url("images", name, values[name])
    if values["ca_file"] and not Path(values["ca_file"]).is_file():
        raise ConfigError(f"[images] ca_file {values['ca_file']} is not there: give a PEM file")
    found = ImageSettings(**made)
    if found.auth_url and not found.credential:
        raise ConfigError("[images] auth_url is given and no credential: give username or application_credential_id")
    return found
