"""What this host has, in Placement's words. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from agent.placement.answers import MAX_INT
from agent.resources import Capacity
from hypervisor.toolstack.api import HostInfo

VCPU, MEMORY_MB = "VCPU", "MEMORY_MB"
CLASSES = frozenset((VCPU, MEMORY_MB))
"""Resource classes that are ours; the others of our provider belong to whoever made them."""
FIELDS = ("total", "reserved", "min_unit", "max_unit", "step_size", "allocation_ratio")
OWN_TRAITS = "CUSTOM_REEVE"
"""Traits with this prefix, and those of `CPU_TRAITS`, are ours to set and to take away."""
CPU_TRAITS = {
    "abm": "HW_CPU_X86_ABM",
    "aes": "HW_CPU_X86_AESNI",
    "avx": "HW_CPU_X86_AVX",
    "avx2": "HW_CPU_X86_AVX2",
    "bmi1": "HW_CPU_X86_BMI",
    "bmi2": "HW_CPU_X86_BMI2",
    "f16c": "HW_CPU_X86_F16C",
    "fma": "HW_CPU_X86_FMA3",
    "mmx": "HW_CPU_X86_MMX",
    "pclmulqdq": "HW_CPU_X86_CLMUL",
    "sha": "HW_CPU_X86_SHA",
    "sse": "HW_CPU_X86_SSE",
    "sse2": "HW_CPU_X86_SSE2",
    "sse3": "HW_CPU_X86_SSE3",
    "sse4_1": "HW_CPU_X86_SSE41",
    "sse4_2": "HW_CPU_X86_SSE42",
    "sse4a": "HW_CPU_X86_SSE4A",
    "ssse3": "HW_CPU_X86_SSSE3",
}
"""Feature as the driver calls it (Xen's names) → Placement's standard trait."""
CPU_FEATURES = "cpu_features"
"""Key of `HostInfo.detail`: what every guest of this host can count on, separated by blanks."""


def inventories(capacity: Capacity, vcpu_ratio: float) -> dict[str, dict[str, Any]]:
    """By resource class; one of which the host has nothing is left out.

    The largest amounts are what a claim would allow (`agent.resources`): a domain may have more vCPUs than the host
    has CPUs, if the ratio allows it.
    """
    memory, reserved = capacity.memory_total_mib, min(capacity.memory_reserved_mib, capacity.memory_total_mib)
    found = {
        VCPU: _inventory(capacity.cpus, 0, capacity.vcpus_total, vcpu_ratio),
        MEMORY_MB: _inventory(memory, reserved, memory - reserved, 1.0),
    }
    return {name: row for name, row in found.items() if row["total"] > 0}


def _inventory(total: int, reserved: int, most: int, ratio: float) -> dict[str, Any]:
    return {
        "total": min(total, MAX_INT),
        "reserved": min(reserved, MAX_INT),
        "min_unit": 1,
        "max_unit": min(max(1, most), MAX_INT),
        "step_size": 1,
        "allocation_ratio": float(ratio),
    }


def merged(found: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """All inventories of the provider: `ours`, and of `found` those of other classes."""
    others = {name: row for name, row in found.items() if name not in CLASSES}
    return {name: {key: row[key] for key in FIELDS if key in row} for name, row in {**others, **ours}.items()}


def same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether Placement has what it should; it may keep a ratio with single precision."""
    return found.keys() == wanted.keys() and all(
        math.isclose(found[name].get(key, -1), value, rel_tol=1e-6)
        for name, row in wanted.items()
        for key, value in row.items()
    )


def traits(host: HostInfo) -> set[str]:
    """That it is Reeve, with which driver and abilities, and what every guest's processor has for certain."""
    made = {OWN_TRAITS, f"{OWN_TRAITS}_DRIVER_{_word(host.driver)}"}
    made |= {f"{OWN_TRAITS}_{_word(capability)}" for capability in host.capabilities}
    features = dict(host.detail).get(CPU_FEATURES, "").split()
    return {name[:255] for name in made} | {CPU_TRAITS[feature] for feature in features if feature in CPU_TRAITS}


def ours(trait: str) -> bool:
    return trait == OWN_TRAITS or trait.startswith(f"{OWN_TRAITS}_") or trait in CPU_TRAITS.values()


def _word(text: str) -> str:
    return re.sub("[^A-Z0-9]", "_", text.upper())
