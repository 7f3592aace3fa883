"""A Debian root file system as cloud images have it: its own kernel, GRUB configuration, systemd, OpenSSH, cloud-init.

Made by mmdebstrap from Debian's mirror (some minutes), kept below the user's cache folder until the recipe or the month
changes. As root, or where unprivileged user namespaces and fakeroot are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGES = (
    "linux-image-amd64,systemd-sysv,openssh-server,cloud-init,udev,iproute2,netbase,ifupdown,isc-dhcp-client,"
    "iputils-ping,kmod,dbus,fio,stress,e2fsprogs,sudo"
)
SIZE = "1500M"
TOOLS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "qemu-img": "qemu-utils"}
SECONDS = 1500

# Few modules in the initramfs, no drivers of real hardware and no documentation on the disk.
EARLY = r"""#!/bin/sh
set -e
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/etc/dpkg/dpkg.cfg.d"
echo MODULES=list >"$1/etc/initramfs-tools/conf.d/few"
printf 'xen-blkfront\nvirtio_blk\nvirtio_pci\nvirtio_net\next4\n' >"$1/etc/initramfs-tools/modules"
for path in '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/lib/modules/*/kernel/sound/*' \
    '/lib/modules/*/kernel/drivers/gpu/*' '/lib/modules/*/kernel/drivers/media/*' \
    '/lib/modules/*/kernel/drivers/net/wireless/*' '/lib/modules/*/kernel/drivers/net/ethernet/*'; do
    echo "path-exclude=$path"
done >"$1/etc/dpkg/dpkg.cfg.d/small"
"""

LATE = r"""#!/bin/sh
set -e
mkdir -p "$1/boot/grub" "$1/dev"
cat >"$1/boot/grub/grub.cfg" <<'END'
set timeout=0
menuentry Debian {
    linux /vmlinuz root=/dev/xvda ro console=hvc0 quiet loglevel=4 net.ifnames=0
    initrd /initrd.img
}
END
echo '/dev/xvda / ext4 errors=panic 0 1' >"$1/etc/fstab"
echo 'datasource_list: [NoCloud, ConfigDrive, None]' >"$1/etc/cloud/cloud.cfg.d/90_datasource.cfg"
# Linux leaves it to udev to bring an added vCPU of a PV guest online.
echo 'SUBSYSTEM=="cpu", ACTION=="add", ATTR{online}="1"' >"$1/etc/udev/rules.d/90-vcpus.rules"
# What a test does not look at and an emulated CPU takes its time for; and time enough for the rest.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer logrotate.timer systemd-tmpfiles-clean.timer getty@tty1.service getty-static.service \
    systemd-pstore.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount systemd-timesyncd.service \
    sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount dev-mqueue.mount; do
    ln -sf /dev/null "$1/etc/systemd/system/$unit"
done
mkdir -p "$1/etc/systemd/system.conf.d" "$1/etc/systemd/journald.conf.d"
printf '[Manager]\nDefaultTimeoutStartSec=900\nDefaultDeviceTimeoutSec=900\n' >"$1/etc/systemd/system.conf.d/slow.conf"
printf '[Journal]\nStorage=volatile\n' >"$1/etc/systemd/journald.conf.d/small.conf"
rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin
"""


class RootImageMissing(Exception):
    """It cannot be made here; the text says what is missing."""


def root_image(cache: Path | None = None) -> Path:
    """The raw ext4 image, read-only for its users: put an overlay on it. :raises RootImageMissing."""
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "root-images"
    recipe = hashlib.sha256("\0".join((PACKAGES, SIZE, EARLY, LATE, time.strftime("%Y-%m"))).encode()).hexdigest()[:16]
    path = folder / f"debian-{recipe}.img"
    if not path.exists():
        for tool, package in TOOLS.items():
            if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
                raise RootImageMissing(f"{tool} is not installed: apt-get install {package}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            _make(Path(name), path)
    return path


def _make(folder: Path, path: Path) -> None:
    hooks = []
    for name, kind, text in (("early", "essential", EARLY), ("late", "customize", LATE)):
        script = folder / name
        script.write_text(text)
        script.chmod(0o755)
        hooks.append(f"--{kind}-hook={script}")
    tar, tree, image = folder / "root.tar", folder / "tree", folder / "root.img"
    tree.mkdir()
    options = ["--variant=minbase", "--format=tar", "--quiet", f"--include={PACKAGES}", '--aptopt=Acquire::Retries "3"']
    _run(["mmdebstrap", *options, *hooks, "bookworm", str(tar)])
    # Owners survive the way through a folder only as root, or as fakeroot remembers them.
    script = (
        'tar -C "$1" -xf "$2" && mkdir -p "$1/dev" && PATH=$PATH:/usr/sbin:/sbin mke2fs -q -F -t ext4 -d "$1" "$3" "$4"'
    )
    command = ["sh", "-c", script, "sh", str(tree), str(tar), str(image), SIZE]
    _run(command if os.geteuid() == 0 else ["fakeroot", *command])
    image.rename(path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise RootImageMissing(f"{command[0]}: {exc}") from exc
    if done.returncode:
        raise RootImageMissing(f"{command[0]} ended with {done.returncode}: {done.stderr[-1500:]}")


def overlay(base: Path, path: Path) -> Path:
    """A qcow2 image at `path` that leaves `base` as it is."""
    _run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(path)])
    return path
