"""Generate ``hypervisor/abi`` from Xen's public headers, or check what is committed.

::

    python tools/gen_abi.py [--headers /usr/include/xen]           # write
    python tools/gen_abi.py --check [--headers /usr/include/xen]   # compare, exit 1 on a difference

The headers are those of Debian's ``libxen-dev``; gcc must be there. No 32-bit
C library is needed.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from abi_headers import GenerationError, read_abi
from abi_render import render_errno, render_hypercalls, render_numbers, render_structs

TARGET = Path(__file__).resolve().parent.parent / "hypervisor" / "abi"


def generate(headers: Path) -> dict[str, str]:
    """File name → text. :raises GenerationError: the headers are not usable."""
    native, compat = read_abi(headers, 64), read_abi(headers, 32)
    return {
        "_generated.py": render_numbers(native, compat),
        "structs.py": render_structs(native, compat),
        "errno.py": render_errno(native),
        "hypercalls.py": render_hypercalls(native),
    }


def check(texts: dict[str, str]) -> int:
    """Print where the committed files differ; the number of files that do."""
    wrong = 0
    for name, text in texts.items():
        path = TARGET / name
        committed = path.read_text() if path.exists() else ""
        if committed != text:
            wrong += 1
            diff = list(difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "headers", n=0))
            print(f"{path}: {len(diff)} lines of difference", *diff[:40], sep="\n")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--headers", type=Path, default=Path("/usr/include/xen"), help="folder that holds xen.h")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    options = parser.parse_args(arguments)
    if not (options.headers / "xen.h").exists():
        print(f"{options.headers} holds no xen.h: install libxen-dev or give --headers", file=sys.stderr)
        return 2
    try:
        texts = generate(options.headers)
    except (GenerationError, OSError) as exc:
        print(f"cannot read the Xen ABI: {exc}", file=sys.stderr)
        return 2
    if options.check:
        wrong = check(texts)
        print(f"{wrong} of {len(texts)} files differ from {options.headers}" if wrong else "the ABI table is current")
        return 1 if wrong else 0
    for name, text in texts.items():
        (TARGET / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
