"""The initramfs of our own guest image: busybox, an init script, a shell on the console.

What it promises: a line ``REEVE-GUEST-READY <uptime in seconds>`` on the
console when userspace runs, then an interactive shell with the prompt ``/ # ``
on whatever console the kernel has (hvc0 as a Xen guest, ttyS0 in QEMU).
``control/shutdown`` makes a Xen kernel run /sbin/poweroff or /sbin/reboot; both
act at once. vCPUs that are added come on line.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agent.images.cpio import CpioWriter
from agent.images.errors import ImageError

READY = "REEVE-GUEST-READY"

# Each program started costs an emulated guest milliseconds: so builtins only, but for the three mounts and the shell.
INIT = f"""#!/bin/busybox sh
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root TERM=linux
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
echo 4 >/proc/sys/kernel/printk
read -r up idle </proc/uptime
echo "{READY} $up"
for file in /etc/init.d/*; do
    [ -x "$file" ] && "$file"
done
read -r cpus </sys/devices/system/cpu/possible
if [ "$cpus" != 0 ]; then
    /bin/busybox uevent /etc/cpu-added &
fi
console=console
read -r console </sys/class/tty/console/active
console=/dev/${{console##* }}
[ -c "$console" ] || console=/dev/console
# The kernel waits for no one here: busybox poweroff, reboot and halt signal the first process.
trap '/bin/busybox poweroff -f' USR2
trap '/bin/busybox reboot -f' TERM
trap '/bin/busybox halt -f' USR1
while :; do
    /bin/busybox setsid -c /bin/sh -l <"$console" >"$console" 2>&1 &
    shell=$!
    while kill -0 "$shell" 2>/dev/null; do
        wait "$shell"
    done
done
"""

# The kernel makes a vCPU that is added known; bringing it on line is userspace's, elsewhere a udev rule's.
CPU_ADDED = """#!/bin/busybox sh
[ "$ACTION$SUBSYSTEM" = addcpu ] && echo 1 >"/sys$DEVPATH/online"
"""

_PROFILE = """export PS1='\\w # '
cd /
"""

_APPLETS = """
[ arch ash awk base64 basename blkid cat chgrp chmod chown chroot clear cmp cp cpio cttyhack cut date dd df
diff dirname dmesg du echo egrep env expr false fgrep find free fsck getty grep groups gunzip gzip head
hexdump hostname id ifconfig insmod install ip kill killall less ln ls lsmod md5sum mkdir mkfifo mknod mktemp
modprobe more mount mv nc nohup nproc nslookup od patch pidof ping printf ps pwd readlink realpath renice
reset rm rmdir rmmod route sed seq setsid sh sha1sum sha256sum sha512sum sleep sort stat strings stty sum
swapoff swapon switch_root sync sysctl tac tail tar tee telnet test time timeout top touch tr traceroute true
truncate tty udhcpc umount uname uniq unlink uptime usleep vi watch wc wget which who whoami xargs xxd yes
zcat
"""

_POWER = {
    "poweroff": "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n",
    "reboot": "#!/bin/busybox sh\nexec /bin/busybox reboot -f\n",
    "halt": "#!/bin/busybox sh\nexec /bin/busybox halt -f\n",
}

_DEVICES = {
    "console": (5, 1),
    "tty": (5, 0),
    "null": (1, 3),
    "zero": (1, 5),
    "urandom": (1, 9),
    "kmsg": (1, 11),
    "hvc0": (229, 0),
    "ttyS0": (4, 64),
}


def build_initramfs(busybox: bytes, extra: Iterable[tuple[Path, str]] = ()) -> bytes:
    """An uncompressed cpio archive: what unpacks fastest in a guest.

    :param busybox: a statically linked busybox.
    :param extra: (file on this host, path in the guest); the mode's execute bits are kept. An executable under
        /etc/init.d runs before the shell starts.
    :raises ImageError: a file cannot be read, or its path in the guest is not usable.
    """
    archive = CpioWriter()
    for folder in (
        "proc",
        "sys",
        "dev",
        "tmp",
        "mnt",
        "root",
        "run",
        "bin",
        "sbin",
        "usr/bin",
        "usr/sbin",
        "etc/init.d",
    ):
        archive.directory(folder, 0o1777 if folder == "tmp" else 0o755)
    for device, (major, minor) in _DEVICES.items():
        archive.character_device(f"dev/{device}", major, minor, 0o666 if device in ("null", "zero", "tty") else 0o600)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in _APPLETS.split():
        archive.symlink(f"bin/{applet}", "busybox")
    for command, script in _POWER.items():
        archive.file(f"sbin/{command}", script.encode(), 0o755)
    archive.file("etc/cpu-added", CPU_ADDED.encode(), 0o755)
    archive.file("etc/profile", _PROFILE.encode())
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file("init", INIT.encode(), 0o755)
    for source, target in extra:
        try:
            mode = source.stat().st_mode & 0o755 | 0o644
            archive.file(target, source.read_bytes(), mode)
        except (OSError, ValueError) as exc:
            raise ImageError(f"{source} cannot be added to the image as {target!r}: {exc}") from exc
    return archive.to_bytes()
