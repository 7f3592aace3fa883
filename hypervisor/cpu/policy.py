"""What one guest may know of its processor, as data: levelled, saved with the guest, compared between hosts.

A `CpuPolicy` holds the answer to each CPUID leaf but Xen's own, and the constants that model-specific registers read
as. It is made once, when the domain is: from what the engine offers, less what PV forbids, less what the level and
the list of features take away. A domain that moves takes it along, so nothing it was told changes; `missing` says
what stands against that. The leaves are those of a CPUID_POLICY record in Xen's migration stream.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from hypervisor.cpu.features import BITS, EBX, EDX, FUNDAMENTAL, LEVELS, LONG_MODE, WORDS, names
from hypervisor.errors import SpecInvalid, Unsupported

Leaf = tuple[int, int, int, int]
Cpuid = Callable[[int, int], Leaf]
VERSION = 1
DEFAULT = "engine"
"""The level that takes nothing away."""

_EXTENDED = 0x8000_0000
_MAX_BASIC, _MAX_EXTENDED = 0xD, 0x8000_0008
SUBLEAVES = {4: 4, 7: 1, 0xB: 2, 0xD: 2}
"""Leaves that have subleaves, and how many of them a policy holds."""
_MAX_LEAVES = 256

# What belongs to the hypervisor or what the engine cannot do, by name (Xen: public/arch-x86/cpufeatureset.h, where
# no "A" or "S" stands; and the engine has neither XSAVE nor what needs it).
_NOT_FOR_PV = frozenset(
    names("""
    dtes64 monitor vmx smx est tm2 fma pdcm pcid dca x2apic tsc_deadline_timer xsave osxsave avx f16c rdrand ds_cpl
    vme de pse mce mtrr pge mca pat pse36 pn dts acpi ht tm pbe svm extapic skinit wdt osvw ibs lwp fma4 xop tbm
    topoext perfctr_core perfctr_nb bpext ptsc perfctr_llc mwaitx nodeid_msr cmp_legacy cr8_legacy misalignsse tce
    pdpe1gb rdtscp""")
)
_ENGINES_OWN = ("lm", "syscall", "nx")
_ADDED = frozenset(("hypervisor", "constant_tsc"))
_EMPTY = frozenset((5, 6, 7, 0xA, 0xB, 0xD))
"""Leaves about what is Xen's (power, counters, topology) or what the engine lacks: zeros."""
_REPEATED = 0x0183_F3FF
"""Bits of leaf 1 that AMD's extended leaf repeats."""

CONSTANT_MSRS = {
    0x17: 0,  # platform id
    0x2A: 0,
    0x3A: 1,  # feature control: locked
    0x8B: 0,  # microcode revision
    0xCE: 0,  # platform info: no CPUID faulting for the guest's own use
    0xFE: 0,  # no MTRRs
    0x140: 0,
    0x179: 0,  # no machine-check banks
    0x17A: 0,
    0x1A0: 0,
    0x2FF: 0,
    0xC001_0114: 0,
    0xC001_0015: 0,
    0xC001_001F: 0,
    0x1B: 0xFEE0_0100,
    0x277: 0x0005_0100_0007_0406,  # PAT as Xen sets it
}
"""Model-specific registers that read the same at all times."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A level and what is taken from or added to it, as an operator writes it: ``x86-64-v2,+aes,-popcnt``."""

    level: str = DEFAULT
    on: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Choice:
        """:raises SpecInvalid: no such level or feature."""
        level = DEFAULT
        on: set[str] = set()
        off: set[str] = set()
        for number, part in enumerate(item.strip() for item in text.split(",") if item.strip()):
            if part[0] in "+-":
                if part[1:] not in BITS or part[1:] in _NOT_FOR_PV - LEVELS["x86-64-v3"]:
                    raise SpecInvalid(f"cpu policy {text!r}: {part[1:]!r} is no feature that a guest could have")
                (on if part[0] == "+" else off).add(part[1:])
            elif number == 0 and (part == DEFAULT or part in LEVELS):
                level = part
            else:
                known = ", ".join((DEFAULT, *LEVELS))
                raise SpecInvalid(
                    f"cpu policy {text!r}: {part!r} is neither a level ({known}) nor +feature or -feature"
                )
        needed = off & (on | LEVELS["x86-64"] | {"hypervisor"})
        if needed:
            raise SpecInvalid(f"cpu policy {text!r}: {', '.join(sorted(needed))} cannot be taken away")
        return cls(level, frozenset(on), frozenset(off))

    def allows(self, name: str) -> bool:
        if name in self.off:
            return False
        return self.level == DEFAULT or name in self.on or name in FUNDAMENTAL or name in LEVELS[self.level]

    @property
    def promised(self) -> frozenset[str]:
        """What a guest with this choice counts on."""
        return (LEVELS.get(self.level, frozenset()) | self.on) - self.off

    @property
    def certain(self) -> list[str]:
        """What every 64-bit guest has, whatever the engine: what is promised, and the least that x86-64 has."""
        return sorted(self.promised | LEVELS["x86-64"])


