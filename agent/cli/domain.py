"""`reeve domain`: the domains on this machine, directly through the driver.

A domain that the agent made carries the agent's mark; these commands obey the operator all the same.
What they create carries the mark ``operator``, which the agent does not take for its own.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Callable
from typing import Any

from agent.cli import firstboot, template
from agent.cli.base import List, Show, UsageError, find_domain, plain, progress, show_domain
from agent.cli.devices import disk_of, nic_of
from agent.cli.settings import Connection
from agent.cli.values import memory_mib, pair, read_json_object, seconds
from hypervisor.errors import DomainNotFound, OperationTimeout, SpecInvalid, ToolstackError
from hypervisor.toolstack.api import (
    DomainInfo,
    DomainSpec,
    DomainState,
    DomainType,
    OnEvent,
    Toolstack,
)

OPERATOR = "operator"
LOADERS = ("pv-grub", "pv-grub-i386")
ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})
LIST_COLUMNS = ("uuid", "name", "domid", "state", "vcpus", "memory_mib", "owner")


class DomainList(List):
    """List every domain on this host, foreign ones included, ordered by domid."""

    examples = (
        ("reeve domain list", "all of them"),
        ("reeve domain list --state running -f value -c name", "names of the running ones, one per line"),
        ("reeve domain list -f json", "for a program"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        states = [state.value for state in DomainState]
        parser.add_argument("--state", choices=states, help="only domains in this state")
        parser.add_argument("--owner", help="only domains with this owner's mark; '' for foreign ones")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with self.toolstack() as toolstack:
            found = toolstack.list_domains()
        rows = []
        for info in found:
            if parsed_args.state in (None, info.state.value) and parsed_args.owner in (None, info.owner):
                data = plain(info.to_json())
                rows.append(tuple(data[column] for column in LIST_COLUMNS))
        return LIST_COLUMNS, rows


class OneDomain(Show):
    """A command about one domain; its result is the domain."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
            self.act(toolstack, info, parsed_args)
            return show_now(toolstack, info)

    def act(self, toolstack: Toolstack, info: DomainInfo, parsed_args: argparse.Namespace) -> None:
        """Do it; the domain is shown as it is afterwards."""


