"""The classifier: each kind of end has its outcome, fault, exit code and reason."""

import errno
import itertools
import re
from typing import Any, NamedTuple, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.errors import Flag
from x07_sandbox.host.waiting import BY_KILL
from x07_sandbox.options import keyword
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.denials import Outcome
from x07_sandbox.policy.features import WORDS, Isolation, vm_features
from x07_sandbox.policy.observed import more_tasks, too_much_output
from x07_sandbox.policy.outcomes import (
    OUTCOMES,
    Evidence,
    Stage,
    build_verdict,
    classify,
    exit_code,
    limit_set_by,
    signal_name,
    with_denied_tasks,
)

PANIC = "[    1.0] Kernel panic - not syncing: sysrq triggered crash\nCPU: 0"
INIT_DIED = "[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009"
SIGKILLED = 9


def run(**facts: Any) -> Evidence:  # noqa: ANN401 - the fields of Evidence
    """Evidence about a program that was started."""
    return Evidence(**{"stage": Stage.RUN, **facts})


class Case(NamedTuple):
    """Evidence, and what follows from it. reason: a part of it. code, signal: the program's own."""

    evidence: Evidence
    outcome: str
    fault: str
    reason: str
    code: int | None = None
    signal: int | None = None


CASES = [
    Case(run(wait_status=0), "ok", "none", "status 0", code=0),
    Case(run(wait_status=3 << 8), "failed", "program", "status 3", code=3),
    Case(run(wait_status=137 << 8, stage=Stage.COLLECT), "failed", "program", "status 137", code=137),
    Case(run(wait_status=11), "signalled", "program", "killed by SIGSEGV", signal=11),
    Case(run(wait_status=6 | 0x80), "signalled", "program", "SIGABRT (core dumped)", signal=6),
    Case(run(wait_status=9), "signalled", "program", "SIGKILL", signal=9),
    Case(run(wait_status=35), "signalled", "program", "SIGRTMIN+1", signal=35),
    Case(run(wait_status=9, oom_kills=1), "oom", "policy", "limits.mem_bytes", signal=9),
    Case(run(wait_status=9, cpu_exceeded=True), "cpu-limit", "policy", "limits.cpu_ms", signal=9),
    Case(run(deadline_passed=True), "timeout", "policy", "reached its time limit"),
    Case(run(deadline_passed=True, stopped=True), "timeout", "policy", "stopped by a signal and then reached"),
    Case(
        run(output_overflow="stdout", output_max_bytes=1 << 26),
        "output-limit",
        "policy",
        "the output limit of 64 MiB for stdout (--max-output-bytes)",
    ),
    Case(run(output_overflow="stderr", output_max_bytes=9), "output-limit", "policy", "9 bytes for stderr"),
    Case(run(cancelled_by=2), "cancelled", "none", "by SIGINT", signal=2),
    Case(run(cancelled_by=BY_KILL, instance_status=-9), "cancelled", "none", "by x07 kill while"),
    Case(run(cancelled_by=0), "cancelled", "none", "cancelled while"),
    Case(
        Evidence(stage=Stage.SETUP, setup_failure="mount: 5"), "refused", "host", "could not prepare the program: mount"
    ),
    *(
        Case(Evidence(stage=Stage.SETUP, setup_failure="exec: x", exec_errno=number), "failed", fault, why, code=code)
        for number, fault, why, code in (
            (errno.ENOEXEC, "program", "not be executed: Exec format error", 126),
            (errno.EACCES, "program", "not be executed: Permission denied", 126),
            (errno.ENOENT, "policy", "interpreter or loader", 127),  # which the image lacks
        )
    ),
    # Outcomes of the sandbox itself, then outcomes of a program that ran.
    Case(Evidence(stage=Stage.SETUP, setup_failure="exec: x", exec_errno=1), "refused", "host", "exec: x"),
    Case(run(setup_failure="exec: x", exec_errno=8), "guest-lost", "program", "exec: x"),
    Case(run(setup_failure="pack: 28"), "guest-lost", "program", "failed while running the program: pack"),
    Case(run(console_tail=PANIC, instance_status=0), "guest-lost", "program", "kernel panicked"),
    Case(run(console_tail=INIT_DIED, instance_status=0), "guest-lost", "program", "agent died"),
    Case(run(channel_error="bad frame: type 77"), "guest-lost", "program", "violated the channel protocol"),
    Case(run(instance_status=0), "guest-lost", "program", "powered off"),
    Case(run(instance_status=-9), "guest-lost", "host", "monitor was killed by SIGKILL"),
    Case(run(instance_status=1), "guest-lost", "host", "monitor exited with status 1"),
    Case(run(instance_status=152), "guest-lost", "host", "of this shell (ulimit -H -t) while"),
    Case(
        Evidence(stage=Stage.BOOT, instance_status=1, console_tail="qemu:\nno memory\n"),
        "guest-lost",
        "host",
        "while the guest was booting: qemu: no memory",
    ),
    Case(run(), "guest-lost", "program", "stopped responding"),
    Case(run(wait_status=0x137F), "guest-lost", "program", "invalid wait status"),
    Case(
        run(stage=Stage.COLLECT, wait_status=0, deadline_passed=True), "guest-lost", "program", "reached its deadline"
    ),
    Case(Evidence(stage=Stage.BOOT, boot_timeout=True), "guest-lost", "host", "did not boot in time"),
    Case(Evidence(stage=Stage.BOOT, instance_status=0), "guest-lost", "host", "exited without an error while"),
    Case(Evidence(stage=Stage.BOOT, console_tail=PANIC, boot_timeout=True), "guest-lost", "host", "panicked"),
    Case(Evidence(stage=Stage.START, instance_status=1), "backend-error", "host", "exited with status 1"),
    Case(Evidence(stage=Stage.SETUP, deadline_passed=True), "guest-lost", "host", "deadline while preparing"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.outcome}-{case.reason[:12]}")
def test_each_end_has_its_outcome(case: Case) -> None:
    """Outcome, fault, reason, exit code and signal follow from the evidence."""
    found = classify(case.evidence)
    assert (found.outcome, found.fault, found.exit_code, found.signal) == (*case[1:3], case.code, case.signal)
    assert case.reason in found.reason
    assert "\n" not in found.reason
    assert not found.reason.endswith(".")


# each of these facts alone gives its outcome; together the earlier one wins
RANKED: list[tuple[dict[str, object], Outcome]] = [
    ({"cancelled_by": 15}, "cancelled"),
    ({"output_overflow": "stdout"}, "output-limit"),
    ({"deadline_passed": True}, "timeout"),
    ({"channel_error": "bad frame"}, "guest-lost"),
    ({"cpu_exceeded": True}, "cpu-limit"),
    ({"oom_kills": 1}, "oom"),
    ({}, "signalled"),
]


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=len(RANKED) - 1)))
def test_the_highest_ranked_cause_is_reported(chosen: tuple[bool, ...]) -> None:
    """The highest-ranked of several causes is reported."""
    facts: dict[str, object] = {"wait_status": SIGKILLED}
    expected = "signalled"
    for (fact, outcome), taken in reversed(list(zip(RANKED, chosen, strict=False))):
        if taken:
            facts |= fact
            expected = outcome
    assert classify(run(**facts)).outcome == expected


