"""Movers: pages and blobs of a migration between two hosts, over mutual TLS (docs/migration.md)."""

from hypervisor.host.mover.client import CLOSED, PagesSent, Receiver, Sender
from hypervisor.host.mover.order import TlsFiles

__all__ = ["CLOSED", "PagesSent", "Receiver", "Sender", "TlsFiles"]
