"""Limits set by flags: which policies they may raise, and how they are parsed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.cli.parser import add_groups, given_rows
from x07_sandbox.errors import Flag, UsageError
from x07_sandbox.options import BY_FLAG, OPTIONS, keyword, parse_size, size_text
from x07_sandbox.policy.changes import LimitChanges, change_limits
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.model import EffectivePolicy
from x07_sandbox.sessions.request import ProjectPolicy, RunRequest, effective_policy_of, make_request, reach_of

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
RAISED = LimitChanges(mem_bytes=GIB, cpu_ms=90_000, wall_ms=120_000, procs=128, fds=512)


def effective_policy(policy: Any, **limits: Any) -> EffectivePolicy:  # noqa: ANN401 - as a request takes them
    """The policy that holds for a request."""
    return effective_policy_of(RunRequest(source=b"", policy=policy, limits=LimitChanges(**limits)))


@pytest.mark.parametrize("policy", [None, "built-in:default"])
def test_flags_raise_the_limits_of_a_built_in_policy(policy: str | None) -> None:
    """Flags may raise the limits of a built-in policy."""
    found = effective_policy(policy, **RAISED.given())
    limits = found.policy.limits
    assert (limits.mem_bytes, limits.cpu_ms, limits.wall_ms) == (GIB, 90_000, 120_000)
    assert (limits.procs, limits.fds) == (128, 512)
    assert found.data == render_policy(found.policy)
    assert reach_of(found).tops["limits.wall_ms"] == 600_000


def test_more_time_is_more_cpu_time_too() -> None:
    """A longer --timeout raises the CPU time limit too, unless --cpu-time or a policy file sets it."""
    assert effective_policy(None, wall_ms=300_000).policy.limits.cpu_ms == 300_000
    assert effective_policy(None, wall_ms=300_000, cpu_ms=9000).policy.limits.cpu_ms == 9000
    assert effective_policy(None, wall_ms=5000).policy.limits.cpu_ms == default_policy().limits.cpu_ms
    assert effective_policy(default_policy(), wall_ms=5000).policy.limits.cpu_ms == default_policy().limits.cpu_ms


def test_raised_processes_hold_for_children_too() -> None:
    """--procs raises the limit on child processes too."""
    assert run_limits(effective_policy(None, procs=128).policy).tasks == 129
    assert run_limits(effective_policy("built-in:worker-parallel", procs=32).policy).tasks == 33


@pytest.mark.parametrize(("field", "value"), RAISED.given().items())
@pytest.mark.parametrize("kind", ["file", "project", "value"])
def test_a_given_policy_is_only_lowered(tmp_path: Path, kind: str, field: str, value: int) -> None:
    """Flags can only lower the limits of a user's policy, and the error names the field to edit."""
    place = tmp_path / "strict.json"
    strict = replace(default_policy(), limits=replace(default_policy().limits, fds=256))
    place.write_bytes(render_policy(strict))
    project = ProjectPolicy(place, place.read_bytes(), str(tmp_path))
    policy = {"file": str(place), "project": project, "value": strict}[kind]
    with pytest.raises(UsageError, match="allows at most") as caught:
        effective_policy(policy, **{field: value})
    assert f"Set limits.{field} to {value} in the policy" in caught.value.fix
    assert caught.value.policy_cause == (f"limits.{field}", value)
    held = getattr(strict.limits, field)
    lowered = effective_policy(policy, **{field: held // 2})
    if field != "procs":
        assert getattr(lowered.policy.limits, field) == held // 2
        assert reach_of(lowered).tops == {f"limits.{field}": held}


def test_a_smaller_number_of_children_is_not_passed_over() -> None:
    """A tighter process.max_live limits --procs and is named in the error."""
    base = replace(default_policy(), process=replace(default_policy().process, max_live=4))
    with pytest.raises(UsageError, match=r"allows at most 4 \(process\.max_live\)"):
        change_limits(base, LimitChanges(procs=32), may_raise=False, source="strict.json")
    made = change_limits(base, LimitChanges(procs=3), may_raise=False, source="strict.json")
    assert run_limits(made).tasks == 4


@pytest.mark.parametrize(
    ("flag", "field", "value", "text", "argument"),
    [
        ("--timeout", "wall_ms", 600_000, "--timeout 600", "timeout_s=600"),
        ("--cpu-time", "cpu_ms", 2500, "--cpu-time 2.5", "cpu_s=2.5"),
        ("--memory", "mem_bytes", 1 << 30, "--memory 1G", 'memory="1G"'),
        ("--procs", "procs", 20, "--procs 20", "procs=20"),
    ],
)
def test_a_value_is_read_as_it_is_written(flag: str, field: str, value: int, text: str, argument: str) -> None:
    """Each kind of value is written as its flag and its keyword take it."""
    row = BY_FLAG[flag]
    assert (row.flag_text(value), keyword(Flag(text))) == (text, argument)
    assert row.read(text.partition(" ")[2]) == value
    assert flags(*text.split()).limits == LimitChanges(**{field: value})


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("1G", GIB), ("1.5g", GIB * 3 // 2), ("2GiB", 2 * GIB), ("64mb", 64 << 20), ("4096", 4096)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    """Sizes accept binary units in any case."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1.5", "1e9", "1 G B", "1T", "0x10", "\u0661G", "nan"])
def test_other_texts_are_no_size(text: str) -> None:
    """Anything else is no size."""
    assert parse_size(text) is None


@given(st.integers(0, 1 << 34))
def test_printed_sizes_can_be_parsed(size: int) -> None:
    """Every printed size can be pasted as a value."""
    assert parse_size(size_text(size)) == size


def flags(*words: str) -> RunRequest:
    """The request from flags of `x07 run`."""
    parser = argparse.ArgumentParser()
    add_groups(parser, "run")
    return make_request(given_rows(parser.parse_args(words), OPTIONS))


def test_flags_become_limits() -> None:
    """Each flag sets exactly its own limit."""
    assert flags() == RunRequest()
    assert flags("--memory", "1G", "--cpu-time", "2.5").limits == LimitChanges(mem_bytes=GIB, cpu_ms=2500)
    words = ("--timeout", "0.0001", "--procs", "0", "--fds", "12")
    assert flags(*words).limits == LimitChanges(wall_ms=1, procs=0, fds=12)
    assert flags("--max-file-size", "1G").limits == LimitChanges(file_bytes=GIB)
    found = flags("--build-timeout", "900", "--scale-limits")
    assert (found.limits, found.build_wall_ms, found.scale_limits) == (None, 900_000, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--memory", "lots"),
        ("--memory", "1K"),
        ("--memory", "17G"),
        ("--procs", "1025"),
        ("--max-file-size", "0"),
        ("--max-file-size", "4G"),
        ("--build-timeout", "3601"),
    ],
)
def test_a_flag_out_of_range_is_refused(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A flag out of range is a usage error."""
    with pytest.raises(SystemExit):
        flags(*words)
    assert words[0] in capsys.readouterr().err


def test_the_size_of_files_follows_the_flag() -> None:
    """--max-file-size sets both limits of files, and raises only those of a built-in policy."""
    made = effective_policy(None, file_bytes=GIB).policy.fs
    assert (made.max_read_bytes, made.max_write_bytes) == (GIB, GIB)
    fs = replace(default_policy().fs, max_read_bytes=0, max_write_bytes=2 << 20)
    own = replace(default_policy(), fs=fs)
    assert effective_policy(own, file_bytes=1 << 20).policy.fs.max_read_bytes == 1 << 20
    with pytest.raises(UsageError, match=r"at most 2M \(fs.max_write_bytes\). Set fs.max_write_bytes to 3145728 in"):
        effective_policy(own, file_bytes=3 << 20)