class DomainShow(OneDomain):
    """Show one domain."""

    examples = (
        ("reeve domain show web", "by name"),
        ("reeve domain show 5f1c6f0e-… -f json", "by UUID, for a program"),
        ("reeve domain show web --spec -f json", "what it was made from"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--spec", action="store_true", help="show the spec it was made from instead of its state")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        if not parsed_args.spec:
            return super().take_action(parsed_args)
        with self.toolstack() as toolstack:
            data = plain(toolstack.get_spec(find_domain(toolstack, parsed_args.domain).uuid).to_json())
        return tuple(data), tuple(data.values())


class Verb(OneDomain):
    """A verb that may be waited for.

    :cvar verb: the driver's method.
    :cvar reached: whether what was asked has happened; None when the verb is done as it returns.
    """

    verb: str = ""
    reached: Callable[[DomainInfo, DomainInfo | None], bool] | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        if self.reached is not None:
            parser.add_argument(
                "--wait",
                type=seconds,
                metavar="SECONDS",
                help="wait so long for the guest to do it; without it the command returns once the guest is asked",
            )

    def act(self, toolstack: Toolstack, info: DomainInfo, parsed_args: argparse.Namespace) -> None:
        getattr(toolstack, self.verb)(info.uuid)
        timeout = getattr(parsed_args, "wait", None)
        if self.reached is not None and timeout is not None:
            with progress(f"waiting for {info.name} to {self.verb}"):
                wait_until(toolstack, info, self.reached, timeout, self.verb)


class DomainDestroy(Verb):
    """End a domain now and free what it held. The guest is not asked."""

    verb = "destroy"
    examples = (
        ("reeve domain destroy web", "as pulling the plug"),
        ("reeve domain shutdown web --wait 30 || reeve domain destroy web", "gently first"),
    )

    def act(self, toolstack: Toolstack, info: DomainInfo, parsed_args: argparse.Namespace) -> None:
        super().act(toolstack, info, parsed_args)
        firstboot.remove_drive(info.uuid, self.connection.config_drive_dir)


class DomainShutdown(Verb):
    """Ask the guest to power off."""

    verb = "shutdown"
    reached = staticmethod(lambda before, now: now is None or now.state in ENDED)
    examples = (
        ("reeve domain shutdown web", "ask, do not wait"),
        ("reeve domain shutdown web --wait 60", "exit code 1 (domain.timeout) if it still runs after a minute"),
    )


class DomainReboot(Verb):
    """Ask the guest to reboot. Its UUID stays, its domid changes."""

    verb = "reboot"
    reached = staticmethod(lambda before, now: now is None or now.state in ENDED or now.domid != before.domid)
    examples = (("reeve domain reboot web --wait 60", "ask and wait until it was built anew"),)


class DomainReset(Verb):
    """End a domain and build it anew from its spec, without asking the guest. It runs afterwards."""

    verb = "reset"
    examples = (("reeve domain reset web", "as pressing the reset button; also revives an ended domain"),)


class DomainPause(Verb):
    """Stop a domain's vCPUs. It keeps its memory; see unpause."""

    verb = "pause"
    examples = (("reeve domain pause web", "no effect when it is paused already"),)


class DomainUnpause(Verb):
    """Let a paused domain run."""

    verb = "unpause"
    examples = (("reeve domain unpause web", "no effect when it runs already"),)


class DomainCreate(Show):
    """Make a domain from a kernel or an image, and let it run."""

    examples = (
        ("reeve domain create web --image demo --memory 256M", "from an image of `reeve image build`"),
        ("reeve domain create t1 --kernel vmlinuz --ramdisk initrd.img --cmdline console=hvc0", "from files"),
        (
            "reeve domain create web --loader pv-grub --disk xvda=/srv/web.qcow2,format=qcow2 --nic network=default",
            "from a disk with a kernel of its own",
        ),
        (
            "reeve domain create web --loader pv-grub --disk xvda=/srv/web.qcow2,format=qcow2 --nic '' "
            "--ssh-key ~/.ssh/id_ed25519.pub --user-data web.yaml",
            "and a config drive for its cloud-init",
        ),
        ("reeve domain create web2 --from-checkpoint web", "already booted, from a template"),
        ("reeve domain create --spec web.json --paused", "from a spec; see `reeve domain show NAME --spec -f json`"),
    )
    notes = (
        "Options given beside --spec win over the file. If the domain cannot be let run it is destroyed again.\n"
        "It carries the owner mark 'operator': the agent lists it and leaves it alone."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("name", nargs="?", metavar="NAME", help="1 to 63 of A-Z a-z 0-9 . _ -")
        add("--spec", metavar="FILE", help="a JSON domain spec; - reads standard input")
        add("--uuid", help="default: a random one")
        add("--image", help="an image of `reeve image list`: gives kernel, ramdisk and command line")
        add("--kernel", metavar="FILE", help="ELF or bzImage")
        add("--ramdisk", metavar="FILE")
        add("--cmdline", metavar="TEXT", help="kernel command line (write --cmdline=TEXT when it begins with '-')")
        add("--memory", type=memory_mib, metavar="SIZE", help="MiB, or with a unit: 256M, 1G (default 256M)")
        add("--vcpus", type=int, metavar="N", help="default 1")
        add("--max-vcpus", type=int, metavar="N", help="most it may be resized to while it runs (default: --vcpus)")
        add("--max-memory", type=memory_mib, metavar="SIZE", help="likewise (default: --memory)")
        add("--disk", action="append", metavar="ID=PATH[,format=qcow2][,readonly]…", help="a disk; repeatable")
        add("--nic", action="append", metavar="[network=N][,mac=M][,address=A]…", help="a nic, or '' ; repeatable")
        add("--from-checkpoint", metavar="NAME", help="a template of `reeve template list`: begin as its guest was")
        add("--loader", choices=LOADERS, help="GRUB boots the kernel that is on the first disk")
        firstboot.add_arguments(parser)
        add("--weight", type=int, metavar="N", help="share of the CPU, 256 being usual")
        add("--cap", type=int, metavar="PERCENT", help="most CPU it gets, percent of one CPU; 0: no cap")
        for event in ("poweroff", "reboot", "crash"):
            actions = [action.value for action in OnEvent]
            add(f"--on-{event}", choices=actions, help=f"what happens after a {event} of the guest")
        add("--type", choices=[kind.value for kind in DomainType], help="default pv")
        add("--metadata", action="append", default=[], metavar="KEY=VALUE", help="kept with the domain; repeatable")
        add("--paused", action="store_true", help="leave it paused; `reeve domain unpause` lets it run")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        origin = parsed_args.from_checkpoint
        with self.toolstack() as toolstack:
            if origin is None:
                spec = make_spec(parsed_args, self.connection)
            else:
                spec = template.spec_of(toolstack.template_get(origin), parsed_args, OPERATOR)
            drive = firstboot.config_drive(firstboot.wanted(parsed_args), spec, self.connection.config_drive_dir)
            with drive as spec:
                with progress(f"building {spec.name}"):
                    info = toolstack.create(spec) if origin is None else toolstack.clone(origin, spec)
                if not parsed_args.paused:
                    try:
                        toolstack.unpause(info.uuid)
                    except ToolstackError:
                        toolstack.destroy(info.uuid)
                        raise
                return show_now(toolstack, info)


class DomainWait(Show):
    """Wait until a domain is in a state, or gone."""

    examples = (
        ("reeve domain wait web --state running --timeout 30", "exit code 1 (domain.timeout) if it is not by then"),
        ("reeve domain wait web --state gone", "until it was destroyed"),
        ("reeve domain wait web --state shutdown --state crashed", "until it ended by itself, either way"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        states = [state.value for state in DomainState if state is not DomainState.UNKNOWN]
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument(
            "--state", action="append", choices=[*states, "gone"], help="repeatable; default: shutdown, crashed, gone"
        )
        parser.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="default 60")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        wanted = set(parsed_args.state or ["shutdown", "crashed", "gone"])
        states = frozenset(DomainState(state) for state in wanted - {"gone"})
        with self.toolstack() as toolstack:
            try:
                info = find_domain(toolstack, parsed_args.domain)
            except DomainNotFound:
                if "gone" in (parsed_args.state or []):
                    return ("name", "state"), (parsed_args.domain, "gone")
                raise
            with progress(f"waiting for {info.name} to be {' or '.join(sorted(wanted))}"):
                found = toolstack.wait(info.uuid, states, parsed_args.timeout)
        if found is None and "gone" not in wanted:
            raise DomainNotFound(f"domain {info.name} is gone and will not be {' or '.join(sorted(wanted))}")
        return show_gone(info) if found is None else show_domain(found)


def make_spec(parsed_args: argparse.Namespace, connection: Connection) -> DomainSpec:
    """Options, image and file put together.

    :raises UsageError: something is missing. :raises SpecInvalid: a value is not usable.
    """
    data: dict[str, Any] = read_json_object(parsed_args.spec) if parsed_args.spec else {}
    boot, metadata = mapping(data, "boot"), mapping(data, "metadata")
    if parsed_args.image:
        from agent.cli.image import boot_of

        boot.update(boot_of(parsed_args.image, connection.image_dir))
    if parsed_args.loader:
        boot["kernel"] = connection.loader(parsed_args.loader)
    for field in ("kernel", "ramdisk", "cmdline"):
        if getattr(parsed_args, field) is not None:
            boot[field] = getattr(parsed_args, field)
    options = {
        "name": parsed_args.name,
        "uuid": parsed_args.uuid,
        "memory_mib": parsed_args.memory,
        "vcpus": parsed_args.vcpus,
        "max_vcpus": parsed_args.max_vcpus,
        "max_memory_mib": parsed_args.max_memory,
        "weight": parsed_args.weight,
        "cap": parsed_args.cap,
        "disks": [disk_of(text) for text in parsed_args.disk] if parsed_args.disk else None,
        "nics": [nic_of(text, n) for n, text in enumerate(parsed_args.nic)] if parsed_args.nic else None,
        "on_poweroff": parsed_args.on_poweroff,
        "on_reboot": parsed_args.on_reboot,
        "on_crash": parsed_args.on_crash,
        "type": parsed_args.type,
    }
    data.update({field: value for field, value in options.items() if value is not None})
    metadata.update(dict(pair(item) for item in parsed_args.metadata))
    if not data.get("name"):
        raise UsageError("no name given: reeve domain create NAME …")
    if not boot.get("kernel"):
        raise UsageError(
            "nothing to boot: give --image NAME, --kernel FILE and perhaps --ramdisk FILE, or --loader and --disk"
        )
    data.setdefault("uuid", str(uuid.uuid4()))
    data.setdefault("memory_mib", 256)
    data.setdefault("owner", OPERATOR)
    spec = DomainSpec.from_json({**data, "boot": boot, "metadata": metadata})
    spec.validate()
    return spec


def mapping(data: dict[str, Any], field: str) -> dict[str, Any]:
    value = data.get(field) or {}
    if not isinstance(value, dict):
        raise SpecInvalid(f"{field} is {value!r}: give an object")
    return dict(value)


def wait_until(
    toolstack: Toolstack,
    before: DomainInfo,
    reached: Callable[[DomainInfo, DomainInfo | None], bool],
    timeout: float,
    what: str,
) -> None:
    """Look until `reached` says so of the domain before and now (None: gone).

    :raises OperationTimeout: it did not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not reached(before, existing(toolstack, before.uuid)):
        left = deadline - time.monotonic()
        if left <= 0:
            raise OperationTimeout(
                f"the guest of {before.name} did not {what} within {timeout:g} s: wait longer, look at"
                f" `reeve domain console-log {before.name}`, or use reset or destroy"
            )
        time.sleep(min(0.05, left))


def existing(toolstack: Toolstack, uuid_text: str) -> DomainInfo | None:
    try:
        return toolstack.get_domain(uuid_text)
    except DomainNotFound:
        return None


def show_now(toolstack: Toolstack, before: DomainInfo) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """The domain as it is now, or as it was with state ``gone``."""
    now = existing(toolstack, before.uuid)
    return show_domain(now) if now is not None else show_gone(before)


def show_gone(before: DomainInfo) -> tuple[tuple[str, ...], tuple[object, ...]]:
    names, values = show_domain(before)
    return names, tuple("gone" if name == "state" else value for name, value in zip(names, values, strict=True))
