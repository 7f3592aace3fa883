"""What `reeve doctor` looks at on a Xen host, when the driver is xl. None changes anything."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from agent.cli.checks import Finding, Status

XENSTORED = "/run/xenstored/socket"
SECONDS = 3.0


def run_all(settings: Mapping[str, str], proc: Path = Path("/proc")) -> list[Finding]:
    """:param settings: the driver's."""
    return [dom0(proc), toolstack(settings), privileges(settings), xenstored(settings)]


def dom0(proc: Path) -> Finding:
    """xenfs is mounted, and says that this is the control domain."""
    folder = proc / "xen"
    try:
        words = (folder / "capabilities").read_text().split()
    except FileNotFoundError:
        if not folder.is_dir():
            return Finding("dom0", Status.MISSING, f"no {folder}: no Xen below this kernel", "boot Xen's entry")
        cure = "mount -t xenfs xenfs /proc/xen, and add it to /etc/fstab"
        return Finding("dom0", Status.MISSING, f"xenfs is not mounted on {folder}", cure)
    except OSError as exc:
        return Finding("dom0", Status.MISSING, f"{folder}: {exc.strerror}", "run as root, or correct its rights")
    if "control_d" not in words:
        return Finding("dom0", Status.MISSING, "this is a guest of Xen, not its dom0", "run the agent in dom0")
    return Finding("dom0", Status.OK, "the control domain")


def toolstack(settings: Mapping[str, str]) -> Finding:
    name = settings.get("xl") or "xl"
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        cure = "apt-get install xen-utils-4.17, or correct the driver's setting xl"
        return Finding("xl", Status.MISSING, f"{name} is not there, or cannot be run", cure)
    return Finding("xl", Status.OK, found)


def privileges(settings: Mapping[str, str]) -> Finding:
    if os.geteuid() == 0:
        return Finding("privileges", Status.OK, "root")
    prefix = settings.get("prefix", "").split()
    if not prefix:
        cure = "run as root, or set the driver's prefix to sudo -n, with a rule as in docs/xl.md"
        return Finding("privileges", Status.MISSING, "not root, and no prefix: xl would be refused", cure)
    if shutil.which(prefix[0]) is None:
        return Finding("privileges", Status.MISSING, f"{prefix[0]} is not there", f"apt-get install {prefix[0]}")
    return Finding("privileges", Status.OK, f"by {' '.join(prefix)}")


def xenstored(settings: Mapping[str, str]) -> Finding:
    """It takes connections of this user."""
    path = settings.get("xenstore") or XENSTORED
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(SECONDS)
        try:
            link.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            cure = "systemctl start xenstored; if it died, reboot dom0: its guests cannot be reached without it"
            return Finding("xenstored", Status.MISSING, f"{path}: {exc.strerror}: xenstored is down", cure)
        except PermissionError:
            cure = f"run as root, or let this user connect: setfacl -m u:reeve:rw {path}"
            return Finding("xenstored", Status.MISSING, f"{path}: this user may not connect", cure)
        except OSError as exc:
            return Finding("xenstored", Status.MISSING, f"{path}: {exc}", "look at the host: does xenstored hang?")
    return Finding("xenstored", Status.OK, path)
