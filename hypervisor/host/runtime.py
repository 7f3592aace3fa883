"""What runs inside a domain process, as the host sees it.

A *runtime* turns a `BuildRequest` into a `Guest`. The real one is
`hypervisor.host.pv_runtime` (builder and machine); tests bring a scripted one. It
is named ``module:attribute`` because only the zygote and its children load it: the host
process itself holds neither engine nor guest code.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hypervisor.toolstack.api import DomainSpec, ShutdownReason

if TYPE_CHECKING:  # the host process needs nothing of a machine
    from hypervisor.host.guest_link_state import LinkTarget
    from hypervisor.suspended.saver import Frozen

_T = TypeVar("_T")
STORE_PORT = 1
CONSOLE_PORT = 2
"""Event channel ports of the guest that are bound to the host side at birth (start_info's store and console ports)."""

HOST_PORTS = (STORE_PORT, CONSOLE_PORT)


@dataclasses.dataclass(frozen=True, slots=True)
class BuildRequest:
    """All that a domain process needs to know.

    :ivar base_mfn: first machine frame of the domain's extent.
    :ivar nr_pages: guest RAM at boot, pages; `max_pages` its static maximum.
    :ivar cache_dir: where unpacked kernels are kept, or "" for no cache.
    :ivar engine: name in the entry-point group ``reeve.engines``, or "" for the default.
    :ivar cpu_policy: what the guest may know of its processor (`hypervisor.cpu.policy`).
    :ivar fast_path: of `hypervisor.native.MODES`.
    :ivar incoming: the guest comes from another host, which gave these facts (`Moving.facts`): no kernel is read, and
        the domain process waits for the guest's state.
    :ivar image: the guest is not built, but comes from a saved image, whose descriptor the process gets.
    :ivar template: it begins from a template, whose memory and state the process gets.
    """

    spec: DomainSpec
    domid: int
    base_mfn: int
    nr_pages: int
    max_pages: int
    cache_dir: str = ""
    engine: str = ""
    linear_page_tables: bool = False
    cpu_policy: str = "engine"
    fast_path: str = "auto"
    incoming: dict[str, Any] | None = None
    image: bool = False
    template: bool = False

    @property
    def sources(self) -> int:
        """Descriptors that it comes from."""
        return 2 if self.template else int(self.image)

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["spec"] = self.spec.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BuildRequest:
        return cls(**{**data, "spec": DomainSpec.from_json(data["spec"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """Why a guest does not run any more."""

    reason: ShutdownReason
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class RuntimeFacts:
    """:ivar max_vcpus: most vCPUs of one domain; `capabilities` are those of `toolstack.api.Capability`.

    :ivar link: ``module:attribute`` of the guest link in driver processes; "" for `hypervisor.devices.link`.
    """

    name: str
    max_vcpus: int
    capabilities: tuple[str, ...]
    detail: tuple[tuple[str, str], ...] = ()
    link: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "max_vcpus": self.max_vcpus,
            "capabilities": list(self.capabilities),
            "detail": dict(self.detail),
            "link": self.link,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RuntimeFacts:
        detail = tuple(sorted((str(k), str(v)) for k, v in data["detail"].items()))
        return cls(str(data["name"]), int(data["max_vcpus"]), tuple(data["capabilities"]), detail, str(data["link"]))


class Guest(Protocol):
    """A built guest. It starts paused; every method but `run` may be called from another thread."""

    @property
    def boot(self) -> dict[str, Any]:
        """JSON for the host: at least ``store_mfn`` and ``console_mfn``."""

    def run(self) -> Ended:
        """Blocks until the guest has ended."""

    def pause(self) -> None: ...

    def unpause(self) -> None: ...

    def notify(self, port: int) -> None:
        """The host side signals the guest's `port`."""

    def stats(self) -> dict[str, Any]:
        """At least ``cpu_time_ns``; ``memory_pages`` it has and ``vcpus`` online, where that is known."""

    def limit_memory(self, pages: int) -> None:
        """Let the guest have no more RAM than that from now on; what it has it keeps."""

    def set_cap(self, percent: int) -> None:
        """Let it use no more than so much of one CPU; 0: without limit."""

    def link_target(self) -> LinkTarget | None:
        """What driver processes are served from; None: the guest has no devices."""

    def core(self) -> CoreSource | None:
        """What a core dump needs besides memory; None: it cannot be dumped."""

    def moving(self) -> Moving | None:
        """What a move to another host needs; None: it cannot be moved."""

    def saver(self) -> Saver | None:
        """None: it cannot be saved."""


class Moving(Protocol):
    """See `hypervisor.moving.MovingState`. Any thread but the run loop's."""

    address: int
    pages: int
    frozen: bool
    incoming: bool
    punched: collections.deque[tuple[int, int]] | None

    def facts(self) -> dict[str, Any]:
        """JSON: `BuildRequest.incoming` of the domain process that takes it over."""

    def call(self, function: Callable[[], _T]) -> _T:
        """In the run loop's thread."""

    def settle(self) -> None:
        """All of its memory is in its descriptor from now on. :raises OSError."""

    def host_pages(self) -> set[int]:
        """Pages that the host process writes to: the rings of console and store."""

    def obstacles(self) -> str:
        """Why it cannot be moved now; "" if it can."""

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def give(self, *, early: bool = False, served: bool = False) -> bytes: ...

    def take(self, data: bytes, marks: int | None = None) -> None: ...


class CoreSource(Protocol):
    """Any thread, while the guest is paused or has ended."""

    def describe(self) -> dict[str, Any]:
        """JSON: see `hypervisor.core_state.CoreState.describe`."""

    def context(self, number: int) -> bytes:
        """``struct vcpu_guest_context`` of a vCPU. :raises HostFailure: there is none."""


class Saver(Protocol):
    """Any thread but the guest's own."""

    def watch(self, suspended: Callable[[], None]) -> None:
        """Call `suspended`, in the guest's thread, when the guest has suspended itself; it waits then."""

    def freeze(self, make: Callable[[], Frozen | None]) -> bool:
        """Let the next `write` give a suspended guest as it is now, though it goes on meanwhile.

        :param make: called in the guest's thread; it freezes its memory. :returns: False: it returned None, and the
            guest has to stay suspended. :raises WrongState, OSError: then it is suspended, too.
        """

    def write(self, out: Callable[[bytes | memoryview], object], memory: int) -> int:
        """Give a suspended guest to `out`, as a libxc stream.

        :param memory: descriptor of the domain's memory. :returns: pages with data. :raises WrongState, OSError.
        """

    def thaw(self) -> None:
        """After `freeze`, whatever came of `write`: the guest's memory is as before. :raises OSError: not all of it."""

    def resume(self) -> None:
        """Let a suspended guest go on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """Descriptors. :ivar memory, state: see `hypervisor.suspended.template`. :ivar own: the domain's memory."""

    memory: int
    state: int
    own: int


class Runtime(Protocol):
    def facts(self) -> RuntimeFacts: ...

    def shed(self) -> None:
        """Give up what only a domain process needs: called in children that become something else."""

    def build(
        self, request: BuildRequest, memory: mmap.mmap, notify_host: Callable[[int], None], seal: Callable[[], None]
    ) -> Guest:
        """Read kernel and ramdisk, fill `memory`, make the machine.

        :param memory: the domain's whole extent, shared.
        :param seal: to be called once, after the last file was read and before the first thread is started: rights
            that belong to threads are given up there.
        :param notify_host: tells the host that the guest signalled one of `HOST_PORTS`; any thread.
        :raises ToolstackError: with cause and cure.
        """

    def restore(
        self,
        request: BuildRequest,
        memory: mmap.mmap,
        notify_host: Callable[[int], None],
        seal: Callable[[], None],
        image: int,
    ) -> Guest:
        """As `build`, from a saved image.

        :param image: descriptor at the beginning of a libxc stream; read to the end of the libxl stream around it.
        :raises ToolstackError: with cause and cure; what is wrong with the image is `StreamInvalid`.
        """

    def clone(
        self,
        request: BuildRequest,
        memory: mmap.mmap,
        notify_host: Callable[[int], None],
        seal: Callable[[], None],
        template: Template,
    ) -> Guest:
        """As `build`, from a template: what the guest does not write stays the template's.

        :raises ToolstackError: with cause and cure; what is wrong with the template is `StreamInvalid`.
        """


def load(name: str) -> Runtime:
    """:param name: ``module:attribute`` of a `Runtime` instance or of a class without arguments."""
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    runtime: Runtime = found() if isinstance(found, type) else found
    return runtime
