"""Whether a host's certificate, key and authority fit together and are valid: by a handshake of it with itself."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from pathlib import Path

SOON_DAYS = 14


class Unusable(Exception):
    """The message says which file, and what is wrong with it."""


def days_left(authority: str, certificate: str, key: str) -> float:
    """Until the certificate expires. :raises Unusable: another host would not take it, or could not be taken by it."""
    for path in (authority, certificate, key):
        try:
            with Path(path).open("rb"):
                pass
        except OSError as exc:
            raise Unusable(f"{path} cannot be read: {exc.strerror}") from exc
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    try:
        server.load_cert_chain(certificate, key)
        client.load_verify_locations(authority)
    except ssl.SSLError as exc:
        raise Unusable(f"{certificate}, {key} or {authority} is no such file: {exc.reason or exc}") from exc
    try:
        peer = _handshake(client, server)
    except ssl.SSLCertVerificationError as exc:
        raise Unusable(f"{certificate} is not valid: {exc.verify_message}") from exc
    except ssl.SSLError as exc:
        raise Unusable(f"{certificate} is of no use: {exc.reason or exc}") from exc
    return (ssl.cert_time_to_seconds(str(peer["notAfter"])) - time.time()) / 86400


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, object]:
    """What the client sees of the server's certificate. :raises ssl.SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(back, there)
    far = server.wrap_bio(there, back, server_side=True)
    waiting: Sequence[ssl.SSLObject] = (near, far)
    for _ in range(10):
        left = []
        for end in waiting:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                left.append(end)
        waiting = left
        if not waiting:
            break
    return dict(near.getpeercert() or {})
