"""Limits that the caller sets, in real machines: they hold, are recorded, and the advice names a flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command import x07
from tests.vm.conftest import copy_cache, left_behind
from x07_sandbox import Pool, SandboxError, load_policy, run_program
from x07_sandbox.host.settings import allowance_ms
from x07_sandbox.policy.decode import render_policy
from x07_sandbox.sessions import scaling

if TYPE_CHECKING:
    from x07_sandbox.sessions.result import Result

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900), pytest.mark.usefixtures("image", "state")]

TOUCH = "data = bytearray(600 << 20)\nfor at in range(0, len(data), 4096): data[at] = 1\nprint('held')\n"
SPIN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\nprint('done')\n"


def advised(result: Result, field: str) -> str | None:
    """Return the flag that the result advises for a field."""
    (found,) = (denial.how_to_allow for denial in result.denials if denial.field == field)
    return None if found is None else found.flag


def test_memory_and_processes_are_raised_by_keywords() -> None:
    """A program over the default memory limit ends as `oom` with advice to use --memory, and completes with it."""
    result = run_program(source=TOUCH, toolchain="python")
    assert (result.outcome, advised(result, "limits.mem_bytes")) == ("oom", "--memory 1G")
    result = run_program(source=TOUCH, toolchain="python", memory="1G", procs=100, check=True)
    assert result.stdout.text == "held\n"


def test_a_lowered_limit_is_recorded_and_named(state: Path) -> None:
    """A job's deadline follows --timeout, and the reason and advice name the flag whose limit was reached."""
    words = ("run", "--json", "--timeout", "90", "--cpu-time", "1", "--toolchain", "python", "-c", SPIN.format(30))
    done = x07(Path.cwd(), *words)
    found = json.loads(done.out)
    assert (done.code, found["outcome"]) == (124, "cpu-limit")
    assert "the program reached its CPU time limit of 1 s (--cpu-time)" in found["reason"]
    assert [denial["how_to_allow"]["flag"] for denial in found["denials"]] == ["--cpu-time 2"]
    if found["isolation"] == "vm-emulated":
        assert "--scale-limits" in found["denials"][0]["reason"]
    record = json.loads((state / found["phases"]["run"]["job_id"] / "job.json").read_text())
    assert record["deadline_unix_ms"] - record["created_unix_ms"] == allowance_ms() + 90_000
    assert left_behind(state) == []


def test_a_policy_file_is_never_exceeded(tmp_path: Path) -> None:
    """A flag above the policy file's limit is an error that names the field, and nothing runs."""
    (tmp_path / "strict.json").write_bytes(render_policy(load_policy()))
    words = ("run", "--policy", "strict.json", "--memory", "1G", "-c", "1", "--toolchain", "python")
    done = x07(tmp_path, *words)
    assert done.code == 2
    assert "cannot use --memory 1G: the policy strict.json allows at most 512M (limits.mem_bytes)" in done.err
    assert "Set limits.mem_bytes to 1073741824" in done.err


def test_a_pool_takes_policy_and_limits(tmp_path: Path) -> None:
    """`Pool.map` runs each input under the given policy and limits."""
    program = tmp_path / "prog.py"
    program.write_text("import resource, sys\nprint(sys.stdin.read(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n")
    with Pool(size=1) as pool:
        found = [result.stdout.text for result in pool.map(program, [b"a", b"b"], policy="built-in:cli", fds=64)]
        with pytest.raises(SandboxError, match=r"cannot use fds=4000|fds is 4000"):
            pool.submit(program, fds=4000).result(300)
    assert found == ["a 64\n", "b 64\n"]


def test_a_build_has_a_time_limit_of_its_own(tmp_path: Path) -> None:
    """A build that exceeds `build_timeout_s` fails, and the reason says how to allow more."""
    (tmp_path / "Makefile").write_text("out:\n\tsleep 1000\n")
    text = 'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "make"\nfiles = ["Makefile"]\nartifact = "out"\n'
    (tmp_path / "x07-sandbox.toml").write_text(text)
    result = run_program(tmp_path, build_timeout_s=2)
    assert (result.outcome, result.x07_exit_code) == ("build-failed", 126)
    assert "time limit of 2 s" in result.reason
    assert "build_timeout_s=4" in result.reason


def test_scale_limits_extends_time_limits_under_emulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scale_limits`, or the setting, multiplies time limits by the measured slowdown of an emulated machine."""
    copy_cache(tmp_path / "cache")
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    spin = SPIN.format(2.5)
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
