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

A step may be the *point of no return* (`Step.commits`): once it is done the plan only goes forward. Its undo raises
`TooLate` when it finds that it has happened after all.

Steps that several verbs take are in `agent.steps`, `agent.resizing`, `agent.migrating`, `agent.configdrive` and
`agent.images.remote.steps`; a plugin may import those, too.

A new verb is one module with a `Plugin` subclass and one line in the
entry-point group ``reeve.instructions``; ``docs/instructions.md`` describes
the verbs of this distribution.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Protocol, Self

from agent.argument_schemas import (
    DEVICE_WAIT_SCHEMA,
    DISK_SCHEMA,
    FILE_SCHEMA,
    MAX_MEMORY_MIB,
    METADATA_SCHEMA,
    NAME_SCHEMA,
    NIC_SCHEMA,
    ONE_DOMAIN_SCHEMA,
    PATH_SCHEMA,
    UUID_SCHEMA,
    WAIT_SCHEMA,
)
from agent.errors import BrokerError, InstructionError, ReplyTimeout
from hypervisor.errors import NotOurs
from hypervisor.toolstack.api import DomainInfo, Toolstack

if TYPE_CHECKING:
    from oslo_config import cfg

    from agent.control import Control
    from agent.images.remote.fetcher import Fetcher

__all__ = [
    "API_VERSION",
    "DEVICE_WAIT_SCHEMA",
    "DISK_SCHEMA",
    "FILE_SCHEMA",
    "MAX_MEMORY_MIB",
    "METADATA_SCHEMA",
    "NAME_SCHEMA",
    "NIC_SCHEMA",
    "ONE_DOMAIN_SCHEMA",
    "PATH_SCHEMA",
    "UUID_SCHEMA",
    "WAIT_SCHEMA",
    "BootImage",
    "BrokerError",
    "Check",
    "Claims",
    "Context",
    "Host",
    "Images",
    "InstructionError",
    "JsonDict",
    "NoPeers",
    "Peers",
    "Plan",
    "Plugin",
    "ReplyTimeout",
    "Step",
    "TooLate",
    "own_agent",
    "own_domain",
]

API_VERSION = (1, 4)
"""A plugin runs on the major it was written for, from its minor on; another one is reported and left out."""

JsonDict = dict[str, Any]


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


class Peers(Protocol):
    """The agents of other hosts, and this one's own queue: spoken to as a scheduler does, over the broker."""

    def call(self, host: str, verb: str, args: JsonDict, *, ident: str, timeout: float, expire: bool) -> JsonDict:
        """Send an instruction and wait for its result.

        The same `ident` again is the same instruction: it is not carried out twice, and its outcome is told again.

        :param timeout: seconds to wait; gives way when the agent is stopped.
        :param expire: the instruction is void when it is not begun by then; otherwise it waits for its agent.
        :raises InstructionError: with the code of the other agent's refusal or failure.
        :raises ReplyTimeout: no answer; it may still be carried out. :raises BrokerError: perhaps not sent.
        """

    def tell(self, host: str, verb: str, args: JsonDict, *, ident: str) -> None:
        """Have an instruction sent as soon as there is a broker, whatever dies before. Nobody waits for the reply."""

    def call_all(
        self,
        host: str,
        verb: str,
        calls: Sequence[tuple[str, JsonDict]],
        *,
        at_once: int,
        done: Callable[[str, JsonDict | InstructionError], None],
        more: Callable[[], bool],
    ) -> None:
        """Send many, (ident, args) each, at most `at_once` unanswered, and tell `done` of each outcome as it comes.

        Ends when every one that was sent is answered. The broker may go and come back meanwhile.

        :param more: asked before another one is sent; False: it is left out, as are all after it.
        """


