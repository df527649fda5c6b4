"""Programs that try to exceed their limits: each is stopped in time with the right outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import left_behind
from x07_sandbox.host import settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Need
    from tests.vm.conftest import Ran, Sandbox

pytestmark = pytest.mark.vm

MIB = 1 << 20
GRACE_MS = 1000
SLACK_MS = 30_000  # a busy or paused host acts late; a program that is not stopped runs for minutes


def values(ran: Ran) -> dict[str, str]:
    """Return the program's report, lines of "key value"."""
    return dict(line.split(" ", 1) for line in ran.lines() if " " in line)


def in_time(ran: Ran, wall_ms: int) -> bool:
    """Return whether the program ended within its limit and the grace time."""
    return ran.program_ms < wall_ms + GRACE_MS + SLACK_MS


# processes


def test_spawning_1000_processes_stops_at_the_limit(sandbox: Sandbox) -> None:
    """With limits.procs 64 a program gets exactly 64 more processes; each further one is denied and counted."""
    ran = sandbox.behave("spawn", "1000")
    assert ran.outcome == "ok"
    assert values(ran) == {"made": "64", "refused": "936"}
    assert ran.denied("limits.procs") == 936
    (denial,) = [denial for denial in ran.result.denials if denial.field == "limits.procs"]
    assert denial.how_to_allow is not None
    assert denial.how_to_allow.json_path == "$.limits.procs"
    assert denial.how_to_allow.value > 64
    assert ran.result.phases["run"].tasks_peak == 65


def test_a_fork_bomb_ends_at_its_deadline(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork bomb ends as `timeout`, and the guest can still report denials."""
    monkeypatch.setattr(settings, "STOPPED_S", 20.0)  # whether it can, not how soon
    ran = sandbox.behave("bomb", policy={"limits.wall_ms": 4000})
    assert (ran.outcome, ran.result.x07_exit_code) == ("timeout", 124)
    assert in_time(ran, 4000)
    assert ran.denied("limits.procs") > 0


def test_daemons_do_not_delay_the_run(sandbox: Sandbox) -> None:
    """The run ends with its program and all of its output, even if a daemon keeps standard output open."""
    ran = sandbox.behave("outlive", policy={"limits.wall_ms": 60_000})
    assert ran.outcome == "ok"
    assert ran.lines() == [f"line {number}" for number in range(20000)]
    assert ran.program_ms < 45_000


# memory


def test_a_machine_killed_by_the_hosts_oom_killer_is_guest_lost(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, state: Path, need: Need
) -> None:
    """If the host's kernel OOM-kills the machine, the run ends at once as the host's fault, with advice."""
    for module in ("start", "instance"):  # much less than the program asks for
        monkeypatch.setattr(f"x07_sandbox.backends.qemu.{module}.VMM_BYTES", -480 * MIB)
    ran = sandbox.behave("hog")
    need("hold memory" in str(ran.result.jail), "this host gives us no memory group", installable=False)
    assert (ran.outcome, ran.result.fault) == ("guest-lost", "host"), ran.reason
    assert "ran out of memory" in ran.reason
    assert left_behind(state) == []


def test_memory_of_a_child_counts_as_the_programs(sandbox: Sandbox) -> None:
    """When a child is killed for memory, the whole program ends as `oom` at its limit, which the reason names."""
    ran = sandbox.behave("hog-child", policy={"limits.mem_bytes": 64 * MIB})
    assert (ran.outcome, ran.stdout, ran.result.fault) == ("oom", b"", "policy")
    assert "64 MiB" in ran.reason
    assert 60 * MIB < ran.result.phases["run"].memory_peak_bytes <= 64 * MIB


def test_the_smallest_memory_limit_still_runs_a_program(sandbox: Sandbox) -> None:
    """limits.mem_bytes of 1 MiB, the minimum, is enough for a small C program."""
    ran = sandbox.behave("exit", "7", policy={"limits.mem_bytes": MIB})
    assert (ran.outcome, ran.result.exit_code) == ("failed", 7), ran.reason


# files


def test_writing_10_gb_to_memory_or_read_only_places_fails(sandbox: Sandbox) -> None:
    """Memory file systems are full at a quarter of the memory limit, and read-only places refuse new files at once."""
    places = ("/", "/x07/in", "/x07/out", "/dev", "/run", "/sys", "/proc", "/etc", "/usr/lib", "/var")
    ran = sandbox.behave("write", "/tmp", "/dev/shm", *places, policy={"limits.mem_bytes": 128 * MIB})  # noqa: S108
    assert ran.outcome == "ok", ran.reason
    assert ran.lines()[:2] == ["wrote /tmp ENOSPC 32", "wrote /dev/shm ENOSPC 32"]
    refused = {line.split()[1]: line.split()[2] for line in ran.lines()[2:]}
    assert refused == dict.fromkeys(places, "EROFS") | {"/proc": "ENOENT"}


def test_a_full_scratch_disk_is_a_denial(sandbox: Sandbox) -> None:
    """A program that fills the scratch disk gets ENOSPC and ends by itself, and the result names the disk."""
    ran = sandbox.behave("fill")
    assert ran.outcome == "ok", ran.reason
    assert ran.denied("scratch") == 1
    assert 7000 < int(ran.lines()[0].split()[2]) < 8192


def test_the_number_of_files_in_memory_is_limited(sandbox: Sandbox) -> None:
    """Too many empty files in memory fail with ENOSPC at a number set by the memory limit, not with oom."""
    ran = sandbox.behave("many", "/tmp", "/dev/shm", policy={"limits.mem_bytes": 32 * MIB})  # noqa: S108
    assert ran.outcome == "ok", ran.reason
    for line in ran.lines():
        _, _, error, count = line.split()
        assert error == "ENOSPC"
        assert 1000 < int(count) <= 2048


# descriptors and cores


def test_a_python_program_without_descriptors_fails_by_itself(sandbox: Sandbox) -> None:
    """With limits.fds 0 a Python program starts and ends by itself, because Python cannot open it."""
    ran = sandbox.run_text("none.py", "print('started')\n", policy={"limits.fds": 0})
    assert (ran.outcome, ran.result.exit_code, ran.result.fault) == ("failed", 2, "program"), ran.reason


def test_the_policy_allows_core_dumps(sandbox: Sandbox) -> None:
    """With limits.core_dumps a crash leaves a core file."""
    ran = sandbox.behave("core", policy={"limits.core_dumps": True})
    assert (ran.outcome, values(ran)) == ("ok", {"limit": "some", "core": "1", "file": "1"})