@dataclasses.dataclass(frozen=True, slots=True)
class CpuPolicy:
    """See the module.

    :ivar name: where it came from, for people.
    :ivar leaves: (leaf, subleaf) → EAX, EBX, ECX, EDX; a leaf without subleaves is under subleaf 0. What is not there
        reads as zeros.
    :ivar msrs: number → value.
    """

    name: str
    leaves: Mapping[tuple[int, int], Leaf]
    msrs: Mapping[int, int]

    def query(self, leaf: int, subleaf: int) -> Leaf:
        return self.leaves.get((leaf, subleaf if leaf in SUBLEAVES else 0), (0, 0, 0, 0))

    @property
    def features(self) -> frozenset[str]:
        """Names of what is there."""
        there = {word: self.query(word.leaf, 0)[word.register] for word in WORDS}
        return frozenset(
            name for word, bits in there.items() for bit, name in enumerate(word.names) if name and bits >> bit & 1
        )

    def hidden(self, native: Cpuid) -> dict[tuple[int, int], int]:
        """(leaf, register) → feature bits that the engine has and the guest does not.

        Long mode and what it needs stay: the engine runs 32-bit guests in it.
        """
        masks: dict[tuple[int, int], int] = {}
        for word in WORDS:
            bits = native(word.leaf, 0)[word.register] & ~self.query(word.leaf, 0)[word.register]
            for name in _ENGINES_OWN:
                leaf, register, bit = BITS[name]
                if (leaf, register) == (word.leaf, word.register):
                    bits &= ~(1 << bit)
            if bits:
                masks[word.leaf, word.register] = bits
        return masks

    @property
    def vendor(self) -> str:
        _, b, c, d = self.query(0, 0)
        return b"".join(word.to_bytes(4, "little") for word in (b, d, c)).decode("latin-1")

    def missing(self, host: CpuPolicy) -> list[str]:
        """Why a guest with this policy cannot go on where `host` is all that is offered; empty when it can."""
        why = [f"feature {name}" for name in sorted(self.features - host.features)]
        if self.vendor != host.vendor:
            why.append(f"a processor by {self.vendor}, not {host.vendor}")
        for first, what in ((0, "leaf"), (_EXTENDED, "extended leaf")):
            mine, theirs = self.query(first, 0)[0], host.query(first, 0)[0]
            if mine > theirs:
                why.append(f"{what} {mine:#x}, the last one is {theirs:#x}")
        return why + [f"MSR {number:#x}" for number in sorted(self.msrs.keys() - host.msrs.keys())]

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "version": VERSION,
            "name": self.name,
            "leaves": [[leaf, subleaf, *words] for (leaf, subleaf), words in sorted(self.leaves.items())],
            "msrs": [[number, value] for number, value in sorted(self.msrs.items())],
        }

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> CpuPolicy:
        """:raises SpecInvalid: not such a form, or a later version's."""
        try:
            if data["version"] != VERSION:
                raise SpecInvalid(f"a cpu policy of version {data['version']}; this host knows {VERSION}")
            if len(data["leaves"]) > _MAX_LEAVES or len(data["msrs"]) > _MAX_LEAVES:
                raise ValueError("too many entries")
            leaves = {(_number(leaf, 32), _number(sub, 32)): _words(words) for leaf, sub, *words in data["leaves"]}
            msrs = {_number(number, 32): _number(value, 64) for number, value in data["msrs"]}
            return cls(str(data["name"]), leaves, msrs)
        except (KeyError, TypeError, ValueError) as exc:
            raise SpecInvalid(f"not a cpu policy: {exc}") from exc