def test_a_gate_that_does_not_answer_is_lost_unless_the_time_was_up() -> None:
    """A lost gate is the cause of a run's end, except if the time limit was reached before."""
    assert classify(run(wait_status=SIGKILLED, gate_lost=True)).outcome == "gate-lost"
    assert classify(run(wait_status=SIGKILLED, gate_lost=True, deadline_passed=True)).outcome == "timeout"


def test_a_refusal_comes_before_everything_but_cancelling() -> None:
    """A failed set-up is `refused` whatever else happened, unless it was cancelled."""
    facts: dict[str, Any] = {"stage": Stage.SETUP, "setup_failure": "x", "deadline_passed": True, "instance_status": 1}
    assert classify(Evidence(**facts)).outcome == "refused"
    assert classify(Evidence(**facts, cancelled_by=2)).outcome == "cancelled"


@pytest.mark.parametrize("number", [*range(1, 17), *range(24, 28), *range(29, 32), 34, 64])
def test_every_deadly_signal_is_reported_as_itself(number: int) -> None:
    """A program killed by a signal is reported with exactly that signal."""
    for status in (number, number | 0x80):
        found = classify(run(wait_status=status))
        assert (found.outcome, found.signal, found.exit_code) == ("signalled", number, None)
        assert found.x07_exit_code == 128 + number
        assert signal_name(number) in found.reason


