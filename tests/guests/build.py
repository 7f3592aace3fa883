"""Build the micro-guests: small 64-bit Xen PV kernels for tests, compiled when first asked for.

``build_guest("hello")`` compiles ``tests/guests/hello.c`` with the runtime in ``lib/`` and returns the ELF's path.
The result is kept under a name made of everything that went into it, so a second call costs a few milliseconds
and an edited source is built anew. Nothing is built at import.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

SOURCES = pathlib.Path(__file__).resolve().parent
LIBRARY = SOURCES / "lib"
LIBRARY_32 = "lib32"
"""Folder beside `LIBRARY` with the runtime of the guests whose names end in 32."""
CACHE_VARIABLE = "REEVE_GUEST_CACHE"
COMPILE_TIMEOUT = 120.0

CFLAGS = (
    *("-std=gnu11", "-O2", "-g0", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-mcmodel=kernel", "-mno-red-zone"),
    *("-mgeneral-regs-only", "-mno-sse", "-mno-mmx", "-fno-stack-protector", "-fcf-protection=none"),
    *("-fno-asynchronous-unwind-tables", "-fno-strict-aliasing", "-fno-common", "-fno-builtin"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096", "-Wl,--no-warn-rwx-segments"),
)


_ONLY_64 = frozenset(("-mcmodel=kernel", "-mno-red-zone"))
CFLAGS_32 = ("-m32", "-fno-builtin", "-mregparm=0", *(flag for flag in CFLAGS if flag not in _ONLY_64))


class GuestBuildError(Exception):
    """A micro-guest cannot be built; the text holds the compiler's words."""


def available() -> str | None:
    """Why micro-guests cannot be built here, or None when they can."""
    if _compiler() is None:
        return "no gcc on this machine: install the package gcc to build the micro-guests"
    return None


def guest_names(bits: int = 64) -> list[str]:
    """The guests of that word size, sorted."""
    return sorted(source.stem for source in SOURCES.glob("*.c") if _is_32(source.stem) == (bits == 32))


def _is_32(name: str) -> bool:
    return name.endswith("32")


def build_guest(name: str, **defines: str | int | bool) -> pathlib.Path:
    """The path of guest `name` as an ELF file, compiled if need be.

    :param defines: preprocessor symbols. True defines one without a value, False leaves it out.
        ``USE_HYPERCALL_PAGE=True`` calls through a hypercall page; otherwise ``syscall`` is issued inline, as
        Linux does since 6.1. ``NO_XEN_NOTES=True`` leaves the ELF notes out, ``PVH_ONLY=True`` names
        a PVH entry only.
    :raises GuestBuildError: no such guest, no compiler, or the source does not compile.
    """
    source = SOURCES / f"{name}.c"
    if not source.is_file():
        raise GuestBuildError(f"no micro-guest {name!r}: there are {', '.join(guest_names())}")
    compiler = _compiler()
    if compiler is None:
        raise GuestBuildError(str(available()))
    narrow = _is_32(name)
    library = LIBRARY.parent / LIBRARY_32 if narrow else LIBRARY
    flags = [*(CFLAGS_32 if narrow else CFLAGS), *_define_flags(defines)]
    command = [compiler, *flags, f"-I{library}"]
    folder = _cache_folder()
    runtime_digest = _digest(_runtime_inputs(library), flags, compiler)
    result = folder / f"{name}-{_digest([source], [runtime_digest], compiler)}.elf"
    if not result.is_file():
        runtime = folder / f"runtime-{runtime_digest}.o"
        if not runtime.is_file():
            units = [path for path in _runtime_inputs(library) if path.suffix in {".c", ".S"}]
            _compile([*command, "-r"], units, runtime)
        _compile([*command, "-T", str(library / "guest.lds")], [source, runtime], result)
    return result


def _compiler() -> str | None:
    return shutil.which("gcc")


@functools.cache
def _compiler_version(compiler: str) -> bytes:
    done = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT)
    return done.stdout


def _define_flags(defines: dict[str, str | int | bool]) -> list[str]:
    flags = []
    for symbol, value in sorted(defines.items()):
        if not symbol.isidentifier():
            raise GuestBuildError(f"{symbol!r} is not a preprocessor symbol")
        if value is True:
            flags.append(f"-D{symbol}")
        elif value is not False:
            flags.append(f"-D{symbol}={value}")
    return flags


def _runtime_inputs(library: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in library.iterdir() if path.suffix in {".c", ".h", ".S", ".lds"})


def _digest(inputs: list[pathlib.Path], flags: list[str], compiler: str) -> str:
    digest = hashlib.sha256(_compiler_version(compiler))
    digest.update("\0".join(flags).encode())
    for path in inputs:
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:20]


def _cache_folder() -> pathlib.Path:
    """A folder of this user's own: a shared one could be filled by somebody else."""
    named = os.environ.get(CACHE_VARIABLE)
    folder = pathlib.Path(named) if named else pathlib.Path(tempfile.gettempdir()) / f"reeve-guests-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not named and (folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise GuestBuildError(f"{folder} is not this user's own folder: remove it, or set {CACHE_VARIABLE}")
    return folder


def _compile(command: list[str], units: list[pathlib.Path], result: pathlib.Path) -> None:
    handle, partial = tempfile.mkstemp(dir=result.parent, prefix=f".{result.stem}-", suffix=result.suffix)
    os.close(handle)
    names = ", ".join(unit.name for unit in units)
    try:
        done = subprocess.run(
            [*command, *map(str, units), "-o", partial],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT,
        )
        if done.returncode:
            raise GuestBuildError(f"{names} does not compile:\n{done.stderr.strip()}")
        os.replace(partial, result)  # whole or not at all, also when two test processes build the same guest
    except subprocess.TimeoutExpired as exc:
        raise GuestBuildError(f"{names} took longer than {COMPILE_TIMEOUT:.0f} s to compile") from exc
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)
