"""What a mover process is made for. Known to the host process, which needs nothing of TLS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SOURCE, TARGET = "source", "target"
FDS = 6
"""Channel, log, memory, socket (connected on the source, listening on the target), spool for blobs that arrive, marks
of pages that were written (of no use on the source)."""


@dataclasses.dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files.

    :ivar ca: what the other side's certificate must be signed by; `certificate` (with what lies between it and the CA)
        and `key` are this host's own.
    :ivar peer: DNS name or address that the other side's certificate must have; "": on the source the address that is
        connected to, on the target any.
    """

    ca: str
    certificate: str
    key: str
    peer: str = ""

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> TlsFiles:
        return cls(**data)


@dataclasses.dataclass(frozen=True, slots=True)
class MoverOrder:
    """:ivar role: `SOURCE` or `TARGET`.

    :ivar pages: of the domain's extent, which is what memory there is.
    :ivar address: of the target, for its certificate; source only.
    :ivar rate: bytes a second, 0 for no limit; `zstd`: try to compress; source only.
    """

    role: str
    ident: str
    token: str
    pages: int
    tls: TlsFiles
    address: str = ""
    rate: int = 0
    zstd: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "tls": self.tls.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MoverOrder:
        return cls(**{**data, "tls": TlsFiles.from_json(data["tls"])})
