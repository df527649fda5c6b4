"""Limits scaled under emulation, and the time limit of builds."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.user_settings import scale_when_emulated
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.guest import build_limits
from x07_sandbox.policy.outcomes import Evidence, Stage, build_verdict, classify
from x07_sandbox.sessions.scaling import _WORK, _printed, scaled_limits

if TYPE_CHECKING:
    from pathlib import Path


def test_time_and_cpu_time_are_multiplied_and_nothing_else() -> None:
    """Scaling multiplies wall and CPU time only."""
    limits = run_limits(default_policy())
    made, scaling, warnings = scaled_limits(limits, 8)
    assert (made.wall_ms, made.cpu_ms, warnings) == (480_000, 480_000, ())
    assert (scaling.factor, scaling.wall_ms, scaling.cpu_ms) == (8, 480_000, 480_000)
    assert (made.mem_bytes, made.procs, made.fds) == (limits.mem_bytes, limits.procs, limits.fds)


def test_scaled_limits_stop_at_the_maximum() -> None:
    """Scaled limits stop at 600 s with a warning."""
    made, scaling, warnings = scaled_limits(run_limits(default_policy()), 17)
    assert (made.wall_ms, made.cpu_ms, scaling.factor) == (600_000, 600_000, 17)
    assert [text.partition(" ")[0] for text in warnings] == ["limits.wall_ms", "limits.cpu_ms"]
    assert "instead of 1020 s" in warnings[0]


def test_times_that_a_guest_prints_are_checked() -> None:
    """The benchmark prints a time for each kind of work, and times that a guest may not print are refused."""
    done = subprocess.run([sys.executable, "-I", "-"], input=_WORK, capture_output=True, check=True)
    times = _printed(done.stdout)
    assert times == list(map(float, done.stdout.split()))
    for wrong in (
        b"",
        b"1\n" * 8,
        b"1\n" * 10,
        b"1\n" * 8 + b"0",
        b"1\n" * 8 + b"nan",
        b"1\n" * 8 + b"1e99",
        b"x\n" * 9,
    ):
        assert _printed(wrong) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, False),
        ("[net]\nopaque_ports = []\n", False),
        ('[limits]\nscale_when_emulated = "never"\n', False),
        ('[limits]\nscale_when_emulated = "auto"\n', True),
    ],
)
def test_the_settings_file_may_ask_for_scaled_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, *, wanted: bool
) -> None:
    """Limits are scaled only if the user's settings say "auto"."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if text is not None:
        (tmp_path / "x07").mkdir()
        (tmp_path / "x07" / "sandbox.toml").write_text(text)
    assert scale_when_emulated() == wanted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[limits]\nscale_when_emulated = true\n", 'neither "auto" nor "never"'),
        ('[limits]\nscale = "auto"\n', r"\[limits\] has an unknown key 'scale'"),
        ("limits = 5\n", "limits is not a table"),
        ("[limits\n", "it is not valid TOML"),
    ],
)
def test_an_invalid_setting_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str) -> None:
    """An invalid setting is an error."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "x07").mkdir()
    (tmp_path / "x07" / "sandbox.toml").write_text(text)
    with pytest.raises(UsageError, match=why):
        scale_when_emulated()
    (tmp_path / "x07" / "sandbox.toml").chmod(0o666)
    with pytest.raises(HostError, match="other users can write to it"):
        scale_when_emulated()


def test_build_timeout_sets_the_build_limits() -> None:
    """`--build-timeout` sets wall and CPU time of a build; the default is 300 s."""
    assert (build_limits().cpu_ms, build_limits().wall_ms) == (300_000, 300_000)
    assert (build_limits(900_000).cpu_ms, build_limits(900_000).wall_ms) == (900_000, 900_000)


@pytest.mark.parametrize(("wall_ms", "more"), [(300_000, "--build-timeout 600"), (2_000_000, "--build-timeout 3600")])
def test_a_build_that_took_too_long_names_its_flag(wall_ms: int, more: str) -> None:
    """A build that timed out names the flag that gives it more time."""
    late = classify(Evidence(stage=Stage.RUN, deadline_passed=True), limits=build_limits(wall_ms))
    found = build_verdict(late, wall_ms)
    assert (found.outcome, more in found.reason) == ("build-failed", True)
    most = build_verdict(late, settings.BUILD_S_MAX * 1000)
    assert "--build-timeout" not in most.reason
