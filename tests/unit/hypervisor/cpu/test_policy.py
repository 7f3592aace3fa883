"""Processor policies: what a level leaves, that a saved one means the same again, what stands between two hosts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hypervisor.cpu.features import BITS, ECX, EDX, LEVELS
from hypervisor.cpu.policy import VERSION, Choice, CpuPolicy, Leaf, build, for_domain, offered
from hypervisor.engines import unicorn
from hypervisor.errors import SpecInvalid, Unsupported


def engine(*without: str, vendor: bytes = b"GenuineIntel", last: int = 0xB) -> Any:
    """CPUID of an engine that claims everything but `without`."""

    def native(leaf: int, _subleaf: int) -> Leaf:
        words = [leaf, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF]
        if leaf in (0, 0x8000_0000):
            b, d, c = (int.from_bytes(vendor[at : at + 4], "little") for at in (0, 4, 8))
            return (last if leaf == 0 else 0x8000_0008), b, c, d
        for name in without:
            where, register, bit = BITS[name]
            if where == leaf:
                words[register] &= ~(1 << bit)
        return words[0], words[1], words[2], words[3]

    return native


def policy(text: str, native: Any = None, bits: int = 64) -> CpuPolicy:
    return build(native or engine(), Choice.parse(text), bits)


def test_the_default_takes_nothing_away_but_what_pv_forbids() -> None:
    has = policy("engine").features
    assert {"aes", "popcnt", "sse4_2", "lm", "hypervisor", "constant_tsc"} <= has
    assert not has & {"vmx", "avx", "xsave", "rdrand", "pcid", "mtrr", "pge", "rdtscp", "fsgsbase", "x2apic"}
    assert policy("engine").query(7, 0) == policy("engine").query(0xD, 1) == (0, 0, 0, 0)
    assert policy("engine").query(0xC, 5) == (0, 0, 0, 0) == policy("engine").query(0x8000_0009, 0), "behind the last"


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v1", "x86-64-v2"])
def test_a_level_has_what_it_promises_and_no_other_choice_of_code(level: str) -> None:
    has = policy(level).features
    assert LEVELS[level] <= has
    others = {"sse3", "ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "lahf_lm", "aes", "pclmulqdq", "movbe", "abm"}
    assert has & others == LEVELS[level] & others


def test_single_features_go_and_come() -> None:
    has = policy("x86-64-v2, +aes, -popcnt").features
    assert "aes" in has and "popcnt" not in has and "pclmulqdq" not in has
    assert policy("-aes").features == policy("engine").features - {"aes"}


@pytest.mark.parametrize("text", ["x86-64-v9", "aes", "+aes,-aes", "+vmx", "-sse2", "-hypervisor", "+", "+aes,x86-64"])
def test_what_makes_no_sense(text: str) -> None:
    with pytest.raises(SpecInvalid, match="cpu policy"):
        Choice.parse(text)


def test_what_every_guest_is_certain_to_have() -> None:
    least = Choice.parse("engine").certain
    assert "sse2" in least and "sse3" not in least and "avx" not in least
    assert set(Choice.parse("x86-64-v2,+aes,-popcnt").certain) >= {*least, "aes", "sse4_2"}
    assert "popcnt" not in Choice.parse("x86-64-v2,+aes,-popcnt").certain


@pytest.mark.parametrize(("text", "missing"), [("x86-64-v3", "avx2"), ("x86-64-v2", "sse4_2"), ("+aes", "aes")])
def test_what_the_engine_lacks_is_named(text: str, missing: str) -> None:
    with pytest.raises(Unsupported, match=f"has no .*{missing}.*lower level"):
        policy(text, engine("sse4_2", "aes"))


def test_a_32_bit_guest_has_no_long_mode() -> None:
    has = policy("x86-64-v2", bits=32).features
    assert not has & {"lm", "syscall", "cx16", "lahf_lm"} and "sse4_2" in has
    assert offered(engine(), 32).features == offered(engine(), 64).features - {"lm", "syscall", "cx16", "lahf_lm"}


def test_amd_repeats_the_first_leaf() -> None:
    amd = policy("engine", engine(vendor=b"AuthenticAMD"))
    assert amd.vendor == "AuthenticAMD"
    assert amd.query(0x8000_0001, 0)[EDX] & 1 and amd.query(0x8000_0001, 0)[EDX] >> 24 & 1
    assert not amd.query(0x8000_0001, 0)[EDX] & 1 << 12, "MTRR is Xen's there too"
    assert not policy("engine").query(0x8000_0001, 0)[EDX] & 1


def test_save_and_restore() -> None:
    made = policy("x86-64-v2,+aes")
    data = json.loads(json.dumps(made.save()))
    assert data["version"] == VERSION
    assert CpuPolicy.restore(data) == made
    assert CpuPolicy.restore(data).save() == made.save()


@pytest.mark.parametrize(
    "damage",
    [
        {"version": VERSION + 1},
        {"leaves": [[1, 0, 1, 2, 3]]},
        {"leaves": [[1, 0, 1, 2, 3, 1 << 32]]},
        {"leaves": [[1, 0, 1, 2, 3, True]]},
        {"leaves": [[n, 0, 0, 0, 0, 0] for n in range(300)]},
        {"leaves": 5},
        {"msrs": [[1, -1]]},
        {"msrs": [["a", 1]]},
    ],
)
def test_a_damaged_policy_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid):
        CpuPolicy.restore({**policy("engine").save(), **damage})


def test_no_policy_at_all() -> None:
    for wanted in ("{", "{}", '{"version": 1}'):
        with pytest.raises(SpecInvalid):
            for_domain(wanted, engine(), 64)


def test_a_host_with_less_names_what_it_lacks() -> None:
    mine = policy("engine")
    assert mine.missing(offered(engine(), 64)) == []
    assert mine.missing(offered(engine("aes", "popcnt"), 64)) == ["feature aes", "feature popcnt"]
    assert policy("x86-64").missing(offered(engine("aes", "popcnt"), 64)) == []
    assert mine.missing(offered(engine(vendor=b"AuthenticAMD"), 64)) == [
        "a processor by GenuineIntel, not AuthenticAMD"
    ]
    assert mine.missing(offered(engine(last=5), 64)) == ["leaf 0xb, the last one is 0x5"]


def test_a_guest_that_moves_is_told_what_it_was_told() -> None:
    there = policy("x86-64-v2", engine("aes"))
    here = for_domain(json.dumps(there.save()), engine(), 64)
    assert here == there and "aes" not in here.features
    with pytest.raises(Unsupported, match="lacks feature sse4_2"):
        for_domain(there.save(), engine("sse4_2"), 64)


def test_what_the_engine_must_not_do_either() -> None:
    all_but = policy("-aes,-popcnt").hidden(engine())
    mine = policy("engine").hidden(engine())
    assert all_but[1, ECX] ^ mine[1, ECX] == 1 << 25 | 1 << 23
    assert mine[1, ECX] & 1 << 28 and mine[1, EDX] & 1 << 12, "AVX and MTRRs are for no guest"
    narrow = policy("engine", bits=32).hidden(engine())
    assert narrow[1, ECX] & 1 << 13, "cmpxchg16b"
    assert not narrow[0x8000_0001, EDX] & (1 << 29 | 1 << 11 | 1 << 20), "the engine runs in long mode all the same"


def test_the_engine_gives_the_second_level() -> None:
    native = unicorn.create().cpuid
    assert LEVELS["x86-64-v2"] <= offered(native, 64).features
    with pytest.raises(Unsupported):
        policy("x86-64-v3", native)
