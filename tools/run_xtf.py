"""Run the PV tests of a built XTF tree (https://github.com/andyhhp/xtf), each as a domain of a host of its own.

::

    python tools/run_xtf.py FOLDER [--env pv64] [--match REGEX] [--timeout S] [--jobs N] [--json]

One line a test: environment, test, verdict, with tabs between. The verdict is the test's own (SUCCESS, SKIP, FAILURE,
ERROR), or CRASH (it ended without one), TIMEOUT, or SKIP when the driver has no such environment; ERROR is also what
cannot be run at all, with the reason on standard error. The exit code is 0 when every verdict is SUCCESS or SKIP.

A ``reeve-hypervisor`` with a temporary state folder is started for the run and stopped after it. To use one that runs
already, give its control socket with ``--socket``.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypervisor.errors import HostUnavailable, OperationTimeout, ToolstackError
from hypervisor.toolstack.api import (
    Capability,
    DomainSpec,
    DomainState,
    KernelBoot,
    OnEvent,
    Toolstack,
)
from hypervisor.toolstack.drivers import load

ENVIRONMENTS = {"pv64": Capability.PV, "pv32pae": Capability.PV32}
GOOD = ("SUCCESS", "SKIP")
RESULT = re.compile(rb"^Test result: (SUCCESS|SKIP|ERROR|FAILURE)\r?$", re.MULTILINE)
ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})
LOG_BYTES = 1 << 20
HOST_START_TIMEOUT = 30.0
HOST_STOP_TIMEOUT = 15.0


@dataclasses.dataclass(frozen=True, slots=True)
class XtfTest:
    """One test in one environment.

    :ivar name: the test, with ``~variation`` when it has some.
    :ivar memory_mib: what its configuration asks for, MiB.
    :ivar problem: why it cannot be run, or empty.
    """

    env: str
    name: str
    kernel: str = ""
    cmdline: str = ""
    memory_mib: int = 128
    vcpus: int = 1
    problem: str = ""

    @property
    def full_name(self) -> str:
        return f"test-{self.env}-{self.name}"

    def spec(self) -> DomainSpec:
        """Nothing restarts or goes away by itself, so that the console can be read afterwards."""
        return DomainSpec(
            uuid=str(uuid.uuid4()),
            name=f"{self.full_name.replace('~', '.')[:50]}-{uuid.uuid4().hex[:8]}",
            boot=KernelBoot(kernel=self.kernel, cmdline=self.cmdline),
            memory_mib=self.memory_mib,
            vcpus=self.vcpus,
            on_poweroff=OnEvent.PRESERVE,
            on_reboot=OnEvent.PRESERVE,
            on_crash=OnEvent.PRESERVE,
            owner="run_xtf",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """:ivar detail: one line for a human; :ivar console: what the test printed."""

    env: str
    test: str
    verdict: str
    seconds: float = 0.0
    detail: str = ""
    console: str = ""


def discover(folder: Path, envs: Sequence[str] = tuple(ENVIRONMENTS), match: str = "") -> list[XtfTest]:
    """The PV tests of the tree, by name and environment; `match` is searched for in ``test-ENV-NAME~VARIATION``.

    :raises ValueError: no XTF tree is there.
    """
    tests = []
    for info_path in sorted((folder / "tests").glob("*/info.json")):
        info = json.loads(info_path.read_text())
        for env in info["environments"]:
            if env not in envs:
                continue
            for variation in info["variations"] or [""]:
                name = info["name"] + (f"~{variation}" if variation else "")
                tests.append(_read_test(info_path.parent, env, name))
    if not tests and not (folder / "tests").is_dir():
        raise ValueError(f"{folder} holds no folder 'tests': give the root of a built XTF tree")
    return [test for test in tests if re.search(match, test.full_name)]


def _read_test(folder: Path, env: str, name: str) -> XtfTest:
    """From the xl configuration that XTF's build writes for each test and variation."""
    path = folder / f"test-{env}-{name}.cfg"
    if not path.is_file():
        return XtfTest(env, name, problem=f"{path} is missing: build the tree with make")
    config = parse_config(path.read_text())
    # The path in it is that of the folder it was built in; the kernel lies beside it.
    kernel = folder / Path(str(config.get("kernel", ""))).name
    if not kernel.is_file():
        return XtfTest(env, name, problem=f"{kernel} is missing: build the tree with make")
    return XtfTest(
        env,
        name,
        kernel=str(kernel),
        cmdline=str(config.get("cmdline", config.get("extra", ""))),
        memory_mib=int(str(config.get("memory", 128))),
        vcpus=int(str(config.get("vcpus", 1))),
    )


def parse_config(text: str) -> dict[str, object]:
    """``key = value`` lines of an xl configuration, values as Python literals; what is not one is left out."""
    config: dict[str, object] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if not equals or not key.strip().isidentifier():
            continue
        with contextlib.suppress(ValueError, SyntaxError):
            config[key.strip()] = ast.literal_eval(value.strip())
    return config


