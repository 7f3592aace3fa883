"""Architectural x86 numbers (AMD64 Architecture Programmer's Manual vol. 2); nothing of any engine."""

from __future__ import annotations

# Order of general registers in instruction encodings and in `Registers.gpr`.
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)

# Segment registers in encoding order.
ES, CS, SS, DS, FS, GS = range(6)

# Exception vectors.
DE, DB, NMI, BP, OF, BR, UD, NM, DF, CSO, TS, NP, SSF, GP, PF = range(15)
MF, AC, MC, XM = 16, 17, 18, 19

# Page fault error code bits.
PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = 1, 2, 4, 8, 16

# RFLAGS.
FLAG_CF, FLAG_PF, FLAG_AF, FLAG_ZF, FLAG_SF = 1, 4, 0x10, 0x40, 0x80
FLAG_TF, FLAG_IF, FLAG_DF, FLAG_OF = 0x100, 0x200, 0x400, 0x800
FLAG_IOPL, FLAG_NT, FLAG_RF, FLAG_VM, FLAG_AC = 0x3000, 0x4000, 0x10000, 0x20000, 0x40000
FLAG_VIF, FLAG_VIP, FLAG_ID = 0x80000, 0x100000, 0x200000

DR6_BS = 1 << 14  # a single step

# CR0, CR4, EFER.
CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE, CR0_WP, CR0_AM, CR0_PG = (
    1, 2, 4, 8, 0x10, 0x20, 0x10000, 0x40000, 0x8000_0000,
)  # fmt: skip
CR4_DE, CR4_PSE, CR4_PAE, CR4_PGE, CR4_OSFXSR, CR4_OSXMMEXCPT = 0x8, 0x10, 0x20, 0x80, 0x200, 0x400
EFER_SCE, EFER_LME, EFER_LMA, EFER_NX = 1, 0x100, 0x400, 0x800

# Page table entries.
PTE_P, PTE_RW, PTE_US, PTE_PWT, PTE_PCD, PTE_A, PTE_D, PTE_PSE, PTE_G = 1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0x100
PTE_NX = 1 << 63
PTE_ADDR = 0x000F_FFFF_FFFF_F000

# Segment descriptor bits (64-bit value).
DESC_ACCESSED = 1 << 40
DESC_CODE = 1 << 43
DESC_S = 1 << 44
DESC_P = 1 << 47
DESC_L = 1 << 53
DESC_DB = 1 << 54
DESC_G = 1 << 55

MASK64 = (1 << 64) - 1
MASK32 = (1 << 32) - 1


def is_canonical(va: int) -> bool:
    """48-bit canonical form."""
    return va < 0x8000_0000_0000 or va >= 0xFFFF_8000_0000_0000


def desc_dpl(desc: int) -> int:
    return (desc >> 45) & 3


def desc_base(desc: int) -> int:
    return ((desc >> 16) & 0xFF_FFFF) | ((desc >> 32) & 0xFF00_0000)


def desc_limit(desc: int) -> int:
    """Limit in bytes, granularity applied."""
    limit = (desc & 0xFFFF) | ((desc >> 32) & 0xF_0000)
    return (limit << 12) | 0xFFF if desc & DESC_G else limit
