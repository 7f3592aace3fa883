"""Numbers and layouts out of Xen's public headers, with the help of the C compiler.

Nothing here is run on the target: constants are compiled into a data section
and read back from the object file, layouts are read from its DWARF. So a
32-bit pass needs neither 32-bit libraries nor a 32-bit loader.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

HEADERS = (
    "xen.h",
    "memory.h",
    "event_channel.h",
    "grant_table.h",
    "sched.h",
    "vcpu.h",
    "version.h",
    "features.h",
    "elfnote.h",
    "physdev.h",
    "platform.h",
    "callback.h",
    "nmi.h",
    "errno.h",
    "hvm/params.h",
    "hvm/hvm_op.h",
    "hvm/hvm_vcpu.h",
    "arch-x86/cpuid.h",
    "arch-x86/cpufeatureset.h",
    "arch-x86/hvm/start_info.h",
    "io/ring.h",
    "io/console.h",
    "io/xs_wire.h",
    "io/xenbus.h",
    "io/protocols.h",
    "io/blkif.h",
    "io/netif.h",
)
"""What the generated table covers, relative to the header folder."""

ARCH_HEADERS = ("arch-x86/xen.h", "arch-x86/xen-x86_64.h", "arch-x86/xen-x86_32.h")
"""Included by xen.h. What other headers come along (trace.h, pmu.h) is not ours."""

NUMBERS_ONLY = ("platform.h", "hvm/hvm_op.h", "hvm/hvm_vcpu.h")
"""Headers whose numbers are wanted, and whose structures are a dom0's or an HVM guest's own."""


class GenerationError(Exception):
    """The headers hold something this generator does not understand."""


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One member.

    `type` is ``u1`` … ``u8``, ``i1`` … ``i8`` or the name of a structure;
    `count` 0 means no array, -1 a flexible one.
    """

    name: str
    offset: int
    type: str
    count: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A structure or union. `anonymous` ones have the name ``outer.member``."""

    name: str
    union: bool
    size: int
    fields: tuple[Field, ...]
    anonymous: bool = False


class Compiler:
    """gcc on the public headers, for one word size.

    :param headers: folder that holds ``xen.h``.
    :param bits: 64 for the native layout, 32 for the one compat guests use.
    """

    def __init__(self, headers: Path, bits: int, work: Path) -> None:
        self.bits = bits
        self.headers = headers.resolve()
        self.work = work
        # The folder itself must not be on the include path: its features.h would shadow the C library's.
        link = work / "xenpublic"
        if not link.exists():
            link.symlink_to(self.headers)

    def prologue(self) -> str:
        lines = ["#include <stdint.h>", "#include <stddef.h>"]
        return "\n".join(lines + [f'#include "xenpublic/{name}"' for name in HEADERS]) + "\n"

    def run(self, source: str, *options: str, tools: bool = False) -> subprocess.CompletedProcess[str]:
        """Compile `source` to ``out.o`` (or what `options` say) in the work folder."""
        (self.work / "stub.c").write_text(source)
        command = ["gcc", f"-m{self.bits}", "-std=c11", "-ffreestanding", "-w", f"-I{self.work}"]
        # Every error, each at its line of the stub and not at the header's.
        command += ["-fmax-errors=0", "-ftrack-macro-expansion=0"]
        # The newest interface, and for the numbers also those that only a toolstack uses.
        command += ["-D__XEN_TOOLS__"] if tools else ["-D__XEN_INTERFACE_VERSION__=__XEN_LATEST_INTERFACE_VERSION__"]
        command += [*options, str(self.work / "stub.c")]
        environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)

    def compile(self, source: str, *options: str, tools: bool = False) -> Path:
        done = self.run(source, "-c", "-o", str(self.work / "out.o"), *options, tools=tools)
        if done.returncode:
            raise GenerationError(f"gcc -m{self.bits} refused the headers: {done.stderr.strip()[:2000]}")
        return self.work / "out.o"

    # -- numbers ---------------------------------------------------------

    def macro_names(self) -> list[str]:
        """Object-like macros with a body that the public headers define, in their order."""
        done = self.run(self.prologue(), "-E", "-dD", tools=True)
        if done.returncode:
            raise GenerationError(f"the preprocessor refused the headers: {done.stderr.strip()[:2000]}")
        names: dict[str, None] = {}
        ours = False
        for line in done.stdout.splitlines():
            if marker := re.match(r'# \d+ "([^"]*)"', line):
                ours = _header(marker[1]) != ""
            elif ours and (define := re.match(r"#define (\w+) \S", line)):
                names[define[1]] = None
            elif undef := re.match(r"#undef (\w+)", line):
                names.pop(undef[1], None)
        return list(names)

    def constants(self) -> dict[str, int]:
        """Every macro that is an integer constant expression, with its value."""
        names = self.macro_names()
        # A row's line is counted from the first one after the opening brace.
        first_line = self.prologue().count("\n") + 2
        while True:
            # `* 1ULL` turns strings, types and structures into errors; one macro a line, so that an error names it.
            rows = [f"(({name}) * 1ULL), (({name}) < 0)," for name in names]
            text = self.prologue() + "const unsigned long long values[] = {\n" + "\n".join(rows) + "\n};\n"
            done = self.run(text, "-c", "-o", str(self.work / "out.o"), tools=True)
            if not done.returncode:
                break
            bad = {int(n) - first_line for n in re.findall(r"stub\.c:(\d+):\d+: error", done.stderr)}
            keep = [name for index, name in enumerate(names) if index not in bad]
            if len(keep) == len(names):
                raise GenerationError(f"cannot tell which macro fails: {done.stderr.strip()[:2000]}")
            names = keep
        raw = _symbol_bytes(self.work / "out.o", "values")
        words = struct.unpack(f"<{len(raw) // 8}Q", raw)
        return {
            name: value - (1 << 64 if negative else 0)
            for name, value, negative in zip(names, words[0::2], words[1::2], strict=True)
        }

    # -- layouts ---------------------------------------------------------

    def debug_info(self) -> DebugInfo:
        path = self.compile(self.prologue(), "-g", "-gdwarf-4", "-fno-eliminate-unused-debug-types")
        return DebugInfo(path)


class DebugInfo:
    """Structures, unions and enumerators of one object file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        dwarf = ELFFile(self._file).get_dwarf_info()
        (self._unit,) = dwarf.iter_CUs()
        self._top = self._unit.get_top_DIE()
        program = dwarf.line_program_for_CU(self._unit)
        if program is None:
            raise GenerationError("the compiler left no line table: -g had no effect")
        entries = program.header
        self._files = [
            (entries["include_directory"][f.dir_index - 1].decode() if f.dir_index else "") + "/" + f.name.decode()
            for f in entries["file_entry"]
        ]
        self.layouts: dict[str, Layout] = {}
        self.enumerators: dict[str, int] = {}
        for die in self._top.iter_children():
            self._take(die)
        self._file.close()

    def _header(self, die: Any) -> str:
        if "DW_AT_decl_file" not in die.attributes:
            return ""
        return _header(self._files[die.attributes["DW_AT_decl_file"].value - 1])

    def _take(self, die: Any) -> None:
        header = self._header(die)
        if not header:
            return
        if die.tag == "DW_TAG_enumeration_type":
            for child in die.iter_children():
                self.enumerators[_name(child)] = child.attributes["DW_AT_const_value"].value
            return
        if header in NUMBERS_ONLY:
            return
        if die.tag == "DW_TAG_typedef" and "DW_AT_type" in die.attributes:
            target = die.get_DIE_from_attribute("DW_AT_type")
            if target.tag in _AGGREGATES and not _name(target) and not _name(die).startswith("__guest_handle"):
                self._layout(target, _name(die))
        elif die.tag in _AGGREGATES and _name(die) and "DW_AT_declaration" not in die.attributes:
            self._layout(die, _name(die))

    def _layout(self, die: Any, name: str, anonymous: bool = False) -> str:
        if name in self.layouts:
            return name
        fields = []
        for number, child in enumerate(c for c in die.iter_children() if c.tag == "DW_TAG_member"):
            if "DW_AT_bit_size" in child.attributes:
                raise GenerationError(f"{name}.{_name(child)} is a bit field: teach this generator")
            field = _name(child) or f"anon{number}"
            offset = child.attributes["DW_AT_data_member_location"].value if die.tag == _STRUCT else 0
            kind, count = self._type(child.get_DIE_from_attribute("DW_AT_type"), f"{name}.{field}")
            fields.append(Field(field, offset, kind, count))
        self.layouts[name] = Layout(
            name, die.tag == _UNION, die.attributes["DW_AT_byte_size"].value, tuple(fields), anonymous
        )
        return name

    def _type(self, die: Any, path: str) -> tuple[str, int]:
        """Type and array count of a member (several dimensions become one)."""
        typedef = ""
        while die.tag in ("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type"):
            typedef = _name(die) or typedef
            die = die.get_DIE_from_attribute("DW_AT_type")
        if die.tag == "DW_TAG_array_type":
            count = 1
            for bound in die.iter_children():
                upper = bound.attributes.get("DW_AT_upper_bound")
                # A flexible array, as at the end of a shared ring, has no bound: it takes no room here.
                count *= upper.value + 1 if upper is not None and upper.value < 1 << 31 else 0
            kind, inner = self._type(die.get_DIE_from_attribute("DW_AT_type"), path)
            return kind, count * (inner or 1) or -1
        if die.tag == "DW_TAG_pointer_type":
            return f"u{die.attributes['DW_AT_byte_size'].value}", 0
        size = die.attributes["DW_AT_byte_size"].value
        if die.tag == "DW_TAG_enumeration_type":
            return f"u{size}", 0
        if die.tag == "DW_TAG_base_type":
            # DW_ATE_signed. Plain char is bytes to everyone here: unsigned.
            return ("i" if die.attributes["DW_AT_encoding"].value == 5 else "u") + str(size), 0
        if die.tag in _AGGREGATES:
            if typedef.startswith("__guest_handle") or _name(die).startswith("__guest_handle"):
                return f"u{size}", 0
            named = _name(die) or typedef
            return (self._layout(die, named), 0) if named else (self._layout(die, path, anonymous=True), 0)
        raise GenerationError(f"{path} has a type this generator does not know: {die.tag}")


