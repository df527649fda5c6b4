"""The recorded time of each test file, by which runs start the slowest files first.

`pytest --record-durations` rewrites tests/durations.json. A file that it does not name counts as the slowest.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ENGINES: Final = ("podman", "docker", "containerd")
ENGINE_OF: Final = {
    "tests/containers/test_apple.py": "podman",
    "tests/containers/test_containers.py": "podman",
    "tests/containers/test_firecracker.py": "containerd",
}
RECORD: Final = Path(__file__).with_suffix(".json")


def recorded() -> dict[str, int]:
    """Return the seconds of each recorded test file, by its path in the repository; nothing if there is no record."""
    try:
        text = RECORD.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    found: dict[str, int] = json.loads(text)
    return found


def file_of(nodeid: str) -> str:
    """Return the path of a test's file."""
    return nodeid.partition("::")[0]


def group_of(nodeid: str) -> str:
    """Return what one worker runs: a file, or the tests of a container engine, whose store is then filled once."""
    file, _, words = nodeid.partition("[")
    named = words.rstrip("]").split("-")
    return next((engine for engine in ENGINES if engine in named), ENGINE_OF.get(file_of(file), file_of(file)))


def slowest_first(names: Iterable[str], seconds: Mapping[str, int]) -> list[str]:
    """Return each name once: names without a time first, then the others by time; equals stay in their order."""
    return sorted(dict.fromkeys(names), key=lambda name: -seconds.get(name, math.inf))


def sort_by_file(items: list[pytest.Item]) -> None:
    """Sort tests so that those of the slowest files are first. The tests of a file stay in their order.

    xdist (--no-loadscope-reorder) hands out groups (`group_of`) in this order: one to each worker, and the next one
    to a worker with at most two tests left. So the last files are the shortest, and no worker is left with a long one.
    """
    names = slowest_first((file_of(item.nodeid) for item in items), recorded())
    place = {name: number for number, name in enumerate(names)}
    items.sort(key=lambda item: place[file_of(item.nodeid)])


class Recorder:
    """A plugin that adds up the time of each file's tests, fixtures included, and records it in whole seconds.

    xdist passes it the reports of all workers. Files that did not run keep their times.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the time of a test's setup, call or teardown."""
        self._seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the record, unless the run was interrupted: its last files would count as short."""
        if exitstatus not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
            return
        times = recorded() | {name: round(seconds) for name, seconds in self._seconds.items()}
        root = RECORD.parent.parent
        left = {name: times[name] for name in sorted(times) if (root / name).is_file()}
        RECORD.write_text(json.dumps(left, indent=1) + "\n", encoding="utf-8")
