"""All that a plugin may import from the agent.

A *plugin* gives one verb a meaning. It turns checked arguments into a `Plan`:
a tuple of `Step`s, plain data with a JSON form. The agent journals the plan
before the first step and a line before and after each step. After a crash it
rebuilds the plan and asks the interrupted step to `Step.check` the world:

* ``DONE``      the step is taken as done and the plan goes on;
* ``NOT_DONE``  the step is run (again);
* ``UNKNOWN``   nobody can say just now; asked again later. Unknown is never taken for either.

When a step fails, the failed step and then the done ones, newest first, are
undone. `Step.undo` looks at the world too: it is called for steps that may
have run wholly, partly or not at all, and perhaps twice.

Steps that several verbs take are in `agent.steps`, `agent.resizing` and `agent.configdrive`; a plugin may import
those, too.

A new verb is one module with a `Plugin` subclass and one line in the
entry-point group ``reeve.instructions``; ``docs/instructions.md`` describes
the verbs of this distribution.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from agent.errors import InstructionError
from hypervisor.errors import NotOurs
from hypervisor.toolstack.api import DomainInfo, Toolstack
from hypervisor.toolstack.devices import MAX_NICS, DiskFormat

__all__ = [
    "API_VERSION",
    "DEVICE_WAIT_SCHEMA",
    "DISK_SCHEMA",
    "MAX_MEMORY_MIB",
    "METADATA_SCHEMA",
    "NAME_SCHEMA",
    "NIC_SCHEMA",
    "ONE_DOMAIN_SCHEMA",
    "PATH_SCHEMA",
    "UUID_SCHEMA",
    "WAIT_SCHEMA",
    "BootImage",
    "Check",
    "Claims",
    "Context",
    "Host",
    "Images",
    "InstructionError",
    "JsonDict",
    "Plan",
    "Plugin",
    "Step",
    "own_domain",
]

API_VERSION = (1, 1)
"""Same major: compatible. A plugin built for another major is reported and skipped."""

JsonDict = dict[str, Any]

UUID_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "description": "The domain's UUID, in canonical lower-case form.",
}
ONE_DOMAIN_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["uuid"],
    "properties": {"uuid": UUID_SCHEMA},
}
"""Arguments of a verb that takes a domain and nothing else."""
NAME_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
    "description": "1 to 63 letters, digits, '.', '_' or '-', a letter or digit first.",
}
PATH_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "pattern": "^/[^\\u0000-\\u001f]{0,4094}$",
    "description": "Full path of a file on the host.",
}
METADATA_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "maxProperties": 64,
    "propertyNames": {"pattern": "^(?!reeve\\.)[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
    "additionalProperties": {"type": "string", "maxLength": 1024},
    "description": "Kept with the domain. Names that begin with 'reeve.' are the agent's own.",
}
WAIT_SCHEMA: Mapping[str, Any] = {
    "type": "number",
    "minimum": 0,
    "maximum": 3600,
    "default": 60,
    "description": "Seconds to wait until it has happened; 0 returns once the guest is asked.",
}

DEVICE_WAIT_SCHEMA: Mapping[str, Any] = {
    **WAIT_SCHEMA,
    "default": 10,
    "description": "Seconds to wait until the guest has taken it up; one that has not by then is no failure.",
}
MAX_MEMORY_MIB = 1 << 24
_LIMITS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "bytes_per_second": {"type": "integer", "minimum": 0, "maximum": (1 << 48) - 1},
        "iops": {"type": "integer", "minimum": 0, "maximum": (1 << 48) - 1},
        "burst_seconds": {"type": "number", "minimum": 0, "maximum": 3600},
    },
}
DISK_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["id", "path"],
    "properties": {
        "id": {"type": "string", "pattern": "^xvd[a-p]$"},
        "path": PATH_SCHEMA,
        "format": {"type": "string", "enum": [item.value for item in DiskFormat], "default": "raw"},
        "readonly": {"type": "boolean", "default": False},
        "direct": {"type": "boolean", "default": False},
        "discard": {"type": "boolean", "default": True},
        "shared": {"type": "boolean", "default": False},
        "limits": _LIMITS_SCHEMA,
    },
    "description": "A disk: id, path, and perhaps format, readonly, direct, discard, shared, limits.",
}
"""JSON form of a `hypervisor.toolstack.devices.DiskSpec`."""
NIC_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": MAX_NICS - 1},
        "mac": {"type": "string", "pattern": "^[0-9a-f]{2}(:[0-9a-f]{2}){5}$"},
        "network": NAME_SCHEMA,
        "addresses": {"type": "array", "maxItems": 64, "items": {"type": "string", "maxLength": 45}},
        "queues": {"type": "integer", "minimum": 1, "maximum": 8},
        "limits": _LIMITS_SCHEMA,
    },
    "description": "A nic: id, mac (one is made when it is left out), network, addresses, queues, limits.",
}
"""JSON form of a `hypervisor.toolstack.devices.NicSpec`, where `id` and `mac` may be left out."""


class Check(enum.StrEnum):
    """What `Step.check` found when it looked at the world."""

    NOT_DONE = "not_done"
    DONE = "done"
    UNKNOWN = "unknown"


class Claims(Protocol):
    """Memory and vCPUs set aside for domains that are to be made or to grow. Journalled: a claim survives a crash."""

    def take(self, instruction: str, domain: str, memory_mib: int, vcpus: int) -> None:
        """Set aside that much for a domain in all; what it has already counts. The same claim again changes nothing.

        Until the instruction is finished the domain is counted with at least that much, also while it has less.

        :raises InsufficientMemory, InsufficientVcpus: with what is left.
        """

    def holds(self, instruction: str) -> bool: ...

    def release(self, instruction: str) -> None:
        """Give the claim back; no effect when there is none."""


@dataclasses.dataclass(frozen=True, slots=True)
class BootImage:
    """What an image boots: full paths, its own command line, and the SHA-256 (hex) of each file by path."""

    name: str
    kernel: str
    ramdisk: str | None
    cmdline: str
    sha256: Mapping[str, str]


class Images(Protocol):
    """The host's image store."""

    def find(self, name: str) -> BootImage:
        """:raises AgentError: ``image.not_found``, or ``image.invalid`` when its manifest or a file is unusable."""

    def verify(self, image: str, files: Mapping[str, str]) -> None:
        """Compare files with their checksums. :raises AgentError: ``image.invalid``, naming the file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """What a plugin sees of its node.

    :ivar name: the host's name, as instructions address it.
    :ivar owner: the marker that makes a domain ours (`DomainSpec.owner`); never changes for a node,
        not even when its hostname does.
    :ivar settings: strings from the configuration that plugins may read.
    """

    name: str
    owner: str
    toolstack: Toolstack
    claims: Claims
    images: Images
    settings: Mapping[str, str]


class Context(Protocol):
    """What a step sees while it runs."""

    @property
    def host(self) -> Host: ...

    @property
    def instruction(self) -> str:
        """The instruction's id."""

    @property
    def outputs(self) -> Mapping[str, JsonDict]:
        """What earlier steps returned, by step name."""

    def seconds_left(self, at_most: float) -> float:
        """Seconds a step may still wait: `at_most`, or less when the instruction's deadline is nearer."""

    def poll(self, ready: Callable[[float], Any], at_most: float) -> Any:
        """Call ``ready(seconds)`` with short waits until it returns something true; None when `at_most` seconds passed.

        Use it for every wait: it ends at the deadline and gives way when the agent is stopped
        (the instruction then resumes at the next start).
        """

    def progress(self, done: float, total: float, unit: str) -> None:
        """Tell whoever listens how far a step is; may be called often."""