_STRUCT = "DW_TAG_structure_type"
_UNION = "DW_TAG_union_type"
_AGGREGATES = (_STRUCT, _UNION)


def _header(path: str) -> str:
    """The public header that `path` is, if it is one that the table covers."""
    name = path.partition("/xenpublic/")[2]
    return name if name in HEADERS or name in ARCH_HEADERS else ""


def _name(die: Any) -> str:
    attribute = die.attributes.get("DW_AT_name")
    return attribute.value.decode() if attribute is not None else ""


def _symbol_bytes(path: Path, symbol: str) -> bytes:
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        table: Any = elf.get_section_by_name(".symtab")
        (entry,) = table.get_symbol_by_name(symbol)
        data = elf.get_section(entry["st_shndx"]).data()
        return bytes(data[entry["st_value"] : entry["st_value"] + entry["st_size"]])


@dataclasses.dataclass(frozen=True, slots=True)
class Abi:
    """What one word size looks like."""

    constants: dict[str, int]
    layouts: dict[str, Layout]


def read_abi(headers: Path, bits: int) -> Abi:
    """:raises GenerationError: the headers or the compiler are not usable."""
    with tempfile.TemporaryDirectory(prefix="reeve-abi-") as work:
        compiler = Compiler(headers, bits, Path(work))
        constants = compiler.constants()
        info = compiler.debug_info()
        # Guest-visible constants come first in the headers' order, then the enumerators.
        for name, value in info.enumerators.items():
            if constants.setdefault(name, value) != value:
                raise GenerationError(f"{name} is both a macro and another enumerator")
        return Abi(constants, info.layouts)
