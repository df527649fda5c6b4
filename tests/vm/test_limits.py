"""Limits that the caller sets, in real machines: they hold, are recorded, and the advice names a flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command import x07
from tests.conftest import need
from tests.vm.conftest import copy_cache, left_behind
from x07_sandbox import run_program
from x07_sandbox.backends.process import OsBackend
from x07_sandbox.host.settings import allowance_ms
from x07_sandbox.sessions import scaling

if TYPE_CHECKING:
    from x07_sandbox.sessions.result import Result

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("state")]

TOUCH = "data = bytearray(600 << 20)\nfor at in range(0, len(data), 4096): data[at] = 1\nprint('held')\n"
SPIN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\nprint('done')\n"


def advised(result: Result, field: str) -> str | None:
    """Return the flag that the result advises for a field."""
    (found,) = (denial.how_to_allow for denial in result.denials if denial.field == field)
    return None if found is None else found.flag


@pytest.mark.usefixtures("under_os")
def test_memory_is_raised_by_a_keyword() -> None:
    """A program over the default memory limit ends as `oom` with advice to use --memory, and completes with it."""
    need("limits.mem_bytes" in OsBackend().least_features().can_enforce, "no memory group here", installable=False)
    result = run_program(source=TOUCH, toolchain="python")
    assert (result.outcome, advised(result, "limits.mem_bytes")) == ("oom", "--memory 1G")
    result = run_program(source=TOUCH, toolchain="python", memory="1G", procs=100, check=True)
    assert result.stdout.text == "held\n"


@pytest.mark.usefixtures("under_os")
def test_a_lowered_limit_is_recorded_and_named(state: Path) -> None:
    """A job's deadline follows --timeout, and the reason and advice name the flag whose limit was reached."""
    words = ("run", "--json", "--timeout", "90", "--cpu-time", "1", "--toolchain", "python", "-c", SPIN.format(30))
    done = x07(Path.cwd(), *words)
    found = json.loads(done.out)
    assert (done.code, found["outcome"]) == (124, "cpu-limit")
    assert "the program reached its CPU time limit of 1 s (--cpu-time)" in found["reason"]
    assert [denial["how_to_allow"]["flag"] for denial in found["denials"]] == ["--cpu-time 2"]
    record = json.loads((state / found["phases"]["run"]["job_id"] / "job.json").read_text())
    assert record["deadline_unix_ms"] - record["created_unix_ms"] == allowance_ms() + 90_000
    assert left_behind(state) == []


@pytest.mark.usefixtures("image")
def test_a_build_has_a_time_limit_of_its_own(tmp_path: Path) -> None:
    """A build that exceeds `build_timeout_s` fails, and the reason says how to allow more."""
    (tmp_path / "Makefile").write_text("out:\n\tsleep 1000\n")
    text = 'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "make"\nfiles = ["Makefile"]\nartifact = "out"\n'
    (tmp_path / "x07-sandbox.toml").write_text(text)
    result = run_program(tmp_path, build_timeout_s=2)
    assert (result.outcome, result.x07_exit_code) == ("build-failed", 126)
    assert "time limit of 2 s" in result.reason
    assert "build_timeout_s=4" in result.reason


@pytest.mark.usefixtures("image")
def test_scale_limits_extends_time_limits_under_emulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scale_limits`, or the setting, multiplies time limits by the measured slowdown of an emulated machine."""
    copy_cache(tmp_path / "cache")
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    spin = SPIN.format(2.5)
    result = run_program(source=spin, toolchain="python", cpu_s=1)
    assert (result.outcome, result.scaling) == ("cpu-limit", None)
    assert ("--scale-limits" in result.denials[0].reason) == (result.isolation == "vm-emulated")
    result = run_program(source=spin, toolchain="python", cpu_s=2, timeout_s=50, scale_limits=True)
    if result.isolation == "vm-hardware":
        assert result.scaling is None
        return
    assert result.scaling is not None, result.warnings
    factor = scaling.known_factor()
    assert factor is not None
    assert (result.outcome, result.scaling.factor) == ("ok", factor)
    assert result.scaling.cpu_ms == min(600_000, 2000 * factor)
    assert result.scaling.wall_ms == min(600_000, 50_000 * factor)
    assert any("limits.wall_ms was scaled to 600 s" in text for text in result.warnings) == (factor > 12)
    settings = tmp_path / "x07" / "sandbox.toml"
    settings.parent.mkdir()
    settings.write_text('[limits]\nscale_when_emulated = "auto"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = run_program(source=spin, toolchain="python", cpu_s=2)
    assert (result.outcome, result.scaling and result.scaling.factor) == ("ok", factor)
    result = run_program(source=spin, toolchain="python", cpu_s=2, scale_limits=False)
    assert (result.outcome, result.scaling) == ("cpu-limit", None)
