"""An authority for one test, and the certificates it signs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hypervisor.host.mover import TlsFiles


class Authority:
    """:param folder: where its files go."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.ca = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", f"/CN=test {name}", "-keyout", str(self._key), "-out", str(self.ca)),
        )

    def host(self, name: str, *, san: str = "", days: int = 2, peer: str = "") -> TlsFiles:
        """A host's key and certificate. :param san: of the certificate, e.g. ``DNS:a,IP:127.0.0.1``."""
        key, request, made = (self.folder / f"{name}.{end}" for end in ("key", "csr", "pem"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={san or 'IP:127.0.0.1,DNS:' + name}\n")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", str(key), "-out", str(request)),
        )
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key), "-CAcreateserial"),
            *("-days", str(days), "-extfile", str(extensions), "-out", str(made)),
        )
        return TlsFiles(str(self.ca), str(made), str(key), peer)

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=30)
