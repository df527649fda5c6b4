"""How a machine ends: after floods and failures, at its deadline without a runner, and when its runner dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import need, sample
from tests.vm.conftest import marked
from tests.vm.jail_helpers import (
    Account,
    Runner,
    account_fixture,  # noqa: F401 - pytest finds it here
    accounts_fixture,  # noqa: F401 - pytest finds it here
    each_form_fixture,  # noqa: F401 - pytest finds it here
    ended,
    ordinary_fixture,  # noqa: F401 - pytest finds it here
    parse,
)
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch

pytestmark = pytest.mark.vm

BOOT_S = 2.0
NEVER_S = 60.0  # for a VMM that ends by itself: a busy or suspended host must not cause a timeout
SLACK_S = 30.0
BOOT_REASON = "the guest did not boot in time"
SIGSYS = 31


def _phase(account: Account, mode: str, boot_s: float) -> dict[str, object]:
    """Run a phase with a VMM that behaves as *mode* says; assert that nothing is left and return the verdict."""
    with Runner(account, mode=mode, do="phase", boot_s=boot_s) as runner:
        verdict = runner.hear("verdict")
        assert runner.hear("gone")["done"]
        assert runner.process.wait(60) == 0
        assert runner.left() == []
    assert verdict["outcome"] == "guest-lost"
    assert float(verdict["seconds"]) < boot_s + SLACK_S
    return verdict


def test_floods_are_bounded(ordinary: Account) -> None:
    """A VMM that floods QMP, console and stderr at once is drained in bounded memory and ends in time."""
    verdict = _phase(ordinary, "flood", 4 * BOOT_S)
    assert verdict["reason"] == BOOT_REASON
    said = verdict["said"]
    assert isinstance(said, dict)
    assert min(said.values()) > settings.MIB
    assert int(str(verdict["kept"])) <= settings.CONSOLE_MAX_BYTES + settings.STDERR_MAX_BYTES
    assert int(str(verdict["grown_kib"])) < 20 * 1024


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("mute", BOOT_REASON),
        ("stubborn", BOOT_REASON),
        ("exit", "exited with status 3"),
        ("abort", "exited with status 134"),
        ("hang-up", "the guest agent stopped responding while booting"),
        ("garbage", "the guest violated the channel protocol while booting"),
    ],
)
def test_every_misbehaviour_has_its_verdict(ordinary: Account, mode: str, reason: str) -> None:
    """A VMM that stays silent, ignores signals, exits, hangs up or sends garbage ends in time with its own reason."""
    verdict = _phase(ordinary, mode, BOOT_S if reason == BOOT_REASON else NEVER_S)
    assert reason in str(verdict["reason"])
    assert int(str(verdict["grown_kib"])) < 20 * 1024


def test_an_x32_system_call_kills_the_vmm(each_form: Account) -> None:
    """The seccomp filter kills a VMM that makes an x32 system call."""
    need(host_arch().name == "x86_64", "only x86-64 has a second numbering", installable=False)
    assert f"exited with status {128 + SIGSYS}" in str(_phase(each_form, "abi", NEVER_S)["reason"])


def test_a_memory_hog_is_bounded(each_form: Account) -> None:
    """A control group or the address space limit stops a VMM that allocates memory without end."""
    available = next(
        int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    need(available > 5 << 20, "this machine has less than 5 GiB of free memory", installable=False)
    with Runner(each_form, mode="hog", do="talk") as runner:
        runner.say(json.dumps(""))
        message = runner.hear("findings")
        if "memory" in runner.started["holds"]:
            # The out-of-memory killer ended it, so it reported nothing.
            assert message["text"] == ""
        else:
            assert [finding.err for finding in parse(message["text"])] == [errno.ENOMEM, 0]


# --- the deadline ----------------------------------------------------------------------------------------------------


def test_the_deadline_needs_no_runner(each_form: Account) -> None:
    """A machine that ignores every signal ends at its deadline even if its runner is stopped."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(Runner(each_form, mode="stubborn", do="hold", deadline_s=10))
        runner.say("release")
        pidfds = runner.pidfds(stack)
        runner.process.send_signal(signal.SIGSTOP)
        stack.callback(runner.process.send_signal, signal.SIGCONT)
        assert ended(pidfds, 10 + SLACK_S)
        assert time.monotonic() - began >= 10


