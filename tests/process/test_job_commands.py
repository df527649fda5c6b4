"""`x07 ps`, `inspect`, `logs`, `kill`, `df` and `sweep`, over runs without a machine, from any process of the user."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import X07
from tests.command import x07 as command
from tests.published import document
from tests.unit.test_stop_rules import GONE, edit, recorded
from x07_sandbox.records.runs import mark_done, mark_reaped, runs_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

NONE = ["--sandbox-backend", "none", "--i-accept-weaker-isolation", "--toolchain", "python"]
LONG = "import sys, time; print('begun', flush=True); print('warned', file=sys.stderr, flush=True); time.sleep(600)"
WAIT_S = 60


def x07(*words: str) -> subprocess.CompletedProcess[bytes]:
    """Carry out one command."""
    done = command(Path.cwd(), *words)
    return subprocess.CompletedProcess(words, done.code, done.out, done.err.encode())


def found(*words: str) -> dict[str, Any]:
    """Return its JSON document, checked against its published schema."""
    done = x07(*words)
    assert done.returncode == 0, done.stderr
    return document(done.stdout)


@contextlib.contextmanager
def running(code: str = LONG, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A run whose program has printed a line, and the run's name."""
    argv = [*X07, "run", *NONE, *words, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as runner:
        try:
            assert runner.stdout is not None
            assert runner.stdout.readline() == b"begun\n"
            (run,) = {job["run"] for job in found("ps", "--json")["jobs"]}
            yield runner, run
        finally:
            runner.kill()


def test_ps_lists_ended_jobs_only_with_all() -> None:
    """`x07 ps` lists a live job with labels, state and remaining time, and an ended job only with --all."""
    with running() as (runner, run):
        (job,) = found("ps", "--json")["jobs"]
        assert (job["run"], job["phase"], job["backend"], job["state"]) == (run, "run", "none", "running")
        assert job["labels"]["io.x07.job_id"] == job["job_id"] == f"{run}-run"
        assert 0 < job["left_s"] < 1000
        lines = x07("ps").stdout.decode().splitlines()
        assert len(lines) == 2
        assert lines[1].split()[:4] == [run, "run", "none", "running"]
        assert x07("kill", run).returncode == 0
        runner.wait(WAIT_S)
    assert found("ps", "--json")["jobs"] == []
    assert {job["state"] for job in found("ps", "--all", "--json")["jobs"]} == {"done"}


def test_ps_shows_the_programs_name_and_no_arguments(tmp_path: Path) -> None:
    """`x07 ps` shows a program's name without its arguments, which may hold secrets."""
    program = tmp_path / "fold\x1b[31mer" / "prog.py"
    program.parent.mkdir()
    program.write_text("pass\n")
    assert x07("run", *NONE, str(program), "--", "token=secret").returncode == 0
    jobs = found("ps", "--all", "--json")["jobs"]
    assert {job["program"] for job in jobs} == {str(program)}
    printed = x07("ps", "--all").stdout
    assert b"prog" in printed
    assert b"\x1b" not in printed
    assert b"secret" not in printed


def test_a_killed_run_ends_as_cancelled() -> None:
    """`x07 kill` with a run's name prefix ends job and command from any process; the result names x07 kill."""
    with running() as (runner, run):
        done = x07("kill", run[:-1])
        assert (done.returncode, done.stdout) == (0, b"")
        assert b"ended" in done.stderr
        assert runner.wait(WAIT_S) == 143
    result = found("inspect", run)["result"]
    assert (result["outcome"], result["fault"], result["signal"]) == ("cancelled", "none", None)
    assert result["reason"] == "the run was cancelled by x07 kill while the guest was running the program"
    assert not Path(found("inspect", run)["paths"]["folder"], "kill").exists()
    assert b"had already ended" in x07("kill", run).stderr


def test_kill_prints_json() -> None:
    """`x07 kill --json` prints one object with the run's whole name and the number of jobs it ended."""
    with running() as (runner, run):
        killed = found("kill", "--json", run[:-1])
        assert (killed["run"], killed["jobs_ended"], runner.wait(WAIT_S)) == (run, 1, 143)
    assert found("kill", "--json", run) == {"schema_version": "x07.sandbox.kill@0.1.0", "run": run, "jobs_ended": 0}
    failed = x07("kill", "--json", "no-such-run")
    assert (failed.returncode, document(failed.stdout)["error"]["what"]) == (2, "cannot find run no-such-run")


def test_the_run_of_a_stopped_command_is_cancelled_too() -> None:
    """`x07 kill` of a run whose command is stopped (Ctrl-Z) ends its job, and the command later reports cancelled."""
    with running() as (runner, run):
        runner.send_signal(signal.SIGSTOP)
        with subprocess.Popen([*X07, "kill", run], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as kill:
            deadline = time.monotonic() + WAIT_S
            while found("ps", "--json")["jobs"][0]["state"] != "waiting" and time.monotonic() < deadline:
                pass
            runner.send_signal(signal.SIGCONT)
            assert (kill.wait(WAIT_S), runner.wait(WAIT_S)) == (0, 143)
    assert "by x07 kill while" in found("inspect", run)["result"]["reason"]


def test_a_sweep_spares_the_run_of_a_stopped_command() -> None:
    """A sweep leaves the run of a stopped command (Ctrl-Z) alone before its deadline."""
    with running() as (runner, run):
        runner.send_signal(signal.SIGSTOP)
        assert found("sweep", "--json")["removed"] == []
        runner.send_signal(signal.SIGCONT)
        assert x07("kill", run).returncode == 0
        assert runner.wait(WAIT_S) == 143


def test_the_run_of_a_dead_command_is_killed_too() -> None:
    """`x07 kill` of a run whose command was killed sweeps it."""
    with running() as (runner, run):
        runner.kill()
        runner.wait()
        assert [job["state"] for job in found("ps", "--json")["jobs"]] == ["orphaned"]
        assert x07("kill", run).returncode == 0
        (job,) = [job for job in found("inspect", run)["jobs"] if job["job_id"].endswith("-run")]
        assert job["state"] == "reaped"
        assert not (Path(job["folder"]) / "files").exists()


def test_another_runners_run_is_not_killed() -> None:
    """`x07 kill` of another runner's run is an error with the reason, and ends nothing."""
    record = recorded(GONE)
    edit(record, "owner.json", labels={"io.x07.runner_instance": "ri-" + "0" * 32, "io.x07.image_digest": ""})
    done = x07("kill", record.run_id)
    assert done.returncode == 125
    assert b"another user or host" in done.stderr


def test_inspect_shows_record_labels_owner_and_paths() -> None:
    """`x07 inspect` prints one JSON object with a run's jobs, records, labels, owners, end and file paths."""
    assert x07("run", *NONE, "-c", "raise SystemExit(3)").returncode == 3
    run = found("ps", "--all", "--json")["jobs"][0]["run"]
    report = found("inspect", run[:15])
    assert (report["run"], report["live"], report["result"]["exit_code"]) == (run, False, 3)
    for job in report["jobs"]:
        assert job["record"]["run_id"] == job["job_id"] == job["labels"]["io.x07.run_id"]
        assert job["owner"]["processes"]
    assert all(Path(path).exists() for path in report["paths"].values())
    assert found("inspect", report["jobs"][0]["job_id"])["run"] == run
    assert "instance" not in json.dumps(report["jobs"][0]["owner"])


@pytest.mark.parametrize("verb", ["inspect", "kill", "logs"])
def test_a_run_name_must_be_unique(verb: str) -> None:
    """A run name that matches no run, or several, is a usage error with advice."""
    first, second = recorded(), recorded()
    mark_done(first)
    mark_done(second)
    unknown, shared = x07(verb, "9-9-9"), x07(verb, first.run_id[:5])
    assert (unknown.returncode, shared.returncode) == (2, 2)
    assert b"x07 ps --all" in unknown.stderr
    assert b"Use more digits of the id" in shared.stderr


def test_logs_prints_what_a_run_printed() -> None:
    """`x07 logs` prints the output and errors of the latest or a named run to the matching streams."""
    assert x07("run", *NONE, "-c", "import sys; print('out'); print('err', file=sys.stderr)").returncode == 0
    run = found("ps", "--all", "--json")["jobs"][0]["run"]
    for done in (x07("logs"), x07("logs", run)):
        assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
    assert x07("logs", "--build", run).returncode == 0


def test_logs_follows_a_run_and_ends_with_it() -> None:
    """`x07 logs --follow` prints output as it comes, and ends when the run ends."""
    code = "import time; print('begun', flush=True); time.sleep(1); print('later', flush=True); time.sleep(600)"
    with running(code) as (runner, run):
        with subprocess.Popen([*X07, "logs", "--follow", run], stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            assert follower.stdout.readline() == b"begun\n"
            assert follower.stdout.readline() == b"later\n"
            assert follower.poll() is None
            assert x07("kill", run).returncode == 0
            assert follower.stdout.read() == b""
            assert follower.wait(WAIT_S) == 0
        runner.wait(WAIT_S)


def test_logs_sends_a_terminal_no_control_characters() -> None:
    """`x07 logs` removes a program's escape sequences before they reach a terminal."""
    assert x07("run", *NONE, "--raw", "-c", r"print('\x1b]0;title\x07red')").returncode == 0
    ours, theirs = pty.openpty()
    try:
        subprocess.run([*X07, "logs"], stdin=subprocess.DEVNULL, stdout=theirs, check=True, timeout=WAIT_S)
        printed = os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"red" in printed
    assert b"\x1b" not in printed
    assert b"\x07" not in printed


def test_ps_all_lists_foreign_records() -> None:
    """`x07 ps --all` lists foreign, damaged and newer records with the reason, and leaves them alone."""
    states: dict[str, tuple[str, object]] = {
        "foreign": ("labels", {"io.x07.runner_instance": "ri-" + "0" * 32, "io.x07.image_digest": ""}),
        "damaged": ("instance", "x"),
        "newer": ("schema_version", "x07.sandbox.owner@9.0.0"),
    }
    expected = {}
    for state, (key, value) in states.items():
        record = recorded(GONE)
        edit(record, "owner.json", **{key: value})
        expected[record.job_id] = state
    reaped = recorded(GONE)
    mark_reaped(reaped)
    expected[reaped.job_id] = "reaped"
    jobs = found("ps", "--all", "--json")["jobs"]
    assert {job["job_id"]: job["state"] for job in jobs} == expected
    assert all(job["why"] for job in jobs)
    assert found("ps", "--json")["jobs"] == []


def test_sweep_reports_what_it_removes(state: Path) -> None:
    """`x07 sweep` reports what it removes and keeps, as text or as one JSON object; --dry-run removes nothing."""
    record = recorded(GONE)
    dry = found("sweep", "--dry-run", "--json")
    assert (dry["dry_run"], [gone["id"] for gone in dry["removed"]]) == (True, [record.job_id])
    done = x07("sweep")
    assert done.returncode == 0
    assert (
        f"removed job {record.job_id}: the x07 process that started it is dead\nremoved 1 item\n"
        in done.stdout.decode()
    )
    assert sorted(path.name for path in (state / record.job_id).iterdir()) == ["job.json", "owner.json", "reaped"]


def test_df_shows_sizes_and_what_prune_frees() -> None:
    """`x07 df` shows the size of each part, and how much `x07 prune` would free."""
    assert x07("run", *NONE, "-c", "print('x' * 1_000_000)").returncode == 0
    report = found("df", "--json")
    parts = {part["name"]: part for part in report["parts"]}
    assert parts.keys() == {"images", "templates", "cache", "runs", "records"}
    assert parts["runs"]["bytes"] > 1_000_000
    assert parts["records"]["files"] >= 6
    assert report["bytes"] == sum(part["bytes"] for part in parts.values())
    assert (parts["runs"]["prunable_bytes"], parts["records"]["prunable_bytes"]) == (0, 0)
    assert b"PRUNABLE" in x07("df").stdout


def test_a_queued_run_is_listed_and_killed(state: Path) -> None:
    """A queued run without a job is listed as waiting, and `x07 kill` ends it."""
    argv = [*X07, "run", *NONE, "-c", "pass"]
    env = {**os.environ, "X07_VM_MAX_RUNNING": "1"}
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    with running() as (_, run), subprocess.Popen(argv, env=env, stdin=none, stderr=pipe) as second:
        deadline = time.monotonic() + WAIT_S
        waiting: list[str] = []
        while not waiting and time.monotonic() < deadline:
            waiting = [job["run"] for job in found("ps", "--json")["jobs"] if job["state"] == "waiting"]
        assert waiting
        assert run not in waiting
        killed = b""
        while b"ended" not in killed and time.monotonic() < deadline:  # it is listed before it can be killed
            killed = x07("kill", waiting[0]).stderr
        assert b"ended" in killed
        assert second.wait(WAIT_S) == 143
        assert second.stderr is not None
        assert b"cancelled: the run was cancelled by x07 kill." in second.stderr.read()
    assert runs_dir(state).is_dir()
