"""What leads out of a network: a TAP, or slirp4netns. The host process opens it; the switch gets its descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hypervisor.devices.net.networks import TAP, USER, Forward, NetworkConfig
from hypervisor.errors import HostFailure, NetworkUnknown
from hypervisor.socket_path import short_path

LOG = logging.getLogger(__name__)

PROGRAM = "slirp4netns"
_PATIENCE = 10.0
_STEP = 0.02

# linux/if_tun.h, linux/sockios.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_SIOCGIFINDEX, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCBRADDIF = 0x8933, 0x8913, 0x8914, 0x89A2
_IFF_UP = 1
_IFREQ = "16s24x"


class Uplink:
    """
    :ivar kind: of the switch's port: ``tap``, ``bare-tap`` or ``plain``.
    :ivar fd: kept here, for the switch after this one.
    """

    def __init__(self, kind: str, fd: int, process: subprocess.Popen[bytes] | None = None) -> None:
        self.kind = kind
        self.fd = fd
        self._process = process

    def alive(self) -> bool:
        return self._process is None or self._process.poll() is None

    def let_go(self) -> None:
        """It lives on with the switch."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        self.let_go()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)


async def open_uplink(network: NetworkConfig, folder: Path, lifeline: Callable[[], int]) -> Uplink | None:
    """None for an internal network.

    :param folder: for sockets. :param lifeline: a descriptor whose other end is the switch's: the uplink ends with it.
    :raises NetworkUnknown: it cannot be had on this host as it is configured. :raises HostFailure: it does not start.
    """
    if network.kind == TAP:
        return await asyncio.to_thread(_open_tap, network)
    if network.kind == USER:
        return await _start_slirp(network, folder, lifeline)
    return None


# -- TAP --------------------------------------------------------------------------------------------------------------


def _open_tap(network: NetworkConfig) -> Uplink:
    fd = -1
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        name = network.interface.encode()
        flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if network.offload else 0)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name, flags))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 if network.offload else 0)
        _join_bridge(network)
        _join_ovs(network)
        _bring_up(network.interface)
    except OSError as exc:
        if fd >= 0:
            os.close(fd)
        raise NetworkUnknown(
            f"network {network.name}: TAP {network.interface} cannot be used ({exc.strerror}): give the host process "
            f"CAP_NET_ADMIN, or make it before: ip tuntap add {network.interface} mode tap vnet_hdr user USER"
        ) from exc
    except NetworkUnknown:
        os.close(fd)
        raise
    return Uplink("tap" if network.offload else "bare-tap", fd)


def _bring_up(interface: str) -> None:
    """:raises OSError: it is not up and may not be made so."""
    name = interface.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack(_IFREQ, name)), 16)
        if not flags & _IFF_UP:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))


