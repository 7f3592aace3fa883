"""What the agent's main thread does beside waiting for its end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from agent.configdrive.drives import wanted_drives
from agent.errors import JournalCorrupt, JournalError
from hypervisor.errors import ToolstackError

if TYPE_CHECKING:
    from agent.service import Service

LOG = logging.getLogger(__name__)


def look_again(service: Service) -> None:
    """Whether the journal can be written again, while it could not be. :raises JournalCorrupt: it never will be."""
    if not service.journal.trouble:
        return
    try:
        service.journal.probe()
    except JournalCorrupt:
        raise
    except JournalError as exc:
        LOG.debug("%s", exc)
        return
    LOG.info("the journal %s can be written again", service.journal.path)


def keep_house(service: Service) -> None:
    """Remove what nobody needs any more. :raises JournalCorrupt: the journal is damaged."""
    service.monitor.listen()
    try:
        service.journal.forget()
    except JournalCorrupt:
        raise
    except JournalError as exc:
        LOG.warning("old instructions stay in the journal: %s", exc)
    try:
        service.drives.sweep(lambda: wanted_drives(service.toolstack, service.claims.domains()))
    except (JournalError, ToolstackError, OSError) as exc:
        LOG.warning("config drives of domains that are gone stay: %s", exc)
