"""Promises of the classifier: each kind of end has its own outcome, fault, code and reason."""

import errno
import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.plan.features import WORDS, Isolation, vm_features
from x07_sandbox.plan.outcomes import (
    OUTCOMES,
    Evidence,
    Outcome,
    Stage,
    Verdict,
    build_verdict,
    classify,
    exit_code,
    name_flags,
    signal_name,
    verdict,
)
from x07_sandbox.policy.default import default_policy

PANIC = "[    1.0] Kernel panic - not syncing: sysrq triggered crash\nCPU: 0"
INIT_DIED = "[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009"
SIGKILLED = 9


def run(**facts: Any) -> Evidence:  # noqa: ANN401 - the fields of Evidence
    """Evidence about a program that had been started."""
    return Evidence(**{"stage": Stage.RUN, **facts})


# outcome, fault, a part of the reason, the program's code and signal
CASES: list[tuple[Evidence, str, str, str, int | None, int | None]] = [
    (run(wait_status=0), "ok", "none", "status 0", 0, None),
    (run(wait_status=3 << 8), "failed", "program", "status 3", 3, None),
    (run(wait_status=137 << 8, stage=Stage.COLLECT), "failed", "program", "status 137", 137, None),
    (run(wait_status=11), "signalled", "program", "killed by SIGSEGV", None, 11),
    (run(wait_status=6 | 0x80), "signalled", "program", "SIGABRT (core dumped)", None, 6),
    (run(wait_status=9), "signalled", "program", "SIGKILL", None, 9),
    (run(wait_status=35), "signalled", "program", "SIGRTMIN+1", None, 35),
    (run(wait_status=9, oom_kills=1), "oom", "policy", "limits.mem_bytes", None, 9),
    (run(wait_status=9, cpu_exceeded=True), "cpu-limit", "policy", "limits.cpu_ms", None, 9),
    (run(deadline_passed=True), "timeout", "policy", "reached its time limit", None, None),
    (run(deadline_passed=True, stopped=True), "timeout", "policy", "stopped by a signal and then reached", None, None),
    (run(output_overflow="stdout"), "output-limit", "policy", "output limit of stdout", None, None),
    (run(output_overflow="stderr"), "output-limit", "policy", "output limit of stderr", None, None),
    (run(cancelled_by=2), "cancelled", "none", "by SIGINT", None, 2),
    (run(cancelled_by=0), "cancelled", "none", "cancelled while", None, None),
    (
        Evidence(stage=Stage.SETUP, setup_failure="mount: 5"),
        "refused",
        "host",
        "could not prepare the program: mount",
        None,
        None,
    ),
    *(
        (
            Evidence(stage=Stage.SETUP, setup_failure="exec: x", exec_errno=number),
            "failed",
            "program",
            why,
            code,
            None,
        )
        for number, why, code in (
            (errno.ENOEXEC, "not be executed: Exec format error", 126),
            (errno.EACCES, "not be executed: Permission denied", 126),
            (errno.ENOENT, "interpreter or loader", 127),
        )
    ),
    # What says nothing of the program, and what is told once it runs.
    (Evidence(stage=Stage.SETUP, setup_failure="exec: x", exec_errno=1), "refused", "host", "exec: x", None, None),
    (run(setup_failure="exec: x", exec_errno=8), "guest-lost", "program", "exec: x", None, None),
    (run(setup_failure="pack: 28"), "guest-lost", "program", "failed while running the program: pack", None, None),
    (run(console_tail=PANIC, instance_status=0), "guest-lost", "program", "kernel panicked", None, None),
    (run(console_tail=INIT_DIED, instance_status=0), "guest-lost", "program", "agent died", None, None),
    (run(channel_error="bad frame: type 77"), "guest-lost", "program", "violated the channel protocol", None, None),
    (run(instance_status=0), "guest-lost", "program", "powered off", None, None),
    (run(instance_status=-9), "guest-lost", "host", "monitor was killed by SIGKILL", None, None),
    (run(instance_status=1), "guest-lost", "host", "monitor exited with status 1", None, None),
    (run(instance_status=152), "guest-lost", "host", "of this shell (ulimit -H -t) while", None, None),
    (
        Evidence(stage=Stage.BOOT, instance_status=1, console_tail="qemu:\nno memory\n"),
        "guest-lost",
        "host",
        "while the guest was booting: qemu: no memory",
        None,
        None,
    ),
    (run(), "guest-lost", "program", "stopped responding", None, None),
    (run(wait_status=0x137F), "guest-lost", "program", "invalid wait status", None, None),
    (
        run(stage=Stage.COLLECT, wait_status=0, deadline_passed=True),
        "guest-lost",
        "program",
        "reached its deadline",
        None,
        None,
    ),
    (Evidence(stage=Stage.BOOT, boot_timeout=True), "guest-lost", "host", "did not boot in time", None, None),
    (Evidence(stage=Stage.BOOT, instance_status=0), "guest-lost", "host", "exited without an error while", None, None),
    (Evidence(stage=Stage.BOOT, console_tail=PANIC, boot_timeout=True), "guest-lost", "host", "panicked", None, None),
    (Evidence(stage=Stage.START, instance_status=1), "backend-error", "host", "exited with status 1", None, None),
    (Evidence(stage=Stage.SETUP, deadline_passed=True), "guest-lost", "host", "deadline while preparing", None, None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[3][:12]}")
def test_each_end_has_its_outcome(case: tuple[Evidence, str, str, str, int | None, int | None]) -> None:
    """Outcome, fault, reason, code and signal follow from the evidence."""
    evidence, outcome, fault, reason, code, signal = case
    found = classify(evidence)
    assert (found.outcome, found.fault, found.exit_code, found.signal) == (outcome, fault, code, signal)
    assert reason in found.reason
    assert "\n" not in found.reason
    assert not found.reason.endswith(".")


def test_reasons_tell_the_cases_apart() -> None:
    """No two kinds of end share a reason."""
    reasons = [classify(case[0]).reason for case in CASES]
    assert len(set(reasons)) == len(reasons)


# each of these facts alone gives its outcome; together the earlier one wins
RANKED: list[tuple[dict[str, object], Outcome]] = [
    ({"cancelled_by": 15}, Outcome.CANCELLED),
    ({"output_overflow": "stdout"}, Outcome.OUTPUT_LIMIT),
    ({"deadline_passed": True}, Outcome.TIMEOUT),
    ({"channel_error": "bad frame"}, Outcome.GUEST_LOST),
    ({"cpu_exceeded": True}, Outcome.CPU_LIMIT),
    ({"oom_kills": 1}, Outcome.OOM),
    ({}, Outcome.SIGNALLED),
]


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=len(RANKED) - 1)))
def test_of_several_causes_the_first_in_rank_is_told(chosen: tuple[bool, ...]) -> None:
    """Every combination of causes has one outcome: cancelled, output, time, lost guest, CPU, memory, signal."""
    facts: dict[str, object] = {"wait_status": SIGKILLED}
    expected = Outcome.SIGNALLED
    for (fact, outcome), taken in reversed(list(zip(RANKED, chosen, strict=False))):
        if taken:
            facts |= fact
            expected = outcome
    assert classify(run(**facts)).outcome is expected