def run_test(toolstack: Toolstack, test: XtfTest, timeout: float = 60.0) -> Result:
    """Run one test and destroy its domain. Never raises for what a test or the toolstack does."""
    start = time.monotonic()

    def result(verdict: str, detail: str = "", console: bytes = b"") -> Result:
        took = round(time.monotonic() - start, 3)
        return Result(test.env, test.name, verdict, took, detail, console.decode(errors="replace"))

    if test.problem:
        return result("ERROR", test.problem)
    if ENVIRONMENTS[test.env] not in toolstack.capabilities():
        return result("SKIP", f"driver {toolstack.name} has no {test.env}")
    spec = test.spec()
    try:
        toolstack.create(spec)
        try:
            toolstack.unpause(spec.uuid)
            ended, detail = _wait(toolstack, spec.uuid, timeout)
            log = toolstack.console_log(spec.uuid, LOG_BYTES)
        finally:
            toolstack.destroy(spec.uuid)
    except ToolstackError as exc:
        return result("ERROR", f"{exc.code}: {exc.message}")
    return result(verdict_of(log, ended=ended), detail, log)


def _wait(toolstack: Toolstack, domain: str, timeout: float) -> tuple[bool, str]:
    """Whether the domain ended in time, and what is known of its end."""
    try:
        info = toolstack.wait(domain, ENDED, timeout)
    except OperationTimeout:
        return False, f"still running after {timeout:g} s"
    if info is None:
        return True, "the domain is gone"
    return True, info.detail or (info.shutdown_reason or info.state)


def verdict_of(log: bytes, *, ended: bool) -> str:
    """The last result that the test printed. One that printed its result but does not end is not taken for good."""
    found = RESULT.findall(log)
    if not ended:
        return "TIMEOUT"
    return found[-1].decode() if found else "CRASH"


def run_all(toolstack: Toolstack, tests: Sequence[XtfTest], timeout: float, jobs: int = 1) -> Iterator[Result]:
    """Results in the order of `tests`, each as soon as it and all before it are there."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(lambda test: run_test(toolstack, test, timeout), tests)


@contextlib.contextmanager
def private_host(memory_mib: int = 1024) -> Iterator[Toolstack]:
    """A host process with a temporary state folder, and a connection to it; both are gone afterwards.

    :raises ToolstackError: it does not start; the text holds the end of its log.
    """
    program = shutil.which("reeve-hypervisor", path=str(Path(sys.executable).parent)) or "reeve-hypervisor"
    with tempfile.TemporaryDirectory(prefix="reeve-xtf-") as name:
        folder = Path(name)
        socket, log = folder / "hypervisor.sock", folder / "host.log"
        config = folder / "hypervisor.conf"
        # As Xen is built and booted: XSA-182's test needs linear page tables, several tests a second vCPU.
        config.write_text("[hypervisor]\nlinear_page_tables = true\ncpus = 32\n")
        command = [
            program,
            "--config-file",
            str(config),
            "--state-dir",
            name,
            "--socket",
            str(socket),
            "--memory-mib",
            str(memory_mib),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            toolstack = _connect(socket, process, log)
            try:
                yield toolstack
            finally:
                for info in toolstack.list_domains():
                    toolstack.destroy(info.uuid)
                toolstack.close()
        finally:
            _stop(process)


def _connect(socket: Path, process: subprocess.Popen[bytes], log: Path) -> Toolstack:
    deadline = time.monotonic() + HOST_START_TIMEOUT
    while True:
        try:
            toolstack = load("embedded", {"socket": str(socket)})
            toolstack.host_info()
            return toolstack
        except HostUnavailable as exc:
            if process.poll() is not None or time.monotonic() > deadline:
                words = log.read_text(errors="replace").strip()[-1000:]
                raise HostUnavailable(f"reeve-hypervisor does not start: {words or exc.message}") from exc
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(HOST_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_xtf.py", description="Run the PV tests of a built XTF tree on Reeve's embedded hypervisor."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="root of a built XTF tree")
    parser.add_argument("--env", action="append", choices=sorted(ENVIRONMENTS), help="only this one (repeatable)")
    parser.add_argument("--match", default="", metavar="REGEX", help="only tests whose test-ENV-NAME~VARIATION matches")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds a test may take (default 60)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="tests at a time (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON list of all results, with what each test printed")
    parser.add_argument("--console", action="store_true", help="also print what the tests that are not good printed")
    parser.add_argument("--socket", metavar="PATH", help="control socket of a running reeve-hypervisor to use instead")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        tests = discover(options.folder.resolve(), options.env or tuple(ENVIRONMENTS), options.match)
    except (ValueError, re.error) as exc:
        sys.stderr.write(f"run_xtf.py: {exc}\n")
        return 2
    results = []
    try:
        with contextlib.ExitStack() as stack:
            if options.socket:
                toolstack = stack.enter_context(contextlib.closing(load("embedded", {"socket": options.socket})))
            else:
                toolstack = stack.enter_context(private_host(memory_mib=256 + 192 * options.jobs))
            for result in run_all(toolstack, tests, options.timeout, options.jobs):
                results.append(result)
                if not options.json:
                    _show(result, console=options.console)
    except ToolstackError as exc:
        sys.stderr.write(f"run_xtf.py: {exc.message}\n")
        return 2
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    return 0 if all(result.verdict in GOOD for result in results) else 1


def _show(result: Result, *, console: bool) -> None:
    print(f"{result.env}\t{result.test}\t{result.verdict}", flush=True)
    if result.verdict in GOOD:
        return
    if result.detail:
        sys.stderr.write(f"  {result.env} {result.test}: {result.detail}\n")
    if console:
        sys.stderr.write("".join(f"  | {line}\n" for line in result.console.splitlines()))


if __name__ == "__main__":
    sys.exit(main())
