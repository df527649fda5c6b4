"""The programs to time, and the figures: printed as they are measured, and written to a file after each one.

The programs print a nonce from their input, so that a cached output would be noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

C_PROGRAM: Final = """\
#include <stdio.h>
int main(void) { char line[128]; return !fgets(line, sizeof line, stdin) || printf("got %s", line) < 0; }
"""
PYTHON_PROGRAM: Final = 'print("got", input())\n'
COUNT_PROGRAM: Final = """\
#include <stdio.h>
int main(void) { static char b[65536]; long n = 0; size_t k; while ((k = fread(b, 1, sizeof b, stdin))) n += k;
return printf("%ld\\n", n) < 0; }
"""
# Title, one median, the other: limit and goal of the first divided by the second, if there are any.
RATIOS: tuple[tuple[str, str, str, float | None, float | None], ...] = (
    ("clone ready / QEMU started and stopped", "clone, until it answers", "QEMU, started and stopped", 3.4, 2.2),
    ("x07 run, cached C / podman", "x07 C, cached", "podman+runc, C", 1.0, 0.9),
    ("x07 run, cached Python / podman", "x07 Python, cached", "podman+runc, Python", 1.15, 1.0),
    ("x07 run, cached C, hot / saved VM", "x07 C, cached", "x07 C, saved VM", 0.45, 0.35),
    ("x07 run, cached Python, hot / saved VM", "x07 Python, cached", "x07 Python, saved VM", 0.45, 0.35),
    ("x07 run, C from the pool / podman", "x07 C, from the pool", "podman+runc, C", 0.6, 0.5),
    ("x07 run, Python from the pool / podman", "x07 Python, from the pool", "podman+runc, Python", 0.8, 0.65),
    ("exec true, first, sandbox / podman", "sandbox exec true, first", "podman exec true", None, None),
    ("exec true, first, sandbox / docker", "sandbox exec true, first", "docker exec true", None, None),
    ("exec true, 100th, sandbox / podman", "sandbox exec true, 100th", "podman exec true", 0.17, None),
    ("exec true, 100th, sandbox / docker", "sandbox exec true, 100th", "docker exec true", None, None),
    ("x07 sandbox exec true / podman", "x07 sandbox exec true", "podman exec true", 0.35, None),
    ("the same with a front / podman", "x07 sandbox exec true, front", "podman exec true", 0.25, None),
    ("x07 sandbox exec true / docker", "x07 sandbox exec true", "docker exec true", None, None),
    ("8 at once, sandbox / podman", "sandbox exec true, 8 at once", "podman exec true, 8 at once", 0.25, None),
    ("8 at once, sandbox / docker", "sandbox exec true, 8 at once", "docker exec true, 8 at once", None, None),
    (
        "1,000 commands, last 100 / first 100",
        "sandbox, the last tenth of them",
        "sandbox, the first tenth of them",
        None,
        None,
    ),
    ("sandbox opened / pooled run", "sandbox, opened from the pool", "library C, warm", None, None),
    ("sandbox with a command / pooled run", "sandbox, opened, used, closed", "library C, warm", None, None),
    ("in, write / tar, by time", "64 MiB in, write", "64 MiB in, tar", None, None),
    ("in, upload / tar, by time", "64 MiB in, upload", "64 MiB in, tar", 0.15, None),
    ("out, read / tar, by time", "64 MiB out, read", "64 MiB out, tar", None, None),
    ("out, download / tar, by time", "64 MiB out, download", "64 MiB out, tar", 0.35, None),
)
# One median minus the other, in ms.
DIFFERENCES = (
    ("library call on a warm VM, minus bare exec", "library C, warm", "bare exec, C", 45, 20),
    ("x07 run of C, minus the clone itself", "x07 C, cached", "hot clone that runs C", 150, 80),
)
_SAID_BYTES = 500


def expected(nonce: str) -> bytes:
    """Return what both programs print for the input line *nonce*."""
    return f"got {nonce}\n".encode()


def at_once_seconds(call: Callable[[], object], count: int, threads: int | None = None) -> float:
    """Return the seconds for *count* calls that start together, or *threads* at a time. Raises what a call raises."""
    with ThreadPoolExecutor(threads or count) as pool:
        started = time.monotonic()
        for done in [pool.submit(call) for _ in range(count)]:
            done.result()
        return time.monotonic() - started


def memory_bytes(pid: int) -> dict[str, int]:
    """Return the sizes in smaps_rollup of a process by name (proc(5)). Pss: shared pages count in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


class WrongRunError(Exception):
    """A timed run was not as expected, so its time is no figure."""


@dataclass(slots=True)
class Figures:
    """All figures so far.

    file: where to write them. times_s: seconds of each timed round by case. rows: other figures by name. errors: by
    case; a case with an error is not tried again.
    """

    file: Path | None
    times_s: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self, name: str) -> Iterator[None]:
        """Record an error of the case *name*, and write the figures."""
        try:
            yield
        except Exception as exc:  # noqa: BLE001 - one case that fails must not cost the figures of the others
            said = getattr(exc, "stderr", None) or b""
            self.errors[name] = f"{type(exc).__name__}: {exc} {said[-_SAID_BYTES:].decode(errors='replace')}".strip()
            print(f"{name}: FAILED: {self.errors[name]}", flush=True)
        finally:
            self._write()

    def time(self, name: str, case: Callable[[], float], *, counts: bool = True) -> None:
        """Time a case once. counts: False for a round that only fills caches."""
        if name in self.errors:
            return
        with self.recording(name):
            seconds = case()
            if counts:
                self.times_s.setdefault(name, []).append(seconds)
            print(f"{name:28} {seconds * 1000:9.1f} ms{'' if counts else '   not counted'}", flush=True)

    def row(self, name: str, value: str) -> None:
        """Add and print a figure that is measured once."""
        self.rows[name] = value
        print(f"{name:60} {value}", flush=True)

    def _write(self) -> None:
        if self.file is not None:
            found = {"times_s": self.times_s, "rows": self.rows, "errors": self.errors}
            self.file.write_text(json.dumps({"cores": os.cpu_count(), **found}, indent=1), encoding="utf-8")

    def show(self) -> None:
        """Print the table, the ratios and the errors."""
        print(f"\n{'':28} {'median':>9} {'min':>9} {'max':>9}   ms, {os.cpu_count()} cores")
        medians = {name: statistics.median(values) for name, values in self.times_s.items()}
        for name, median in medians.items():
            values = self.times_s[name]
            size, _, is_transfer = name.partition(" MiB ")
            rate = f"   {int(size) / median:.1f} MiB/s" if is_transfer else ""
            print(f"{name:28} {median * 1000:9.1f} {min(values) * 1000:9.1f} {max(values) * 1000:9.1f}{rate}")
        for title, over, under, limit, goal in RATIOS:
            if over in medians and under in medians:
                named = {"limit": limit, "goal": goal}
                bounds = "".join(f"   {name} {value}" for name, value in named.items() if value is not None)
                print(f"{title:42} {medians[over] / medians[under]:6.2f}{bounds}")
        for title, whole, part, limit, goal in DIFFERENCES:
            if whole in medians and part in medians:
                left = (medians[whole] - medians[part]) * 1000
                print(f"{title:50} {left:6.0f} ms   limit {limit}, goal {goal}")
        for name, value in self.rows.items():
            print(f"{name:60} {value}")
        for name, error in self.errors.items():
            print(f"FAILED: {name}: {error}")