def test_a_refusal_comes_before_everything_but_cancelling() -> None:
    """What could not be set up was not run, whatever else is seen."""
    facts: dict[str, Any] = {"stage": Stage.SETUP, "setup_failure": "x", "deadline_passed": True, "instance_status": 1}
    assert classify(Evidence(**facts)).outcome is Outcome.REFUSED
    assert classify(Evidence(**facts, cancelled_by=2)).outcome is Outcome.CANCELLED


@pytest.mark.parametrize("number", [*range(1, 17), *range(24, 28), *range(29, 32), 34, 64])
def test_every_deadly_signal_is_reported_as_itself(number: int) -> None:
    """A program that dies of a signal gets exactly that signal, with or without a core."""
    for status in (number, number | 0x80):
        found = classify(run(wait_status=status))
        assert (found.outcome, found.signal, found.exit_code) == (Outcome.SIGNALLED, number, None)
        assert found.x07_exit_code == 128 + number
        assert signal_name(number) in found.reason


@given(st.integers(0, 255))
def test_an_exit_status_is_never_taken_for_more(code: int) -> None:
    """A program that exits with 124, 137, 139 or 153 has failed, and no limit was at work."""
    found = classify(run(wait_status=code << 8))
    assert found.outcome is (Outcome.FAILED if code else Outcome.OK)
    assert found.x07_exit_code == code


@pytest.mark.parametrize("status", [0, 1 << 8, 15])
def test_who_survives_the_death_of_a_child_is_not_out_of_memory(status: int) -> None:
    """A child killed for memory is a warning, as long as the program itself did not die of SIGKILL."""
    found = classify(run(wait_status=status, oom_kills=2))
    assert found.outcome in {Outcome.OK, Outcome.FAILED, Outcome.SIGNALLED}
    assert found.warnings == ("2 processes were killed at the memory limit (limits.mem_bytes)",)


