"""Programs that try to exceed their limits: each is stopped in time with the right outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conftest import sample
from tests.vm.conftest import PROGRAMS, left_behind
from x07_sandbox.host import settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Need
    from tests.vm.conftest import Ran, Sandbox

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

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


def test_no_process_at_all_with_procs_0(sandbox: Sandbox) -> None:
    """With limits.procs 0 a program runs, but can make neither a thread nor a child."""
    ran = sandbox.behave("threads", policy={"limits.procs": 0})
    assert ran.outcome == "ok"
    assert values(ran) == {"thread": "EAGAIN", "child": "EAGAIN"}


def test_outputs_held_in_sockets_do_not_delay_the_run(sandbox: Sandbox) -> None:
    """A program whose outputs are held open in unreceived socket messages ends at once with its own status."""
    ran = sandbox.run(PROGRAMS / "send_away.c")
    assert (ran.outcome, ran.result.exit_code, ran.stdout, ran.stderr) == ("failed", 7, b"sent\n", b"away\n"), (
        ran.reason
    )
    assert ran.program_ms < 45_000


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


def test_a_detached_daemon_is_killed(sandbox: Sandbox) -> None:
    """A program that closes all descriptors and leaves a daemon ends with its own status, and the daemon is killed."""
    ran = sandbox.behave("close-everything", policy={"limits.wall_ms": 60_000})
    assert (ran.outcome, ran.result.exit_code) == ("failed", 5)
    assert ran.program_ms < 45_000


# memory


def test_memory_without_end_is_oom(sandbox: Sandbox) -> None:
    """A program that allocates without end is `oom` with exit code 137, and its earlier output is kept."""
    ran = sandbox.behave("hog", policy={"limits.mem_bytes": 64 * MIB})
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("oom", 137, "policy")
    assert "64 MiB" in ran.reason
    assert ran.lines() == ["allocating"]
    assert 60 * MIB < ran.result.phases["run"].memory_peak_bytes <= 64 * MIB


def test_a_machine_killed_by_the_hosts_oom_killer_is_guest_lost(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, state: Path, need: Need
) -> None:
    """If the host's kernel OOM-kills the machine, the run ends at once as the host's fault, with advice."""
    monkeypatch.setattr("x07_sandbox.backends.qemu.start.VMM_BYTES", -480 * MIB)  # much less than the program asks for
    ran = sandbox.behave("hog")
    need("hold memory" in str(ran.result.jail), "this host gives us no memory group", installable=False)
    assert (ran.outcome, ran.result.fault) == ("guest-lost", "host"), ran.reason
    assert "ran out of memory" in ran.reason
    assert left_behind(state) == []


def test_memory_of_a_child_counts_as_the_programs(sandbox: Sandbox) -> None:
    """When a child is killed for memory, the whole program ends as `oom`."""
    ran = sandbox.behave("hog-child", policy={"limits.mem_bytes": 64 * MIB})
    assert (ran.outcome, ran.stdout) == ("oom", b"")


def test_exit_code_137_alone_is_not_oom(sandbox: Sandbox) -> None:
    """A program that exits with 137 is `failed`, not `oom`."""
    ran = sandbox.behave("exit", "137")
    assert (ran.outcome, ran.result.exit_code, ran.result.x07_exit_code) == ("failed", 137, 137)


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


def test_writing_10_gb_to_the_scratch_disk_ends_at_the_limit(sandbox: Sandbox, *, full: bool) -> None:
    """Writing 10 GB to the scratch disk ends as `timeout`, or with ENOSPC at the disk's size, never beyond it."""
    wall_ms = 300_000 if full else 6000
    ran = sandbox.behave("write", "/opt/x07", policy={"limits.wall_ms": wall_ms})
    assert ran.outcome in {"ok", "timeout"}, ran.reason
    assert in_time(ran, wall_ms)
    if ran.outcome == "ok":
        _, _, error, mib = ran.lines()[0].split()
        assert error == "ENOSPC"
        assert 7 * 1024 < int(mib) < 8 * 1024
        assert ran.denied("scratch") == 1


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


def test_the_number_of_files_on_the_scratch_disk_is_limited(sandbox: Sandbox) -> None:
    """Empty files on the scratch disk end at limits.wall_ms or the disk's inode limit; guest and host stay alive."""
    ran = sandbox.behave("many", "/opt/x07", policy={"limits.wall_ms": 4000, "limits.mem_bytes": 64 * MIB})
    assert ran.outcome in {"ok", "timeout"}, ran.reason
    assert in_time(ran, 4000)