@dataclasses.dataclass(frozen=True)
class Step(abc.ABC):
    """One thing to do. Subclasses are frozen dataclasses whose fields are JSON values.

    :cvar name: unique in its plugin and stable: it is stored in journals.
    :cvar title: what it does, for a human.
    :cvar changes: False for a step that only looks or waits: it leaves nothing to undo.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    changes: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, ctx: Context) -> JsonDict | None:
        """Do it; what it returns is journalled and shown to later steps in `Context.outputs`.

        :raises InstructionError, ToolstackError: it failed; the plan is undone.
        """

    @abc.abstractmethod
    def check(self, ctx: Context) -> Check:
        """Look at the world: has this step happened?"""

    def undo(self, ctx: Context) -> None:  # noqa: B027 - nothing to undo is the common case
        """Take it back as far as the world shows that it is ours; must be repeatable."""

    def to_json(self) -> JsonDict:
        return {"step": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{key: value for key, value in data.items() if key != "step"})


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What an instruction will do, as data.

    :ivar domain: UUID of the domain it concerns, or "".
    """

    steps: tuple[Step, ...]
    domain: str = ""

    def to_json(self) -> JsonDict:
        return {"domain": self.domain, "steps": [step.to_json() for step in self.steps]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], kinds: Sequence[type[Step]]) -> Plan:
        """:raises InstructionError: a step that this version of the plugin does not have."""
        known = {kind.name: kind for kind in kinds}
        steps = []
        for item in data["steps"]:
            kind = known.get(item["step"])
            if kind is None:
                raise InstructionError(
                    "plugin.failed",
                    f"the journalled plan has a step {item['step']!r} this plugin lacks: install the version it had",
                )
            steps.append(kind.from_json(item))
        return cls(tuple(steps), data.get("domain", ""))


class Plugin(abc.ABC):
    """One verb.

    :cvar verb: the name in messages, ``[a-z][a-z0-9_]*``.
    :cvar api_version: the `API_VERSION` it was written for.
    :cvar summary: one line for humans.
    :cvar args_schema: JSON Schema (2020-12) of ``args``; give ``additionalProperties: false``.
    :cvar step_kinds: every Step class a plan of this plugin may hold; plans are rebuilt from it.
    :cvar read_only: changes nothing, so its steps are not journalled and simply run again after a crash.
    """

    verb: ClassVar[str]
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    summary: ClassVar[str] = ""
    args_schema: ClassVar[Mapping[str, Any]]
    step_kinds: ClassVar[tuple[type[Step], ...]] = ()
    read_only: ClassVar[bool] = False

    @abc.abstractmethod
    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        """Turn checked arguments into a plan. Changes nothing.

        :raises InstructionError, ToolstackError: refused; nothing was begun.
        """

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        """What the sender gets when every step is done; by default the last step's output."""
        return dict(ctx.outputs.get(plan.steps[-1].name, {})) if plan.steps else {}

    def domain_of(self, args: Mapping[str, Any]) -> str:
        """The key that orders instructions: those with the same key run one after another, "" with no other."""
        return str(args.get("uuid", ""))


def own_domain(host: Host, uuid: str) -> DomainInfo:
    """The domain, if it is provably ours.

    :raises DomainNotFound: no such domain.
    :raises NotOurs: it lacks this node's marker.
    """
    info = host.toolstack.get_domain(uuid)
    if not host.owner or info.owner != host.owner:
        raise NotOurs(
            f"domain {uuid} ({info.name}) was not made by this agent (owner {info.owner or 'none'!r}): "
            "use the tool that made it"
        )
    return info
