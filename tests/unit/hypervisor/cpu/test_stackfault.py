"""#SS or #GP for an address that is not canonical: what the AMD and Intel manuals say of each way to make one."""

from __future__ import annotations

import pytest

from hypervisor.cpu.stackfault import is_stack_fault
from hypervisor.engines import x86

HOLE = 0x0000_8000_0000_0000
GOOD = 0x1000

# machine code, disassembly, what is not canonical, #SS
CASES = [
    ("488b0424", "mov rax, [rsp]", "rsp", True),
    ("488b442408", "mov rax, [rsp+8]", "rsp", True),
    ("488b4500", "mov rax, [rbp]", "rbp", True),
    ("488b441d00", "mov rax, [rbp+rbx]", "rbx", True),
    ("488b441d00", "mov rax, [rbp+rbx]", "", False),
    ("2e488b4500", "cs mov rax, [rbp]", "rbp", True),
    ("64488b4500", "mov rax, fs:[rbp]", "rbp", False),
    ("65488b0424", "mov rax, gs:[rsp]", "rsp", False),
    ("488b00", "mov rax, [rax]", "rax", False),
    ("488b4424f8", "mov rax, [rsp-8]", "rax", False),
    ("488b442b00", "mov rax, [rbx+rbp]", "rbp", False),
    ("498b4500", "mov rax, [r13]", "r13", False),
    ("498b0424", "mov rax, [r12]", "r12", False),
    ("660f6f442408", "movdqa xmm0, [rsp+8]", "", False),
    ("50", "push rax", "rsp", True),
    ("58", "pop rax", "rsp", True),
    ("6a01", "push 1", "rsp", True),
    ("9c", "pushfq", "rsp", True),
    ("e800000000", "call", "rsp", True),
    ("c3", "ret", "rsp", True),
    ("c3", "ret to what is not canonical", "", False),
    ("c9", "leave", "rbp", True),
    ("c9", "leave", "rsp", False),
    ("ffd0", "call rax", "rax", False),
    ("ff10", "call [rax]", "rax", False),
    ("ff10", "call [rax]", "rsp", True),
    ("ff5500", "call [rbp]", "rbp", True),
    ("ff30", "push [rax]", "rsp", True),
    ("ffe0", "jmp rax", "rsp", False),
    ("8f00", "pop [rax]", "rsp", True),
    ("8f00", "pop [rax]", "rax", False),
    ("0f38c84500", "sha1nexte xmm0, [rbp]", "rbp", False),
    ("488b", "not an instruction", "rsp", False),
]
NUMBERS = {"rax": x86.RAX, "rbx": x86.RBX, "rsp": x86.RSP, "rbp": x86.RBP, "r12": 12, "r13": 13}


@pytest.mark.parametrize(("code", "text", "bad", "expected"), CASES)
def test_what_makes_the_address(code: str, text: str, bad: str, expected: bool) -> None:
    data = bytes.fromhex(code).ljust(0 if code == "488b" else 8, b"\0")  # the next instruction may be read, too
    gpr = [GOOD] * 16
    if bad:
        gpr[NUMBERS[bad]] = HOLE
    assert is_stack_fault(lambda at: data[at] if at < len(data) else -1, gpr) is expected, text


def test_an_access_that_runs_out_of_the_canonical_half() -> None:
    code = bytes.fromhex("488b0424")
    gpr = [GOOD] * 16
    gpr[x86.RSP] = HOLE - 4
    assert is_stack_fault(lambda at: code[at], gpr)
    gpr[x86.RSP] = HOLE - 8
    assert not is_stack_fault(lambda at: code[at], gpr)
    gpr[x86.RSP] = 0
    assert not is_stack_fault(lambda at: code[at], gpr)
