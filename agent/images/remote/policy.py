"""What may be asked for: schemes, hosts and addresses of instructions' URLs and of every redirect."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from agent.conf_images import Network
from agent.errors import InstructionError
from agent.images.remote.source import public_url

PORTS = {"http": 80, "https": 443}
# Addresses within which an IPv4 address is reached; RFC 6052, RFC 3056.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NUMERIC = re.compile(r"[0-9a-fx.]+")
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Policy:
    """:param schemes: lower case. :param hosts: patterns of ``name`` or ``name:port``, lower case.

    :param networks: special addresses that are allowed all the same.
    :param trusted: URLs of the configuration: their hosts are always allowed, whatever their address is.
    """

    def __init__(
        self, schemes: Sequence[str], hosts: Sequence[str], networks: Sequence[Network], trusted: Sequence[str] = ()
    ) -> None:
        self._schemes = frozenset(schemes)
        self._hosts = tuple(hosts)
        self._networks = tuple(networks)
        self._trusted = {origin(url) for url in trusted if url}

    def trust(self, url: str) -> None:
        """One more URL that is as good as the configuration's: Keystone's catalogue has it."""
        self._trusted = self._trusted | {origin(url)}  # not changed in place: other threads look at it

    def trusts(self, host: str, port: int) -> bool:
        """Whether a connection there needs no look at its address."""
        return any((host.lower(), port) == (name, number) for _, name, number in self._trusted)

    def check(self, url: str) -> None:
        """:raises InstructionError: ``image.source_refused``, with the option that would allow it."""
        scheme, host, port = origin(url)
        if (scheme, host, port) in self._trusted:
            return
        if scheme not in self._schemes:
            raise refused(f"{public_url(url)}: {scheme or 'no scheme'} is not allowed: see [images] allowed_schemes")
        names = (host, f"{host}:{port}")
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self._hosts):
            raise refused(f"{public_url(url)}: host {host} is not allowed: see [images] allowed_hosts")
        address = _literal(host)
        if address is not None:
            self.check_address(host, str(address))

    def check_address(self, host: str, text: str) -> None:
        """:param text: an address that `host` has. :raises InstructionError: it must not be connected to."""
        address = ipaddress.ip_address(text.partition("%")[0])
        if any(address in network for network in self._networks if network.version == address.version):
            return
        inner = _inner(address)
        if inner is not None and any(inner in network for network in self._networks if network.version == 4):
            return
        if _special(address) or (inner is not None and _special(inner)):
            raise refused(f"{host} is {address}, a special address: see [images] allowed_networks")


def refused(text: str) -> InstructionError:
    return InstructionError("image.source_refused", text)


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host (lower case) and port. :raises InstructionError: no URL."""
    try:
        parts: SplitResult = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as exc:
        raise refused(f"{public_url(url)} is no URL: {exc}") from exc
    if not host or any(character.isspace() or character == "\\" for character in url):
        raise refused(f"{public_url(url)} is no URL of a host")
    if parts.username is not None or parts.password is not None:
        raise refused(f"{public_url(url)}: a URL with a user or password is not taken: leave it out")
    return parts.scheme.lower(), host.lower(), PORTS.get(parts.scheme.lower(), 0) if port is None else port


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        # Short, octal and hexadecimal forms, which a resolver takes as addresses, too: 127.1, 0x7f000001.
        return ipaddress.IPv4Address(socket.inet_aton(host)) if _NUMERIC.fullmatch(host) else None
    except OSError:
        return None


def _inner(address: Address) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _special(address: Address) -> bool:
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address.is_reserved
        or (isinstance(address, ipaddress.IPv4Address) and address in _THIS_NETWORK)
        or (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)
    )