def test_a_reason_names_the_flag_that_set_the_limit() -> None:
    """Where a flag held the program tighter than the policy, its verdict is the same and names the flag."""
    found = classify(run(deadline_passed=True), limits=default_policy().limits)
    limited = name_flags(found, {"limits.wall_ms": "--timeout"})
    assert limited == replace(found, reason="the program reached its time limit of 60 s (--timeout)")
    assert name_flags(found, {"limits.cpu_ms": "--timeout"}) == found


def test_a_timeout_under_emulation_says_that_cpu_work_is_slower() -> None:
    """The reason of a timeout names the deadline, and the slower CPU where that may be the cause."""
    limits = default_policy().limits
    found = classify(run(deadline_passed=True), features=vm_features("vm-emulated"), limits=limits)
    assert found.reason == (
        "the program reached its time limit of 60 s (limits.wall_ms); "
        "the machine is emulated, so CPU work takes many times longer than on hardware"
    )
    assert "emulated" not in classify(run(deadline_passed=True), limits=limits).reason
    assert (
        "emulated" not in classify(run(deadline_passed=True, stopped=True), features=vm_features("vm-emulated")).reason
    )


@given(st.text(max_size=400))
def test_text_from_the_guest_stays_short_and_plain(text: str) -> None:
    """Nothing that a guest says can make a reason long or disturb a terminal."""
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
    """Whatever is known, there is one outcome, one reason and one exit code, for a run and for a build."""
    found = classify(evidence, features=vm_features(isolation))
    for each in (found, build_verdict(found)):
        assert each.reason
        assert each.outcome in OUTCOMES
        assert 0 <= each.x07_exit_code <= 255
    if evidence.channel_error is not None or evidence.wait_status is None:
        assert found.outcome not in {Outcome.OK, Outcome.FAILED, Outcome.SIGNALLED, Outcome.OOM, Outcome.CPU_LIMIT}


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
    """Each outcome has the exit code that the documentation promises."""
    assert {str(outcome): exit_code(outcome, program_exit=7, signal=11) for outcome in Outcome} == CODES
    assert set(OUTCOMES) == set(Outcome)


@pytest.mark.parametrize(("signal", "code"), [(2, 130), (15, 143), (1, 143), (None, 143)])
def test_a_cancelled_run_exits_like_a_cancelled_program(signal: int | None, code: int) -> None:
    """130 after Ctrl-C, 143 after any other request."""
    assert exit_code(Outcome.CANCELLED, program_exit=None, signal=signal) == code


@pytest.mark.parametrize("outcome", [Outcome.OK, Outcome.FAILED, Outcome.SIGNALLED])
def test_an_outcome_of_the_program_needs_the_programs_end(outcome: Outcome) -> None:
    """No code is invented for a program whose end is not known."""
    with pytest.raises(ValueError, match=f"outcome {outcome} without"):
        exit_code(outcome, program_exit=None, signal=None)


def test_a_build_that_ends_badly_is_a_failed_build() -> None:
    """Whatever a compiler did is build-failed, with its own reason; one that was lost or cancelled is told so."""
    found = build_verdict(classify(run(wait_status=1 << 8)))
    assert found.outcome is Outcome.BUILD_FAILED
    assert found.fault == "program"
    assert found.reason == "the build failed: the compiler exited with status 1"
    assert build_verdict(classify(run(wait_status=0))) == classify(run(wait_status=0))
    for kept in (run(cancelled_by=2), run(instance_status=-9)):
        found = build_verdict(classify(kept))
        assert " while the guest was building the program" in found.reason
        assert replace(found, reason="") == replace(classify(kept), reason="")
    found = build_verdict(classify(run(cancelled_by=2, stage=Stage.COLLECT)))
    assert found.reason.endswith(" while the guest was returning the built program")


def test_a_verdict_without_a_guest_takes_its_fault_from_the_table() -> None:
    """Refusals and errors before a guest exists name a fault too."""
    assert verdict(Outcome.BACKEND_ERROR, "no VMM") == Verdict(
        outcome=Outcome.BACKEND_ERROR, fault="host", reason="no VMM"
    )
    assert verdict(Outcome.REFUSED, "no image", fault="host").fault == "host"


@pytest.mark.parametrize("status", [-9, 137])
def test_a_killed_machine_names_memory_and_a_way_out(status: int) -> None:
    """A machine that the kernel killed is guest-lost, the host's fault, with what to do if memory ran out."""
    found = classify(run(instance_status=status))
    assert (found.outcome, found.fault) == (Outcome.GUEST_LOST, "host")
    assert "ran out of memory" in found.reason
    assert "X07_VM_MAX_RUNNING=1" in found.reason
    assert "memory" not in classify(run(instance_status=1)).reason