@given(st.integers(0, 255))
def test_an_exit_code_is_never_taken_for_a_limit(code: int) -> None:
    """An exit code such as 124 or 137 is never mistaken for a limit."""
    found = classify(run(wait_status=code << 8))
    assert found.outcome == ("failed" if code else "ok")
    assert found.x07_exit_code == code


@pytest.mark.parametrize("status", [0, 1 << 8, 15])
def test_a_killed_child_is_a_warning(status: int) -> None:
    """A child killed for memory is a warning if the program survives."""
    found = classify(run(wait_status=status, oom_kills=2))
    assert found.outcome in {"ok", "failed", "signalled"}
    assert found.warnings == ("2 processes were killed at the memory limit",)
    shown = classify(run(wait_status=status, oom_kills=1), limits=default_policy().limits)
    assert shown.warnings == ("1 process was killed at the memory limit of 512 MiB",)


def test_a_reason_names_the_flag_that_set_the_limit() -> None:
    """If a flag set the limit, the reason names the flag, or the keyword for callers from Python."""
    found = classify(run(deadline_passed=True), limits=default_policy().limits)
    limited = limit_set_by(found, option=Flag("--timeout"))
    assert (found.limited_by, limited.code) == ("limits.wall_ms", found.code)
    assert limited.reason == "the program reached its time limit of 60 s (--timeout)"
    assert limited.reason_for(keyword) == "the program reached its time limit of 60 s (timeout_s)"
    exited = classify(run(wait_status=0))
    assert limit_set_by(exited, option=Flag("--timeout")) == exited


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (
            run(wait_status=9, cpu_exceeded=True),
            "the program reached its CPU time limit (limits.cpu_ms); it was denied",
        ),
        (run(deadline_passed=True), "the program reached its time limit (limits.wall_ms); it was denied"),
        (run(wait_status=1 << 8), "the program exited with status 1; it was denied"),
        (run(wait_status=6), "the program was killed by SIGABRT; it was denied"),
    ],
)
def test_a_reason_says_that_processes_were_denied(evidence: Evidence, reason: str) -> None:
    """The reason of a failed program that was denied processes says so, also if it reached its CPU time limit."""
    limited = default_policy()
    found = with_denied_tasks(classify(evidence), [too_much_output("stdout", None), more_tasks(limited, None, 3)])
    assert found.reason == f"{reason} a new process or thread (limits.procs)"
    assert with_denied_tasks(classify(run(wait_status=0)), [more_tasks(limited, None, 3)]).reason.endswith("status 0")


def test_a_timeout_under_emulation_mentions_the_slow_cpu() -> None:
    """The reason of a timeout in an emulated VM mentions the slower CPU."""
    limits = default_policy().limits
    found = classify(run(deadline_passed=True), features=vm_features("vm-emulated"), limits=limits)
    assert found.reason == (
        "the program reached its time limit of 60 s (limits.wall_ms); "
        "the VM is emulated, so CPU work takes many times longer than on hardware"
    )
    assert "emulated" not in classify(run(deadline_passed=True), limits=limits).reason
    assert (
        "emulated" not in classify(run(deadline_passed=True, stopped=True), features=vm_features("vm-emulated")).reason
    )


@given(st.text(max_size=400))
def test_text_from_the_guest_stays_short_and_plain(text: str) -> None:
    """Reasons with guest text are short printable ASCII."""
    for evidence in (
        run(channel_error=text),
        run(console_tail=f"Kernel panic - not syncing: {text}"),
        run(setup_failure=text),
    ):
        reason = classify(evidence).reason
        assert re.fullmatch(r"[ -~]{1,300}", reason)


