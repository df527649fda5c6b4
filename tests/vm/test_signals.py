"""Signals that end or stop a program, and what the result says."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.conftest import sample
from x07_sandbox.host import settings
from x07_sandbox.policy.outcomes import signal_name

if TYPE_CHECKING:
    from tests.vm.conftest import Sandbox

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

# Linux's numbers, written out: the guest is Linux whatever runs the tests.
ENDING = (*range(1, 17), *range(24, 28), *range(29, 32))
REAL_TIME = (34, 64)


@pytest.mark.parametrize("number", sample([*ENDING, *REAL_TIME], 3))
def test_the_result_names_the_signal_that_ended_the_program(sandbox: Sandbox, number: int) -> None:
    """A program ended by a signal is `signalled` with that signal, and the exit code is 128 plus its number."""
    ran = sandbox.behave("kill", str(number))
    assert ran.outcome == "signalled", ran.reason
    assert ran.result.signal == number
    assert ran.result.exit_code is None
    assert ran.result.x07_exit_code == 128 + number
    assert ran.result.fault == "program"
    assert signal_name(number) in ran.reason
    assert ran.stdout == b""


def test_abort_is_sigabrt(sandbox: Sandbox) -> None:
    """abort() ends a program with SIGABRT and without a core dump."""
    ran = sandbox.behave("abort")
    assert (ran.outcome, ran.result.signal, ran.result.x07_exit_code) == ("signalled", signal.SIGABRT, 134)
    assert "core" not in ran.reason


def test_signals_that_are_ignored_by_default_leave_the_program_running(sandbox: Sandbox) -> None:
    """SIGCHLD, SIGCONT, SIGURG and SIGWINCH do not end a program."""
    ran = sandbox.behave("kill", "17", "18", "23", "28")
    assert (ran.outcome, ran.lines()) == ("ok", ["alive"])


def test_a_terminals_stop_signals_leave_the_program_running(sandbox: Sandbox) -> None:
    """SIGTSTP, SIGTTIN and SIGTTOU do not stop a program, since its process group is orphaned (POSIX)."""
    ran = sandbox.behave("kill", "20", "21", "22")
    assert (ran.outcome, ran.lines()) == ("ok", ["alive"])


def test_a_program_that_stops_itself_times_out_as_stopped(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stops itself ends as `timeout`, and the reason says that it was stopped."""
    monkeypatch.setattr(settings, "STOPPED_S", 30.0)  # the test checks the guest's report
    ran = sandbox.behave("kill", "19", policy={"limits.wall_ms": 4000})
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("timeout", 124, "policy")
    assert "stopped by a signal" in ran.reason
    assert 4000 <= ran.program_ms < 4000 + 30_000
    assert ran.stdout == b""
