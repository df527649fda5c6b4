"""The smoke gate's checks: wrong labels, remaining processes and unreported orphans."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

HOST: Final = Path(__file__).resolve().parents[2] / "scripts" / "ci" / "smoke" / "host.py"
JOB: Final = "1700000000000-1-1-run"


def host(*words: str | Path) -> tuple[int, str]:
    """Exit code and output of the gate's helper."""
    done = subprocess.run([sys.executable, "-I", HOST, *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout


def plant(state: Path, *, labels: dict[str, str] | None = None, **owner: Any) -> None:  # noqa: ANN401 - as in JSON
    """Write a job's record with these changes."""
    right = {"schema": "1", "run_id": JOB, "runner_instance": "ri-1", "deadline_unix_ms": "1700000090000"}
    shown = {f"io.x07.{name}": text for name, text in (right | (labels or {})).items()}
    folder = state / JOB
    folder.mkdir()
    record = {"run_id": JOB, "created_unix_ms": 1700000000000, "deadline_unix_ms": 1700000090000}
    (folder / "job.json").write_text(json.dumps(record))
    (folder / "owner.json").write_text(json.dumps({"instance": "0" * 32, "labels": shown} | owner))


@pytest.mark.parametrize(
    ("name", "text"), [("schema", "2"), ("run_id", "another"), ("deadline_unix_ms", "1"), ("runner_instance", "")]
)
def test_a_wrong_label_is_named(tmp_path: Path, name: str, text: str) -> None:
    """A missing or wrong label fails and is named, right labels pass, and a missing record fails."""
    assert host("labels", tmp_path, JOB)[0] == 1
    plant(tmp_path, labels={name: text})
    code, output = host("labels", tmp_path, JOB)
    assert (code, f"io.x07.{name}" in output) == (0, True)
    (tmp_path / "right").mkdir()
    plant(tmp_path / "right")
    assert host("labels", tmp_path / "right", JOB) == (0, "")


def test_a_living_process_of_a_job_is_seen(tmp_path: Path) -> None:
    """A recorded process that is alive is found, and a reused pid is not."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    plant(tmp_path, processes={"inner": {"pid": os.getpid(), "start_ticks": ticks}})
    assert host("remains", tmp_path, JOB) == (0, f"its inner process {os.getpid()} is alive\n")
    gone = {"processes": {"inner": {"pid": os.getpid(), "start_ticks": ticks - 1}}, "instance": "1" * 32}
    (tmp_path / JOB / "owner.json").write_text(json.dumps(gone))
    assert host("remains", tmp_path, JOB) == (0, "")


def test_a_process_with_the_mark_and_a_control_group_are_seen(tmp_path: Path) -> None:
    """A process with the job's mark and an existing cgroup are found."""
    mark = f"x07-test-{os.getpid()}"
    plant(tmp_path, instance=mark, cgroups=[str(tmp_path), str(tmp_path / "gone")])
    argv = [sys.executable, "-c", "input()", mark]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        code, output = host("remains", tmp_path, JOB)
        process.kill()
    assert code == 0
    assert output.splitlines() == [
        f"process {process.pid} has the job's mark in its arguments",
        f"its control group {tmp_path} still exists",
    ]


def test_a_process_with_the_mark_is_seen_without_proc() -> None:
    """Where there is no /proc, ps lists the processes with a job's mark."""
    marked = runpy.run_path(str(HOST))["_marked_by_ps"]
    mark = f"x07-test-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", "input()", mark], stdin=subprocess.PIPE) as process:
        found = [*marked(mark)]
        process.kill()
    assert found == [process.pid]
    assert [*marked(f"{mark}-absent")] == []


def test_a_value_in_a_list_is_found(tmp_path: Path) -> None:
    """The number of an item is its key; what is absent prints nothing."""
    (tmp_path / "found.json").write_text('[{"configuration": {"labels": {"io.x07.schema": "1"}}}]', encoding="utf-8")
    keys = ("configuration", "labels", "io.x07.schema")
    assert host("value", tmp_path / "found.json", "0", *keys) == (0, "1\n")
    assert host("value", tmp_path / "found.json", "1", *keys) == (0, "\n")


@pytest.mark.parametrize(
    ("removed", "code"), [([{"kind": "job", "id": JOB, "why": "the x07 process that started it is dead"}], 0), ([], 1)]
)
def test_an_orphan_has_to_be_named_as_removed(tmp_path: Path, removed: list[dict[str, str]], code: int) -> None:
    """A sweep passes only if it reports the orphan as removed."""
    report = {"removed": removed, "kept": [{"kind": "job", "id": JOB, "why": "it is alive"}]}
    (tmp_path / "sweep.json").write_text(json.dumps(report))
    assert host("removed", tmp_path / "sweep.json", JOB) == (code, "")
