"""What is on disk against what there is: after a crash of ours, and when others acted on our domains."""

from __future__ import annotations

import logging

from hypervisor.errors import ToolstackError
from hypervisor.toolstack.drivers.xl import parsers
from hypervisor.toolstack.drivers.xl.host import HALF_MADE, Host, node, pick
from hypervisor.toolstack.drivers.xl.life import Life
from hypervisor.toolstack.drivers.xl.records import Record
from hypervisor.toolstack.drivers.xl.runner import BUILD

LOG = logging.getLogger(__name__)


def sweep(host: Host, life: Life) -> None:
    """Deal with every domain that ended, vanished or was left half made; one that is being acted on is left out.

    What has no marker of ours is told in the log and left alone. :raises ToolstackError: the host cannot be read; then
    nothing was concluded.
    """
    there = {row.uuid for row in life.rows()}
    for uuid in host.records.uuids():
        try:
            record = host.records.find(uuid)
            if record is None or (uuid in there and record.made and not record.again):
                continue
            host.claim()
            with host.records.lock(uuid, wait=False):
                _mend(host, life, uuid)
        except BlockingIOError:
            continue  # whoever has it finishes it
        except ToolstackError as exc:
            LOG.warning("domain %s cannot be swept now: %s", uuid, exc)


def _mend(host: Host, life: Life, uuid: str) -> None:
    """Call with its lock held."""
    record, rows = host.records.find(uuid), host.rows()
    if record is None:
        return
    if all(row.uuid != uuid for row in rows):
        _vanished(host, life, record)
        return
    row = pick(rows, uuid)
    if record.made and not record.again:
        return
    if host.store.read(node(row, "uuid")) != uuid:
        LOG.warning("domain %s (%s, domid %d): %s; it is left alone", uuid, row.name, row.domid, HALF_MADE)
    elif record.again:
        life.rebuild(row, record)
    elif host.store.read(node(row, "owner")) == record.spec.owner:
        life.mark(record)
    else:
        _drop(host, row)


def _vanished(host: Host, life: Life, record: Record) -> None:
    uuid = record.spec.uuid
    if record.again:
        LOG.warning("domain %s was to start anew when its maker died: it is started", uuid)
        life.rebuild(None, record)
        return
    host.records.delete(uuid)
    if record.made:
        host.events.publish("destroyed", uuid, "not by us: it is not on the host any more")
    LOG.warning("domain %s is not on the host any more: its record is removed", uuid)


def _drop(host: Host, row: parsers.Row) -> None:
    """Its maker died while it was being marked: ours, and nobody was told of it."""
    LOG.warning("domain %s (%s, domid %d) was left half made: it is destroyed", row.uuid, row.name, row.domid)
    host.xl.run("destroy", str(row.domid), timeout=BUILD)
    host.records.delete(row.uuid)
