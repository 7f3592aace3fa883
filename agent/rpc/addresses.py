"""The nodes of a broker in one URL, in the form that oslo.messaging's ``transport_url`` has.

``amqp://user:password@rabbit1:5672,rabbit2:5672,rabbit3:5672/vhost``: a node without user and password has those of the
first. A comma within a user, a password or a vhost is written ``%2C``.
"""

from __future__ import annotations

from urllib.parse import urlsplit

MAX_NODES = 32


def addresses(url: str) -> tuple[str, ...]:
    """A URL for each node, in the order given; never empty, and not checked further."""
    parts = urlsplit(url)
    nodes = parts.netloc.split(",")[:MAX_NODES]
    if len(nodes) == 1:
        return (url,)
    login, at, _ = nodes[0].rpartition("@")
    return tuple(parts._replace(netloc=node if "@" in node else f"{login}{at}{node}").geturl() for node in nodes)


def redact(url: str) -> str:
    """The URL without its passwords, for logs."""
    parts = urlsplit(url)
    nodes = [_redact(node) for node in parts.netloc.split(",")]
    return url if nodes == parts.netloc.split(",") else parts._replace(netloc=",".join(nodes)).geturl()


def _redact(node: str) -> str:
    login, at, place = node.rpartition("@")
    user, colon, _ = login.partition(":")
    return f"{user}:***{at}{place}" if colon else node


class Turn:
    """Which of the nodes is in use. Not for several threads at once."""

    def __init__(self, url: str) -> None:
        self._all = addresses(url)
        self._at = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def url(self) -> str:
        return self._all[self._at]

    def next(self) -> None:
        """The node in use has failed: the following one is, after the last one the first."""
        self._at = (self._at + 1) % len(self._all)
