"""What the benchmarks of agents share: an extra verb as a distribution of its own, memory sampled, lines fitted."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common import Result, rounded

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
WARMING = 0.1
"""Share of the samples that is left out of a slope: caches and pools fill first."""


def lay_plugin(folder: Path, verb: str, module: str, kind: str) -> str:
    """A distribution in `folder` whose only content is a verb of `bench`; the PYTHONPATH that has it."""
    info = folder / f"reeve_bench_{module}-0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text((BENCH / f"{module}.py").read_text())
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: reeve-bench-{module}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[reeve.instructions]\n{verb} = {module}:{kind}\n")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def clean_env() -> dict[str, str]:
    """The environment without what would configure an agent."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OS_", "REEVE_"))}


def rss_kib(pid: int) -> int:
    """Resident memory of a process that is no file's page, KiB (RssAnon of proc(5)); 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


class Sampler:
    """Looks at the memory of a process again and again, against what has been done by then.

    :param pid: of the process that counts now. :param progress: what has been done.
    """

    def __init__(self, pid: Callable[[], int], progress: Callable[[], float], seconds: float = 0.5) -> None:
        self._pid = pid
        self._progress = progress
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="sampler", daemon=True)
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _main(self) -> None:
        while not self._stop.wait(self._seconds):
            if taken := rss_kib(self._pid()):
                self.samples.append((self._progress(), taken))

    def result(self) -> Result:
        """MiB at the beginning, at most and at the end; `slope` in KiB for each unit of progress."""
        if len(self.samples) < 2:
            return {"samples": len(self.samples)}
        steady = self.samples[int(len(self.samples) * WARMING) :]
        return {
            "samples": len(self.samples),
            "first_mib": rounded(self.samples[0][1] / 1024),
            "median_mib": rounded(statistics.median(taken for _, taken in steady) / 1024),
            "peak_mib": rounded(max(taken for _, taken in self.samples) / 1024),
            "last_mib": rounded(self.samples[-1][1] / 1024),
            "slope": rounded(slope(steady)),
        }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line that fits best; 0 where all stand at one place."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Wait for something to become true; False when it did not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