class NoPeers:
    """Where there is no broker: nobody else can be asked."""

    def call(self, host: str, verb: str, args: JsonDict, *, ident: str, timeout: float, expire: bool) -> JsonDict:
        self._alone(host)

    def tell(self, host: str, verb: str, args: JsonDict, *, ident: str) -> None:
        self._alone(host)

    def call_all(
        self,
        host: str,
        verb: str,
        calls: Sequence[tuple[str, JsonDict]],
        *,
        at_once: int,
        done: Callable[[str, JsonDict | InstructionError], None],
        more: Callable[[], bool],
    ) -> None:
        self._alone(host)

    def _alone(self, host: str) -> NoReturn:
        raise BrokerError(
            f"host {host!r} cannot be asked from here: send the instruction to the agent", retryable=False
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """What a plugin sees of its node.

    :ivar name: the host's name, as instructions address it.
    :ivar owner: the marker that makes a domain ours (`DomainSpec.owner`); never changes for a node,
        not even when its hostname does.
    :ivar settings: strings from the configuration that plugins may read.
    :ivar peers: the way to other hosts. :ivar sources: images that are fetched; None: none are.
    :ivar control: the agent itself; None where there is none.
    :ivar options: by verb the values of `Plugin.options`, by their names with ``_``.
    """

    name: str
    owner: str
    toolstack: Toolstack
    claims: Claims
    images: Images
    settings: Mapping[str, str]
    peers: Peers = dataclasses.field(default_factory=NoPeers)
    sources: Fetcher | None = None
    control: Control | None = None
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


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

    def progress(self, done: float, total: float, unit: str, **more: Any) -> None:
        """Tell whoever listens how far a step is; may be called often. `more`: further JSON values."""


class TooLate(Exception):
    """Raised by the undo of a step that `Step.commits`: it has happened, and the plan goes on.

    :param output: what its run would have returned.
    """

    def __init__(self, output: JsonDict) -> None:
        super().__init__()
        self.output = output


@dataclasses.dataclass(frozen=True)
class Step(abc.ABC):
    """One thing to do. Subclasses are frozen dataclasses whose fields are JSON values.

    :cvar name: unique in its plugin and stable: it is stored in journals.
    :cvar title: what it does, for a human.
    :cvar changes: False for a step that only looks or waits: it leaves nothing to undo.
    :cvar commits: True for the point of no return. Once it is done the deadline does not count any more, and a later
        step that fails is tried again until the agent gives up (``unknown_seconds``); nothing is undone.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    changes: ClassVar[bool] = True
    commits: ClassVar[bool] = False

    @abc.abstractmethod
    def run(self, ctx: Context) -> JsonDict | None:
        """Do it; what it returns is journalled and shown to later steps in `Context.outputs`.

        :raises InstructionError, ToolstackError: it failed; the plan is undone.
        """

    @abc.abstractmethod
    def check(self, ctx: Context) -> Check:
        """Look at the world: has this step happened?"""

    def undo(self, ctx: Context) -> None:  # noqa: B027 - nothing to undo is the common case
        """Take it back as far as the world shows that it is ours; must be repeatable.

        :raises TooLate: the step `commits`, and has happened.
        """

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
    :cvar api_version: the `API_VERSION` it was written for; a distribution of its own has to say it.
    :cvar options: oslo.config options of its own, in the group ``[plugin_<verb>]``; see `Host.options`.
    :cvar summary: one line for humans.
    :cvar args_schema: JSON Schema (2020-12) of ``args``; give ``additionalProperties: false``.
    :cvar step_kinds: every Step class a plan of this plugin may hold; plans are rebuilt from it.
    :cvar lane: which workers carry it out. ``work``: the common ones. ``quick``: some of their own, for what somebody
        else's instruction waits for and what must get past busy workers; it must not wait for long itself. ``drain``:
        one of its own, for what waits for other instructions of this host.
    :cvar read_only: changes nothing, so its steps are not journalled and simply run again after a crash.
    """

    verb: ClassVar[str]
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    summary: ClassVar[str] = ""
    args_schema: ClassVar[Mapping[str, Any]]
    step_kinds: ClassVar[tuple[type[Step], ...]] = ()
    options: ClassVar[Sequence[cfg.Opt]] = ()
    read_only: ClassVar[bool] = False
    lane: ClassVar[Literal["work", "quick", "drain"]] = "work"

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


def own_agent(host: Host) -> Control:
    """:raises InstructionError: there is no agent around the plan."""
    if host.control is None:
        raise InstructionError("plugin.no_agent", "only an agent can do this: send it the instruction")
    return host.control
