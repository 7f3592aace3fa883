"""Names of processor features and where CPUID shows them (Intel SDM vol. 2A, CPUID; AMD64 APM vol. 3, appendix E).

Names are those of Linux' /proc/cpuinfo, so that an operator meets no others.
"""

from __future__ import annotations

import dataclasses

EAX, EBX, ECX, EDX = range(4)


@dataclasses.dataclass(frozen=True, slots=True)
class Word:
    """A register of a leaf whose bits are features. `names[n]` is bit n's, "" for none."""

    leaf: int
    register: int
    names: tuple[str, ...]


def names(text: str) -> tuple[str, ...]:
    """The words of a table; "-" is one without a name."""
    return tuple("" if name == "-" else name for name in text.split())


WORDS = (
    Word(1, EDX, names("""
        fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse
        sse2 ss ht tm - pbe""")),
    Word(1, ECX, names("""
        sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1
        sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor""")),
    Word(0x8000_0001, EDX, names("""
        - - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow""")),
    Word(0x8000_0001, ECX, names("""
        lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp
        fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx - -""")),
    Word(7, EBX, names("""
        fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed
        adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl""")),
    Word(0x8000_0007, EDX, names("- - - - - - - - constant_tsc")),
)  # fmt: skip

# Features of the first leaves that AMD shows again in the extended ones have one name only: the first.
BITS = {name: (word.leaf, word.register, bit) for word in WORDS for bit, name in enumerate(word.names) if name}
"""Name → (leaf, register, bit)."""

# The levels of the x86-64 psABI, each in addition to the one before.
_LEVEL_1 = frozenset(names("fpu tsc msr pae cx8 cmov fxsr mmx sse sse2 syscall lm nx"))
_LEVEL_2 = _LEVEL_1 | frozenset(names("cx16 lahf_lm popcnt sse3 sse4_1 sse4_2 ssse3"))
_LEVEL_3 = _LEVEL_2 | frozenset(names("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave osxsave"))
LEVELS = {"x86-64": _LEVEL_1, "x86-64-v1": _LEVEL_1, "x86-64-v2": _LEVEL_2, "x86-64-v3": _LEVEL_3}
"""Level → what it promises."""

FUNDAMENTAL = _LEVEL_1 | frozenset(names("apic sep clflush ss hypervisor constant_tsc"))
"""What each level keeps if it is there: a 64-bit kernel counts on it, or no program chooses code by it."""

LONG_MODE = frozenset(("lm", "syscall", "cx16", "lahf_lm"))
"""What a 32-bit guest does not have."""