EVIDENCE = st.builds(
    Evidence,
    stage=st.sampled_from(Stage),
    wait_status=st.none() | st.integers(-1, 0x1FFFF),
    deadline_passed=st.booleans(),
    stopped=st.booleans(),
    cpu_exceeded=st.booleans(),
    oom_kills=st.integers(0, 3),
    output_overflow=st.sampled_from([None, "stdout", "stderr"]),
    channel_error=st.none() | st.text(max_size=10),
    instance_status=st.none() | st.integers(-64, 255),
    console_tail=st.sampled_from(["", PANIC, INIT_DIED]),
    cancelled_by=st.none() | st.integers(0, 64),
    setup_failure=st.none() | st.text(max_size=10),
    boot_timeout=st.booleans(),
)


@given(EVIDENCE, st.sampled_from(sorted(WORDS)))
def test_any_evidence_has_one_verdict_with_a_code(evidence: Evidence, isolation: Isolation) -> None:
    """Any evidence gives one outcome, one reason and one exit code."""
    found = classify(evidence, features=vm_features(isolation))
    for each in (found, build_verdict(found)):
        assert each.reason
        assert each.outcome in OUTCOMES
        assert 0 <= each.x07_exit_code <= 255
    if evidence.channel_error is not None or evidence.wait_status is None:
        assert found.outcome not in {"ok", "failed", "signalled", "oom", "cpu-limit"}


CODES = {
    "ok": 7,
    "failed": 7,
    "signalled": 139,
    "timeout": 124,
    "cpu-limit": 124,
    "oom": 137,
    "output-limit": 153,
    "refused": 125,
    "guest-lost": 125,
    "gate-lost": 125,
    "backend-error": 125,
    "internal-error": 125,
    "build-failed": 126,
    "cancelled": 143,
    "usage-error": 2,
}


def test_the_table_of_exit_codes_is_the_published_one() -> None:
    """Each outcome has its documented exit code."""
    assert {str(outcome): exit_code(outcome, program_exit=7, signal=11) for outcome in OUTCOMES} == CODES
    assert list(OUTCOMES) == list(get_args(Outcome))


@pytest.mark.parametrize(("signal", "code"), [(2, 130), (15, 143), (1, 143), (None, 143)])
def test_a_cancelled_run_exits_like_a_cancelled_program(signal: int | None, code: int) -> None:
    """A cancelled run exits with 130 after Ctrl-C, otherwise with 143."""
    assert exit_code("cancelled", program_exit=None, signal=signal) == code


@pytest.mark.parametrize("outcome", ["ok", "failed", "signalled"])
def test_an_outcome_of_the_program_needs_the_programs_end(outcome: Outcome) -> None:
    """No exit code is invented for a program whose end is unknown."""
    with pytest.raises(ValueError, match=f"outcome {outcome} without"):
        exit_code(outcome, program_exit=None, signal=None)


def test_a_build_that_ends_badly_is_a_failed_build() -> None:
    """A failing compiler is `build-failed`; a lost or cancelled build keeps its outcome."""
    found = build_verdict(classify(run(wait_status=1 << 8)))
    assert found.outcome == "build-failed"
    assert found.fault == "program"
    assert found.reason == "the compiler exited with status 1"
    assert build_verdict(classify(run(wait_status=0))).reason == "the compiler exited with status 0"
    for kept in (run(cancelled_by=2), run(instance_status=-9)):
        found = build_verdict(classify(kept))
        assert " while the guest was building the program" in found.reason
        assert replace(found, params={}) == replace(classify(kept), params={})
    found = build_verdict(classify(run(cancelled_by=2, stage=Stage.COLLECT)))
    assert found.reason.endswith(" while the guest was returning the built program")


@pytest.mark.parametrize("status", [-9, 137])
def test_a_killed_vmm_gives_advice_about_memory(status: int) -> None:
    """A VMM killed by the host's kernel is `guest-lost`, with advice about memory."""
    found = classify(run(instance_status=status))
    assert (found.outcome, found.fault) == ("guest-lost", "host")
    assert "ran out of memory" in found.reason
    assert "X07_VM_MAX_RUNNING=1" in found.reason
    assert "memory" not in classify(run(instance_status=1)).reason