# time


def test_sleeping_for_ever_is_a_timeout(sandbox: Sandbox) -> None:
    """A program that sleeps forever ends as `timeout` with exit code 124 at limits.wall_ms, its output kept."""
    ran = sandbox.behave("sleep", policy={"limits.wall_ms": 5000})
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("timeout", 124, "policy")
    assert ran.program_ms >= 5000
    assert in_time(ran, 5000)
    assert "5 s" in ran.reason
    assert "stopped" not in ran.reason
    assert ran.lines() == ["sleeping"]


@pytest.mark.parametrize("more", sample([("16",), (), ("0", "16")], 2), ids=str)
def test_threads_and_children_share_one_cpu_limit(sandbox: Sandbox, more: tuple[str, ...]) -> None:
    """CPU time of one thread, many threads or children ends as `cpu-limit` with exit code 124."""
    ran = sandbox.behave("burn", *more, policy={"limits.cpu_ms": 1000, "limits.wall_ms": 60_000})
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("cpu-limit", 124, "policy")
    assert "CPU time limit of 1 s" in ran.reason
    assert ran.program_ms < 45_000
    # A guest counts time in which its host was paused as used; a separate budget for each would make 17 s.
    assert 1000 <= ran.result.phases["run"].cpu_ms < 12_000


# output


@pytest.mark.parametrize(("streams", "capped"), sample([("12", ""), ("1", "stdout"), ("2", "stderr")], 2))
def test_exactly_the_output_limit_is_kept(sandbox: Sandbox, streams: str, capped: str) -> None:
    """Too much output ends as `output-limit` with exit code 153; exactly the limit is kept and marked truncated."""
    cap = 300_001
    ran = sandbox.behave("flood", streams, max_output_bytes=cap)
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("output-limit", 153, "policy")
    assert ran.result.phases["run"].cpu_ms > 0
    over = capped or ("stdout" if ran.result.stdout.truncated else "stderr")
    assert f"the output limit of {cap} bytes for {over} (--max-output-bytes)" in ran.reason
    output = ran.result.stdout if over == "stdout" else ran.result.stderr
    assert (output.bytes, output.truncated) == (cap, True)
    assert (ran.stdout if over == "stdout" else ran.stderr) == b"x" * cap
    assert max(len(ran.stdout), len(ran.stderr)) == cap


def test_output_of_exactly_the_limit_is_ok(sandbox: Sandbox) -> None:
    """A program that writes exactly the allowed output is `ok`."""
    data = bytes(100_000)
    ran = sandbox.behave("echo", stdin=data, max_output_bytes=len(data))
    assert (ran.outcome, ran.stdout, ran.result.stdout.truncated) == ("ok", data, False)


# descriptors and cores


@pytest.mark.parametrize("fds", sample([8, 2, 3, 0], 2))
def test_the_number_of_descriptors_is_limited(sandbox: Sandbox, fds: int) -> None:
    """A program gets exactly limits.fds descriptors; if its loader needs more, it fails by itself."""
    ran = sandbox.behave("open-many", policy={"limits.fds": fds})
    if fds > 3:
        assert (ran.outcome, ran.lines()) == ("ok", [f"opened {fds - 3} EMFILE"])
    else:
        # The dynamic loader cannot open libc: the program ends by itself, and nothing was denied.
        assert (ran.outcome, ran.result.exit_code) == ("failed", 127), ran.reason


def test_a_python_program_without_descriptors_fails_by_itself(sandbox: Sandbox) -> None:
    """With limits.fds 0 a Python program starts and ends by itself, because Python cannot open it."""
    ran = sandbox.run_text("none.py", "print('started')\n", policy={"limits.fds": 0})
    assert (ran.outcome, ran.result.exit_code, ran.result.fault) == ("failed", 2, "program"), ran.reason


@pytest.mark.parametrize("allowed", [False, True])
def test_the_policy_controls_core_dumps(sandbox: Sandbox, *, allowed: bool) -> None:
    """limits.core_dumps decides whether a crash leaves a core file."""
    ran = sandbox.behave("core", policy={"limits.core_dumps": allowed})
    assert ran.outcome == "ok"
    assert values(ran) == {"limit": "some" if allowed else "none", "core": str(int(allowed)), "file": str(int(allowed))}