def _join_bridge(network: NetworkConfig) -> None:
    """:raises NetworkUnknown: the TAP is no port of its bridge and cannot be made one."""
    bridge, interface = network.bridge, network.interface
    if not bridge or Path(f"/sys/class/net/{bridge}/brif/{interface}").exists():
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            (index,) = struct.unpack_from(
                "i", fcntl.ioctl(sock, _SIOCGIFINDEX, struct.pack(_IFREQ, interface.encode())), 16
            )
            fcntl.ioctl(sock, _SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
        except OSError as exc:
            cure = f"ip link add {bridge} type bridge"
            if Path(f"/sys/class/net/{bridge}/bridge").exists():
                cure = f"ip link set {interface} master {bridge}"
            raise NetworkUnknown(
                f"network {network.name}: TAP {interface} cannot be made a port of bridge {bridge} ({exc.strerror}): "
                f"run {cure} before"
            ) from exc


def _join_ovs(network: NetworkConfig) -> None:
    """:raises NetworkUnknown: Open vSwitch does not take the TAP."""
    if not network.ovs:
        return
    command = ["ovs-vsctl", "--timeout=5", "--may-exist", "add-port", network.ovs, network.interface]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as exc:
        raise NetworkUnknown(
            f"network {network.name}: ovs-vsctl cannot be run ({exc.strerror}): apt-get install openvswitch-switch"
        ) from exc
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[:200]
        raise NetworkUnknown(
            f"network {network.name}: TAP {network.interface} cannot be made a port of {network.ovs} ({said}): "
            f"run ovs-vsctl add-br {network.ovs} before, or correct ovs="
        )


# -- slirp4netns ------------------------------------------------------------------------------------------------------


async def _start_slirp(network: NetworkConfig, folder: Path, lifeline: Callable[[], int]) -> Uplink:
    program = shutil.which(PROGRAM)
    if program is None:
        raise NetworkUnknown(
            f"network {network.name}: {PROGRAM} is not installed: apt install {PROGRAM}, or configure another network"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    frames, api = f"{network.name}.sock", f"{network.name}.api"
    for name in (frames, api):
        (folder / name).unlink(missing_ok=True)
    life = lifeline()
    try:
        # Socket paths are short because the folder is the current one there.
        process = subprocess.Popen(
            [program, *_slirp_options(network), f"--exit-fd={life}", f"--api-socket={api}", frames],
            cwd=folder,
            pass_fds=[life],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as exc:
        raise HostFailure(f"network {network.name}: {PROGRAM} cannot be started: {exc.strerror}") from exc
    finally:
        os.close(life)
    uplink = Uplink("plain", -1, process)
    try:
        uplink.fd = await _connect(uplink, folder / frames, socket.SOCK_SEQPACKET)
        for forward in network.forwards:
            await _forward(network, uplink, folder / api, forward)
    except BaseException:
        uplink.close()
        raise
    LOG.info("network %s: %s is process %d", network.name, PROGRAM, process.pid)
    return uplink


def _slirp_options(network: NetworkConfig) -> Iterator[str]:
    yield from ("--target-type=bess", "--enable-seccomp", f"--mtu={network.mtu}", f"--cidr={network.cidr}")
    if not network.host_loopback:
        yield "--disable-host-loopback"
    if not network.dns:
        yield "--disable-dns"
    if network.ipv6:
        yield "--enable-ipv6"


async def _connect(uplink: Uplink, path: Path, kind: int) -> int:
    """:raises HostFailure: the program has ended, or does not listen."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
        try:
            connect_path(sock, path)
            return sock.detach()
        except OSError as exc:
            sock.close()
            if not uplink.alive():
                raise HostFailure(f"{PROGRAM} ended at its start: run it by hand to see why") from exc
            if asyncio.get_running_loop().time() > deadline:
                raise HostFailure(f"{PROGRAM} does not listen at {path}: {exc.strerror}") from exc
        await asyncio.sleep(_STEP)


def connect_path(sock: socket.socket, path: Path) -> None:
    """Whatever the path's length: sun_path has 107 bytes."""
    with short_path(path) as address:
        sock.connect(address)


async def _forward(network: NetworkConfig, uplink: Uplink, api: Path, forward: Forward) -> None:
    """One request a connection (slirp4netns(1), API socket). A port may still be held by the one before this."""
    arguments = {
        "proto": forward.protocol,
        "host_addr": forward.host_address,
        "host_port": forward.host_port,
        "guest_addr": forward.guest_address,
        "guest_port": forward.guest_port,
    }
    request = json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode()
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        answer = await asyncio.to_thread(_ask, await _connect(uplink, api, socket.SOCK_STREAM), request)
        if "error" not in answer:
            return
        if asyncio.get_running_loop().time() > deadline:
            where = f"{forward.host_address}:{forward.host_port}"
            raise HostFailure(f"network {network.name}: {where} cannot be forwarded ({answer['error']}): is it in use?")
        await asyncio.sleep(10 * _STEP)


def _ask(fd: int, request: bytes) -> dict[str, object]:
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            answer = json.loads(_read_all(sock) or b"{}")
        except (OSError, ValueError) as exc:
            return {"error": str(exc)}
    return answer if isinstance(answer, dict) else {"error": "no answer"}


def _read_all(sock: socket.socket) -> bytes:
    pieces: Sequence[bytes] = list(iter(lambda: sock.recv(4096), b""))
    return b"".join(pieces)
