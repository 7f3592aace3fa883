"""The host process introduces two domains; from then on their processes speak directly (see `neighbours`)."""

from __future__ import annotations

import fcntl
import logging
import os
import socket

from hypervisor.errors import ToolstackError
from hypervisor.host.channel import close_all
from hypervisor.host.peer_limits import SLOTS
from hypervisor.host.records import Phase
from hypervisor.host.table import Domain, DomainTable
from hypervisor.sealed_memory import sealed_memory
from hypervisor.types import PAGE_SIZE

LOG = logging.getLogger(__name__)


def introduce(table: DomainTable, asker: Domain, domid: int) -> None:
    """Domain `asker` wants domain number `domid`: give both the ends of a peer link, or say that there is none."""
    other = next((d for d in table.all() if d.record.domid == domid and d is not asker and _is_there(d)), None)
    try:
        if other is None or not _is_there(asker):
            _tell(asker, {"domid": domid}, [])
            return
        near, far = _ends()
        try:
            # The neighbour first: it knows the asker when the asker's first request arrives.
            _tell(other, _card(asker), far)
            _tell(asker, _card(other), near)
        finally:
            close_all([*near, *far])
    except ToolstackError as exc:
        LOG.warning("domains %d and %d could not be introduced: %s", asker.record.domid, domid, exc)
    except OSError as exc:
        LOG.error("no peer link could be made: %s", exc)


def _is_there(domain: Domain) -> bool:
    record, process = domain.record, domain.process
    return (
        process is not None
        and process.alive
        and record.claim is not None
        and record.phase is Phase.MADE
        and not (record.ended or domain.lost or domain.dying)
    )


def _card(domain: Domain) -> dict[str, int]:
    claim = domain.record.claim
    assert claim is not None
    return {"domid": domain.record.domid, "base_mfn": int(claim.base_mfn), "frames": claim.frames}


def _tell(domain: Domain, card: dict[str, int], fds: list[int]) -> None:
    if domain.process is not None:
        domain.process.link.send({"op": "peer", **card}, fds)


def _ends() -> tuple[list[int], list[int]]:
    """For each side: socket, what it exports writable and readable, what it imports writable and readable."""
    fds: list[int] = []
    try:
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds += [one.detach(), two.detach()]
        for _ in range(4):
            fds.append(sealed_memory("shared-frames", SLOTS * PAGE_SIZE))
        writable_one, readable_one, writable_two, readable_two = fds[2:6]
        for fd in (writable_one, writable_two):
            fds.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))
        for fd in (readable_one, readable_two):
            fds.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    except BaseException:
        close_all(fds)
        raise
    write_of_one, write_of_two, read_of_one, read_of_two = fds[6:]
    return (
        [fds[0], writable_one, readable_one, write_of_two, read_of_two],
        [fds[1], writable_two, readable_two, write_of_one, read_of_one],
    )