def _number(value: Any, bits: int) -> int:
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise ValueError(f"{value!r} is no number of {bits} bits")
    return value


def _words(values: list[Any]) -> Leaf:
    a, b, c, d = (_number(value, 32) for value in values)
    return a, b, c, d


def offered(native: Cpuid, bits: int) -> CpuPolicy:
    """The most a guest of that word size can have on this engine."""
    return build(native, Choice(), bits)


def build(native: Cpuid, choice: Choice, bits: int) -> CpuPolicy:
    """The policy of a new domain.

    :param native: CPUID of the engine.
    :raises Unsupported: the engine lacks something the choice promises.
    """
    leaves: dict[tuple[int, int], Leaf] = {}
    for first, most in ((0, _MAX_BASIC), (_EXTENDED, _MAX_EXTENDED)):
        last = min(native(first, 0)[0], most)
        for leaf in range(first, last + 1):
            for subleaf in range(SUBLEAVES.get(leaf, 1)):
                leaves[leaf, subleaf] = (0, 0, 0, 0) if leaf in _EMPTY else _leaf(native, leaf, subleaf)
        leaves[first, 0] = last, *leaves.get((first, 0), (0, 0, 0, 0))[1:]
    _level(leaves, choice, bits)
    policy = CpuPolicy(_text(choice), leaves, dict(CONSTANT_MSRS))
    lacking = choice.promised - policy.features - (LONG_MODE if bits == 32 else frozenset())
    if lacking:
        raise Unsupported(
            f"cpu policy {policy.name}: the engine has no {', '.join(sorted(lacking))}; choose a lower level"
        )
    return policy


def _leaf(native: Cpuid, leaf: int, subleaf: int) -> Leaf:
    a, b, c, d = native(leaf, subleaf)
    if leaf == 1:
        return a, b & 0x00FF_FFFF, c, d  # no initial APIC id: the guest numbers its vCPUs itself
    return (0, 0, 0, 0) if leaf == 0x8000_0007 else (a, b, c, d)


def _level(leaves: dict[tuple[int, int], Leaf], choice: Choice, bits: int) -> None:
    """Take from the feature words what the guest may not have."""
    for word in WORDS:
        key = (word.leaf, 0)
        if key not in leaves:
            continue
        registers = list(leaves[key])
        found, kept = registers[word.register], 0
        for bit, name in enumerate(word.names):
            there = found >> bit & 1 or name in _ADDED
            if name and there and name not in _NOT_FOR_PV and choice.allows(name):
                kept |= 0 if bits == 32 and name in LONG_MODE else 1 << bit
        registers[word.register] = kept
        leaves[key] = (registers[0], registers[1], registers[2], registers[3])
    again = leaves.get((_EXTENDED + 1, 0))
    if again is not None and leaves[0, 0][EBX] == int.from_bytes(b"Auth", "little"):
        leaves[_EXTENDED + 1, 0] = (*again[:3], again[3] | leaves[1, 0][EDX] & _REPEATED)


def _text(choice: Choice) -> str:
    signs = [f"+{name}" for name in sorted(choice.on)] + [f"-{name}" for name in sorted(choice.off)]
    return ",".join((choice.level, *signs))


def for_domain(wanted: str | Mapping[str, Any], native: Cpuid, bits: int) -> CpuPolicy:
    """The policy that a configuration asks for: a choice in words, or a saved policy (JSON text or its object).

    :raises SpecInvalid: it says nothing that makes sense.
    :raises Unsupported: this engine cannot give it; the text names what is missing.
    """
    if isinstance(wanted, str):
        if not wanted.lstrip().startswith("{"):
            return build(native, Choice.parse(wanted), bits)
        try:
            wanted = json.loads(wanted)
        except ValueError as exc:
            raise SpecInvalid(f"not a cpu policy: {exc}") from exc
        if not isinstance(wanted, Mapping):
            raise SpecInvalid("not a cpu policy: no JSON object")
    policy = CpuPolicy.restore(wanted)
    why = policy.missing(offered(native, bits))
    if why:
        raise Unsupported(f"this host cannot give the guest its cpu policy {policy.name}: it lacks {', '.join(why)}")
    return policy