def test_the_deadline_holds_before_release(account: Account) -> None:
    """A machine whose deadline passes before its release never runs, and is reaped when its runner continues."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(Runner(account, mode="mute", do="hold", deadline_s=10))
        pidfds = [os.pidfd_open(pid) for pid in (runner.supervisor, runner.inner)]
        for fd in pidfds:
            stack.callback(os.close, fd)
        runner.process.send_signal(signal.SIGSTOP)
        stack.callback(runner.process.send_signal, signal.SIGCONT)
        assert ended(pidfds[:1], 10 + SLACK_S)
        runner.process.send_signal(signal.SIGCONT)
        runner.say("release")
        runner.say("stop")
        assert runner.hear("gone")["done"]
        assert ended(pidfds, 0)
        assert runner.left() == []


# --- the runner's death ----------------------------------------------------------------------------------------------


def test_the_machine_dies_with_its_runner(each_form: Account) -> None:
    """A machine dies with its killed runner, even if it ignores every signal."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(Runner(each_form, mode="stubborn", do="hold"))
        runner.say("release")
        pidfds = runner.pidfds(stack)
        assert not ended(pidfds, 0.2)
        runner.process.kill()
        assert ended(pidfds, SLACK_S)
        assert [line for line in runner.left() if line.startswith("process")] == []


def test_an_unreleased_machine_dies_with_its_runner(each_form: Account) -> None:
    """A runner killed before it releases its machine leaves no process behind."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(Runner(each_form, mode="mute", do="hold"))
        runner.wait_at_the_gate()
        pidfds = [os.pidfd_open(pid) for pid in (runner.supervisor, runner.inner)]
        for fd in pidfds:
            stack.callback(os.close, fd)
        runner.process.kill()
        assert ended(pidfds, SLACK_S)
        assert [line for line in runner.left() if line.startswith("process")] == []


@pytest.mark.parametrize("do", ["die", "die-early"])
def test_a_runner_killed_during_a_start_leaves_no_process(each_form: Account, do: str) -> None:
    """A runner killed at any moment of a start, or just after the release, leaves no process behind."""
    step_us = 100 if do == "die" else 2500
    for turn in sample(range(24), 2):
        order = json.dumps({"binary": str(each_form.hostile("stubborn")), "do": do, "after_us": turn * step_us})
        argv = [*each_form.words, sys.executable, "-B", str(each_form.folder / "jail_driver.py"), order]
        died = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env=each_form.env, check=False)
        assert died.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}, died.stderr.decode()
    marks = {json.loads(path.read_bytes())["instance"] for path in each_form.state.glob("*/owner.json")}
    assert marks
    deadline = time.monotonic() + SLACK_S
    while (alive := [pid for mark in marks for pid in marked(mark)]) and time.monotonic() < deadline:
        select.select([], [], [], 0.01)  # they are not our children: no event reports their exit
    assert alive == []


def test_the_machine_dies_with_runner_and_supervisor(each_form: Account) -> None:
    """Killing the runner and the supervisor together leaves no process behind, at any moment after the release."""
    for turn in sample(range(24), 2):
        with Runner(each_form, mode="stubborn", do="hold") as runner:
            runner.say("release")
            moment = time.monotonic() + turn * 0.0002
            while time.monotonic() < moment:
                pass
            os.kill(runner.supervisor, signal.SIGKILL)
            runner.process.kill()
            deadline = time.monotonic() + SLACK_S
            while left := [line for line in runner.left() if line.startswith("process")]:
                assert time.monotonic() < deadline, left
                select.select([], [], [], 0.01)  # they are not our children: no event reports their exit


def test_a_machine_outlives_the_thread_that_started_it(ordinary: Account) -> None:
    """A machine outlives the thread that started it, and dies with the process."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(Runner(ordinary, mode="mute", do="thread"))
        runner.hear("thread-ended")
        pidfds = runner.pidfds(stack)
        assert not ended(pidfds[:1], 0.5)
        runner.process.kill()
        assert ended(pidfds, SLACK_S)
