"""What the host may ask of a domain process: the ops of `hypervisor.host.domain_process`, by name."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from hypervisor.errors import HostFailure, ToolstackError, WrongState
from hypervisor.host import channel as channels
from hypervisor.host import core_op, moving
from hypervisor.host.channel import Message
from hypervisor.host.guest_link import GuestLinks
from hypervisor.host.moving import MigrationPart
from hypervisor.host.neighbours import Neighbours
from hypervisor.host.runtime import BuildRequest, Ended, Guest
from hypervisor.host.saving_thread import Saving
from hypervisor.toolstack.api import DomainState, ShutdownReason

LOG = logging.getLogger(__name__)


class DomainVerbs:
    """A part of `hypervisor.host.domain_process.DomainProcess`; in its channel thread."""

    request: BuildRequest
    state: DomainState
    ended: Ended | None
    _lock: threading.Lock
    _guest: Guest | None
    _held: bool
    _links: GuestLinks | None
    _neighbours: Neighbours | None
    _saving: Saving | None
    _migration: MigrationPart | None

    def _answer(self, message: Message, fds: list[int]) -> Message:
        """Descriptors belong to the verb as soon as there is one. Empty: the answer comes later."""
        verbs: dict[str, Callable[[], dict[str, Any]]] = {
            "pause": self._pause,
            "unpause": self._unpause,
            "stats": self._stats,
            "limit_memory": lambda: self._limit_memory(message.get("pages")),
            "set_cap": lambda: self._set_cap(message.get("percent")),
            "link": lambda: self._link(fds),
            "unlink": lambda: self._unlink(message.get("link")),
            "peer": lambda: self._peer(message, fds),
            "hold": self._hold,
            "release": self._release,
            "core": lambda: core_op.tell(self._running_guest().core(), message.get("vcpu")),
            "resume": self._resume,
        }
        try:
            if message.get("op") == "save":
                self._save(message, fds)
                return {}
            if message.get("op") == "saved" and self._saving is not None:
                channels.close_all(fds)
                self._saving.saved(message.get("id"))
                return {}
            if message.get("op") in moving.OPS:
                return {"result": moving.answer(self._migration, message, fds)}
            verb = verbs.get(str(message.get("op")))
            if message.get("op") not in ("link", "peer"):
                channels.close_all(fds)
            if verb is None:
                raise HostFailure(f"unknown op {message.get('op')!r}")
            return {"result": verb()}
        except ToolstackError as exc:
            return {"error": exc.to_json()}
        except Exception as exc:
            LOG.exception("op %s failed", message.get("op"))
            return {"error": HostFailure(f"{type(exc).__name__}: {exc}").to_json()}

    def _pause(self) -> dict[str, Any]:
        return self._run_state(DomainState.PAUSED, self._running_guest().pause)

    def _unpause(self) -> dict[str, Any]:
        return self._run_state(DomainState.RUNNING, self._running_guest().unpause)

    def _run_state(self, state: DomainState, act: Callable[[], None]) -> dict[str, Any]:
        with self._lock:
            if self.ended is not None:
                raise WrongState(f"the domain has ended ({self.ended.reason}): destroy or reset it")
            act()
            self.state = state
        return {"state": state}

    def _stats(self) -> dict[str, Any]:
        return {**self._running_guest().stats(), "state": self.state}

    def _limit_memory(self, pages: object) -> dict[str, Any]:
        if not isinstance(pages, int) or not 0 < pages <= self.request.max_pages:
            raise HostFailure(f"op limit_memory to {pages!r} pages of {self.request.max_pages}")
        self._running_guest().limit_memory(pages)
        return self._stats()

    def _set_cap(self, percent: object) -> dict[str, Any]:
        if not isinstance(percent, int) or percent < 0:
            raise HostFailure(f"op set_cap to {percent!r} per cent")
        self._running_guest().set_cap(percent)
        return {}

    def _link(self, fds: list[int]) -> dict[str, Any]:
        if self._links is None:
            channels.close_all(fds)
            raise WrongState("this runtime serves no devices")
        return {"link": self._links.open(fds)}

    def _peer(self, message: Message, fds: list[int]) -> dict[str, Any]:
        if self._neighbours is None:
            channels.close_all(fds)
            raise WrongState("this runtime has no neighbours")
        self._neighbours.introduce(message, fds)
        return {}

    def _unlink(self, number: object) -> dict[str, Any]:
        if not isinstance(number, int) or number < 0:
            raise HostFailure(f"op unlink of link {number!r}")
        if self._links is not None:
            self._links.close(number)
        return {}

    def _hold(self) -> dict[str, Any]:
        """Stop the guest for a moment, until ``release`` or the end of this host's connection; its state stays."""
        with self._lock:
            if self.ended is None:
                self._held = True
                self._running_guest().pause()
        if self._neighbours is not None:
            self._neighbours.refresh()
        return {}

    def _release(self) -> dict[str, Any]:
        with self._lock:
            held, self._held = self._held, False
            if held and self.ended is None and self.state is DomainState.RUNNING:
                self._running_guest().unpause()
        return {}

    def _save(self, message: Message, fds: list[int]) -> None:
        saving = self._saving
        if saving is None or self.ended is None or self.ended.reason is not ShutdownReason.SUSPEND or len(fds) != 1:
            channels.close_all(fds)
            raise WrongState("the guest has not suspended itself, so it cannot be saved")
        if self._neighbours is not None:
            self._neighbours.refresh()
        saving.begin(message.get("id"), fds[0], frozen=message.get("frozen") is True)

    def _resume(self) -> dict[str, Any]:
        """The guest goes on where it suspended itself; quiet when it has not."""
        with self._lock:
            if self.ended is not None and self.ended.reason is ShutdownReason.SUSPEND and self._saving is not None:
                self.ended = None
                self.state = DomainState.RUNNING
                self._saving.resume()
        return {"state": self.state}

    def _running_guest(self) -> Guest:
        assert self._guest is not None
        return self._guest
