"""TLS to the broker: what ``amqps://`` checks, with which files, and what a refusal means in one line.

Left to itself py-amqp verifies the broker's certificate against the system's authorities but not the name in it: any
certificate that any of them has signed, for any name, would do. Here the name is always checked, too.
"""

from __future__ import annotations

import dataclasses
import ssl
from typing import Any

from agent.errors import ConfigError

_CURES = {
    # Of X509_V_ERR in OpenSSL's x509_vfy.h.
    9: "look at the clocks of both machines",
    10: "give the broker a new one, or look at this machine's clock",
    62: "connect by a name that is in it, or set [broker] tls_server_name to one",
    64: "connect by a name that is in it, or set [broker] tls_server_name to one",
}
_UNKNOWN_SIGNER = "set [broker] tls_ca_file to the authority that signed it"


@dataclasses.dataclass(frozen=True, slots=True)
class BrokerTls:
    """How ``amqps://`` is spoken.

    :ivar ca_file: PEM file with the authorities that may sign the broker's certificate; "": the system's.
    :ivar certificate_file: ours, with its chain, for brokers that ask for one; `key_file` its key; "": none.
    :ivar server_name: must be in the broker's certificate; "": the host of the URL.
    :ivar insecure: believe whoever answers.
    """

    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    server_name: str = ""
    insecure: bool = False

    def given(self) -> bool:
        """Whether anything is asked for that would be without effect where no TLS is spoken."""
        return self != VERIFIED

    @property
    def warning(self) -> str:
        """What to log where `insecure` is set."""
        return "[broker] tls_insecure: WHOEVER ANSWERS IS TAKEN FOR THE BROKER; its certificate is not checked"

    def options(self) -> dict[str, Any]:
        """The argument ``ssl`` of `kombu.Connection`. A server name of None is filled in by our transport.

        :raises ConfigError: a file is missing or of no use.
        """
        self._check()
        options: dict[str, Any] = {"cert_reqs": ssl.CERT_NONE if self.insecure else ssl.CERT_REQUIRED}
        if not self.insecure:
            options["server_hostname"] = self.server_name or None
            if self.ca_file:
                options["ca_certs"] = self.ca_file
        if self.certificate_file:
            options |= {"certfile": self.certificate_file, "keyfile": self.key_file or None}
        return options

    def _check(self) -> None:
        """Load the files as the connection will: what is wrong with them is said once, by name."""
        if self.insecure and (self.ca_file or self.server_name):
            raise ConfigError(
                "[broker] tls_insecure contradicts tls_ca_file and tls_server_name: nothing would be checked against "
                "them; leave one or the other out"
            )
        if self.key_file and not self.certificate_file:
            raise ConfigError("[broker] tls_key_file is of no use alone: set tls_certificate_file, too")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca_file:
            _load("tls_ca_file", self.ca_file, lambda: context.load_verify_locations(self.ca_file))
        if self.certificate_file:
            name = "tls_certificate_file and tls_key_file" if self.key_file else "tls_certificate_file"
            files = f"{self.certificate_file} and {self.key_file}" if self.key_file else self.certificate_file
            # A key with a passphrase would otherwise ask for it on the terminal.
            _load(
                name,
                files,
                lambda: context.load_cert_chain(self.certificate_file, self.key_file or None, _no_passphrase),
            )


VERIFIED = BrokerTls()
"""The system's authorities, the host of the URL, no certificate of ours."""


def explain(exc: BaseException) -> str:
    """What a connection failed with, in one line: for refused certificates the cause and its cure."""
    cause: BaseException | None = exc
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        said = cause.verify_message.rstrip(".")
        return f"the broker's certificate is refused: {said}; {_CURES.get(cause.verify_code, _UNKNOWN_SIGNER)}"
    reason = (cause.reason or "") if isinstance(cause, ssl.SSLError) else ""
    if reason in ("WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "HTTP_REQUEST"):
        return "no TLS is spoken at that port: brokers have another one for it, by default 5671"
    if "ALERT" in reason or isinstance(cause, ssl.SSLEOFError):
        said = reason.partition("ALERT_")[2].replace("_", " ").lower() or "it ended the connection"
        return (
            f"the broker refuses the handshake ({said}): it may want a client certificate that it can verify, "
            "[broker] tls_certificate_file and tls_key_file"
        )
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text[:200]


def _no_passphrase() -> str:
    raise ConfigError("it has a passphrase, and nobody is there to give it: take it away with openssl pkey")


def _load(name: str, files: str, load: Any) -> None:
    try:
        load()
    except ConfigError as exc:
        raise ConfigError(f"[broker] {name}: {files} cannot be used: {exc}") from None
    except ssl.SSLError as exc:
        raise ConfigError(
            f"[broker] {name}: {files} cannot be used ({exc.reason or exc}): give PEM files that belong together"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"[broker] {name}: {files} cannot be read: {exc.strerror or exc}") from exc
