"""What makes the agent well or ready, and the numbers of its queues: questions to the parts of a running service."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from agent.errors import JournalCorrupt, JournalError
from agent.monitor import Check
from agent.placement.reconciler import gauges as placement_gauges
from hypervisor.errors import ToolstackError

if TYPE_CHECKING:
    from agent.service import Service

LOG = logging.getLogger(__name__)


class Health:
    """Each check says in one line what is wrong, "" for nothing, or raises what the part raises."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def live(self) -> Mapping[str, Check]:
        """Where one of these fails, only a new start can help."""
        return {"threads": self._threads, "journal": self._journal}

    def ready(self) -> Mapping[str, Check]:
        """Where one of these fails, instructions wait."""
        return {
            "agent": self._agent,
            "broker": self.broker,
            "driver": self._driver,
            "room": self._room,
            "disk": self._disk,
        }

    def broker(self) -> str:
        service = self._service
        connected = [service.publisher.connected.is_set()]
        connected += [consumer.connected.is_set() for consumer in service.consumers]
        return "" if all(connected) else f"{connected.count(False)} of {len(connected)} connections are down"

    def _threads(self) -> str:
        service = self._service
        alive = {
            "dispatcher": service.dispatcher.alive(),
            "publisher": service.publisher.alive(),
            "reporter": service.reporter.alive(),
        }
        if service.placement is not None:
            alive["placement"] = service.placement.alive()
        alive |= {f"consumer {number}": consumer.alive() for number, consumer in enumerate(service.consumers, 1)}
        gone = [name for name, runs in alive.items() if not runs]
        return f"ended: {', '.join(gone)}" if gone and not service.ended.is_set() else ""

    def _journal(self) -> str:
        if self._service.fatal is not None:
            return str(self._service.fatal)
        try:
            self._service.journal.counts()
        except JournalCorrupt:
            raise
        except JournalError as exc:
            LOG.debug("the journal cannot be read now: %s", exc)  # it waits, and a new start would wait too
        return ""

    def _disk(self) -> str:
        self._service.journal.counts()
        return self._service.journal.trouble

    def _agent(self) -> str:
        return "the agent is about to end" if self._service.ended.is_set() else ""

    def _driver(self) -> str:
        self._service.toolstack.host_info()
        return ""

    def _room(self) -> str:
        return "" if self._service.dispatcher.has_room() else "as many instructions wait as [limits] max_pending allows"


def gauges(service: Service) -> dict[str, float]:
    """What /metrics tells of queues and capacity. What cannot be read now is left out."""
    found = {
        "broker_connected": 0.0 if Health(service).broker() else 1.0,
        "pending": float(service.dispatcher.pending),
    }
    if service.placement is not None:
        found |= placement_gauges(service.placement)
    with contextlib.suppress(JournalError):
        found |= {f"quarantine_{name}": value for name, value in service.journal.refused.totals().items()}
        found |= {f"journal_{name}": float(count) for name, count in service.journal.counts().items()}
    with contextlib.suppress(JournalError, ToolstackError):
        found |= {f"capacity_{name}": float(value) for name, value in service.claims.capacity().to_json().items()}
    return found
