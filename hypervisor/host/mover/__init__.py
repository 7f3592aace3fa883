"""Movers: pages and blobs of a migration between two hosts, over mutual TLS (docs/migration.md)."""

from hypervisor.host.mover.client import CLOSED, EPOCH, Receiver, Sender
from hypervisor.host.mover.order import TlsFiles
from hypervisor.host.mover.sent import PagesSent

__all__ = ["CLOSED", "EPOCH", "PagesSent", "Receiver", "Sender", "TlsFiles"]
