"""The one table of outcomes, and the one classifier: from the facts about a finished phase to a word and a sentence.

A fact counts only if it is ours or the kernel's own counter: a program may choose an exit status of 137.

Precedence: cancelled, refused, output-limit, timeout, guest-lost, cpu-limit, oom, signalled, failed, ok. The first
four are our own doing, so whatever the guest said afterwards follows from it.
"""

from __future__ import annotations

import errno
import os
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.host import settings
from x07_sandbox.host.os_errors import out_of_cpu_time
from x07_sandbox.plan.features import vm_features

if TYPE_CHECKING:
    from collections.abc import Mapping

    from x07_sandbox.plan.controls import RunLimits
    from x07_sandbox.plan.features import Features
    from x07_sandbox.policy.model import Limits

Fault = Literal["program", "policy", "host", "none"]

REFUSED_EXIT: Final = 125
SIGNAL_BASE: Final = 128
SIGINT: Final = 2
_SIGKILL: Final = 9
# What a shell's status says of a program that the kernel would not execute.
_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127
# Only what lies with the program itself: its format, its interpreter, its mode, its arguments.
_OF_THE_PROGRAM: Final = frozenset(
    {errno.ENOEXEC, errno.ENOENT, errno.EACCES, errno.ELIBBAD, errno.EINVAL, errno.E2BIG, errno.ELOOP, errno.ENOTDIR}
)
_LAST_SIGNAL: Final = 64
_SHOWN_CHARS: Final = 160  # of a text that came from the guest
# Linux numbers, since the guest is Linux whatever the host is.
# fmt: off
_SIGNALS: Final = (
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGUSR1", "SIGSEGV",
    "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGSTKFLT", "SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN",
    "SIGTTOU", "SIGURG", "SIGXCPU", "SIGXFSZ", "SIGVTALRM", "SIGPROF", "SIGWINCH", "SIGIO", "SIGPWR", "SIGSYS",
)
# fmt: on
_OUT_OF_MEMORY: Final = "; if this host ran out of memory, run fewer programs at once (X07_VM_MAX_RUNNING=1)"
_PANIC: Final = re.compile(r"Kernel panic - not syncing: ([^\n]*)")
_POLICY_FIELD: Final = re.compile(r"\(limits\.\w+\)")
_INIT_DIED: Final = "Attempted to kill init"


class Outcome(StrEnum):
    """How a run ended, in one word."""

    OK = "ok"
    FAILED = "failed"
    SIGNALLED = "signalled"
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpu-limit"
    OOM = "oom"
    OUTPUT_LIMIT = "output-limit"
    REFUSED = "refused"
    GUEST_LOST = "guest-lost"
    GATE_LOST = "gate-lost"
    BACKEND_ERROR = "backend-error"
    INTERNAL_ERROR = "internal-error"
    BUILD_FAILED = "build-failed"
    CANCELLED = "cancelled"
    USAGE_ERROR = "usage-error"


class ExitRule(StrEnum):
    """Where an exit code comes from when it is no fixed number."""

    PROGRAM = "the program's own"
    SIGNAL = "128 + the program's signal"
    CANCEL = "130 for SIGINT, else 143"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One outcome. fault: the usual one; a verdict may know better."""

    fault: Fault
    exit: int | ExitRule
    doc: str


OUTCOMES: Final[dict[Outcome, Row]] = {
    Outcome.OK: Row(fault="none", exit=ExitRule.PROGRAM, doc="The program ended with status 0."),
    Outcome.FAILED: Row(
        fault="program",
        exit=ExitRule.PROGRAM,
        doc="It ended with another status, or could not be executed: 126, 127 if something is missing.",
    ),
    Outcome.SIGNALLED: Row(fault="program", exit=ExitRule.SIGNAL, doc="A signal ended the program."),
    Outcome.TIMEOUT: Row(fault="policy", exit=124, doc="It was still running at limits.wall_ms, by our clock."),
    Outcome.CPU_LIMIT: Row(fault="policy", exit=124, doc="It used up limits.cpu_ms, by the kernel's counter."),
    Outcome.OOM: Row(fault="policy", exit=137, doc="It was killed at limits.mem_bytes, by the kernel's counter."),
    Outcome.OUTPUT_LIMIT: Row(fault="policy", exit=153, doc="It wrote more than the output limit."),
    Outcome.REFUSED: Row(fault="policy", exit=REFUSED_EXIT, doc="Nothing was run: a promise could not be kept."),
    Outcome.GUEST_LOST: Row(fault="host", exit=REFUSED_EXIT, doc="The virtual machine or its agent was lost."),
    Outcome.GATE_LOST: Row(fault="host", exit=REFUSED_EXIT, doc="The gate that decides on connections was lost."),
    Outcome.BACKEND_ERROR: Row(fault="host", exit=REFUSED_EXIT, doc="No virtual machine could be started or stopped."),
    Outcome.INTERNAL_ERROR: Row(fault="host", exit=REFUSED_EXIT, doc="A bug in x07-sandbox."),
    Outcome.BUILD_FAILED: Row(fault="program", exit=126, doc="The program could not be built."),
    Outcome.CANCELLED: Row(fault="none", exit=ExitRule.CANCEL, doc="The user or another process ended the run."),
    Outcome.USAGE_ERROR: Row(fault="policy", exit=2, doc="The request itself is wrong."),
}


def exit_code(outcome: Outcome, *, program_exit: int | None, signal: int | None) -> int:
    """The exit code of ``x07 run``. Raises ValueError when what the outcome needs is missing.

    program_exit: the program's status. signal: the program's; for cancelled the one that we got, if any.
    """
    rule = OUTCOMES[outcome].exit
    match rule:
        case ExitRule.PROGRAM:
            if program_exit is None:
                raise ValueError(f"outcome {outcome} without the program's status")
            return program_exit
        case ExitRule.SIGNAL:
            if signal is None:
                raise ValueError(f"outcome {outcome} without a signal")
            return SIGNAL_BASE + signal
        case ExitRule.CANCEL:
            return 130 if signal == SIGINT else 143
        case int():
            return rule


def outcomes_by_exit() -> dict[str, list[Outcome]]:
    """Each exit code or rule in words, and the outcomes that have it, in the order of the table."""
    found: dict[str, list[Outcome]] = {}
    for outcome, row in OUTCOMES.items():
        found.setdefault(str(row.exit), []).append(outcome)
    return found


def describe() -> str:
    """The table as docs/reference/outcomes.md shows it."""
    rows = ["| outcome | exit code of `x07 run` | usual `fault` | what happened |", "|---|---|---|---|"]
    rows += [f"| `{outcome}` | {row.exit} | `{row.fault}` | {row.doc} |" for outcome, row in OUTCOMES.items()]
    return "\n".join(rows) + "\n"


def describe_exits_table() -> str:
    """The exit codes as docs/reference/outcomes.md shows them."""
    rows = ["| exit code | outcomes |", "|---|---|"]
    rows += [f"| {code} | {', '.join(f'`{name}`' for name in names)} |" for code, names in outcomes_by_exit().items()]
    return "\n".join(rows) + "\n"


def describe_exits() -> str:
    """The exit codes as help shows them: one line each."""
    return "".join(f"  {code}: {', '.join(outcomes)}\n" for code, outcomes in outcomes_by_exit().items())


class Stage(StrEnum):
    """How far a job had come."""

    START = "start"  # the instance was being started
    BOOT = "boot"  # until the agent answered
    SETUP = "setup"  # files going in, confinement
    RUN = "run"  # from the program's exec on
    COLLECT = "collect"  # the program has ended, its results are on the way


_STARTED: Final = frozenset({Stage.RUN, Stage.COLLECT})
_DOING: Final = {
    Stage.START: "starting",
    Stage.BOOT: "booting",
    Stage.SETUP: "being prepared",
    Stage.RUN: "running the program",
    Stage.COLLECT: "handing over what the program left",
}
_BUILDING: Final = {  # where it is the compiler that runs
    _DOING[Stage.RUN]: "building the program",
    _DOING[Stage.COLLECT]: "handing over what was built",
}


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a finished phase.

    stage: how far it had come when it ended.
    wait_status: the program's true status as waitpid gives it, from the guest's init; None when it never came.
    deadline_passed: our own deadline for the stage came first.
    stopped: the program's processes were stopped by a signal when the deadline came.
    cpu_exceeded: the cgroup's counter passed limits.cpu_ms.
    cpu_us: the cgroup's counter at the end, in microseconds; None when it never came.
    oom_kills: the cgroup's counter of processes killed for memory.
    output_overflow: the stream that passed its cap: "stdout" or "stderr".
    channel_error: how the guest broke the protocol; an end of the stream alone is no such error.
    instance_status: how the instance's process ended, as subprocess gives it (-N for signal N); None while it runs.
    console_tail: the end of the console; hostile text, looked at only when the guest was lost.
    cancelled_by: the signal that ended the run from outside (0: a request without one).
    setup_failure: what the agent or we could not do for the job.
    exec_errno: the error number with which the guest's kernel refused to execute the program; 0 if it did not.
    boot_timeout: the agent did not answer in time.
    gate_lost: the egress gate ended before the program did.
    """

    stage: Stage
    wait_status: int | None = None
    deadline_passed: bool = False
    stopped: bool = False
    cpu_exceeded: bool = False
    cpu_us: int | None = None
    oom_kills: int = 0
    output_overflow: str | None = None
    channel_error: str | None = None
    instance_status: int | None = None
    console_tail: str = ""
    cancelled_by: int | None = None
    setup_failure: str | None = None
    exec_errno: int = 0
    boot_timeout: bool = False
    gate_lost: bool = False

    @property
    def killed(self) -> bool:
        """Whether the kernel or somebody else ended the instance: that says nothing of the machine itself."""
        status = self.instance_status
        return status in {-_SIGKILL, SIGNAL_BASE + _SIGKILL} or bool(out_of_cpu_time(status))


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a phase ended. exit_code: the program's own status, where it chose one.

    signal: what ended the program; for cancelled the one that we got. reason: one sentence without its full stop.
    """

    outcome: Outcome
    fault: Fault
    reason: str
    exit_code: int | None = None
    signal: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def x07_exit_code(self) -> int:
        """The code with which ``x07 run`` exits."""
        return exit_code(self.outcome, program_exit=self.exit_code, signal=self.signal)


def verdict(outcome: Outcome, reason: str, *, fault: Fault | None = None) -> Verdict:
    """A verdict without a program's end, for what is known before a guest exists; fault as in the table if None."""
    return Verdict(outcome=outcome, fault=fault or OUTCOMES[outcome].fault, reason=reason)


def classify(
    evidence: Evidence, *, features: Features | None = None, limits: Limits | RunLimits | None = None
) -> Verdict:
    """The one verdict on *evidence*. features: the backend's, if they are known. limits: for figures in the reason."""
    features = features or vm_features("vm-hardware")
    if evidence.gate_lost and evidence.cancelled_by is None:
        return verdict(Outcome.GATE_LOST, f"the egress gate ended while the guest was {_DOING[evidence.stage]}")
    ended = _ended_by_us(evidence, emulated=features.emulated, limits=limits)
    if ended := ended or _lost(evidence, features.words.supervisor):
        return ended
    if evidence.wait_status is None:  # _lost has spoken for every such case
        raise AssertionError("a phase that was not lost has a wait status")
    return _ended_by_itself(evidence, evidence.wait_status, limits)


def build_verdict(found: Verdict, wall_ms: int = settings.BUILD_WALL_MS) -> Verdict:
    """The same verdict on a build phase: what a run may be told of a compiler is that the build failed.

    wall_ms: the time that the build could take, for advice.
    """
    own_end = {Outcome.FAILED, Outcome.SIGNALLED, Outcome.TIMEOUT, Outcome.CPU_LIMIT, Outcome.OOM, Outcome.OUTPUT_LIMIT}
    if found.outcome not in own_end:
        reason = found.reason
        for running, building in _BUILDING.items():
            reason = reason.replace(f"while the guest was {running}", f"while the guest was {building}")
        return replace(found, reason=reason)
    reason = found.reason.replace("the program", "the compiler", 1)
    reason = reason.replace("the compiler ended with status", "the compiler exited with status", 1)
    if found.outcome in {Outcome.TIMEOUT, Outcome.CPU_LIMIT} and wall_ms < settings.BUILD_S_MAX * 1000:
        more_s = min(settings.BUILD_S_MAX, 2 * max(1, wall_ms // 1000))
        reason = _POLICY_FIELD.sub(f"(--build-timeout {more_s} gives it more time)", reason)
    reason = _POLICY_FIELD.sub("(fixed for builds)", reason)
    return replace(found, outcome=Outcome.BUILD_FAILED, fault="program", reason=f"the build failed: {reason}")


def name_flags(found: Verdict, flags: Mapping[str, str]) -> Verdict:
    """The same verdict where flags set limits, by the field in whose place they did: the reason names the flag."""
    reason = found.reason
    for field, flag in flags.items():
        reason = reason.replace(f"({field})", f"({flag})")
    return replace(found, reason=reason)


def signal_name(number: int) -> str:
    """Linux's name of a signal: SIGSEGV, SIGRTMIN+1."""
    if 1 <= number <= len(_SIGNALS):
        return _SIGNALS[number - 1]
    return f"SIGRTMIN+{number - 34}" if 34 <= number <= _LAST_SIGNAL else f"signal {number}"  # noqa: PLR2004 - glibc's


def _ended_by_us(evidence: Evidence, *, emulated: bool, limits: Limits | RunLimits | None) -> Verdict | None:
    if evidence.cancelled_by is not None:
        by = f" by {signal_name(evidence.cancelled_by)}" if evidence.cancelled_by else ""
        reason = f"the run was cancelled{by} while the guest was {_DOING[evidence.stage]}"
        cancelled = verdict(Outcome.CANCELLED, reason)
        return replace(cancelled, signal=evidence.cancelled_by or None)
    if evidence.exec_errno in _OF_THE_PROGRAM and evidence.stage not in _STARTED:
        return _not_executed(evidence.exec_errno)
    if evidence.setup_failure is not None and evidence.stage not in _STARTED:
        text = _shown(evidence.setup_failure)
        return verdict(Outcome.REFUSED, f"the guest could not be made ready for the program: {text}", fault="host")
    if evidence.output_overflow is not None:
        reason = f"the program wrote more to {evidence.output_overflow} than the output limit allows"
        return verdict(Outcome.OUTPUT_LIMIT, reason)
    if evidence.deadline_passed and evidence.stage is Stage.RUN:
        return verdict(Outcome.TIMEOUT, _timeout_reason(evidence, emulated=emulated, limits=limits))
    return None


def _not_executed(number: int) -> Verdict:
    reason, status = f"the program could not be executed: {os.strerror(number)}", _NOT_EXECUTABLE
    if number == errno.ENOENT:
        reason, status = f"{reason} (what it names as its interpreter or loader)", _NOT_FOUND
    return replace(verdict(Outcome.FAILED, reason), exit_code=status)


def mostly_waited(evidence: Evidence, limits: Limits | RunLimits | None) -> bool:
    """Whether the program waited for most of its time: then it was no slow processor that took it."""
    return limits is not None and evidence.cpu_us is not None and evidence.cpu_us < limits.wall_ms * 1000 // 2


def _timeout_reason(evidence: Evidence, *, emulated: bool, limits: Limits | RunLimits | None) -> str:
    after = f"after {limits.wall_ms / 1000:g} s" if limits else "at its deadline"
    if evidence.stopped:
        by = "by a signal, by whom is unknown"
        return f"the program had been stopped {by}, and had not ended {after} (limits.wall_ms)"
    slow = emulated and not mostly_waited(evidence, limits)
    hint = "; this machine is emulated, and CPU work takes many times longer than on hardware" if slow else ""
    return f"the program was still running {after} (limits.wall_ms){hint}"


def _lost(evidence: Evidence, supervisor: str) -> Verdict | None:
    """The verdict when there is no program's end to believe; None when there is one."""
    status_known = evidence.wait_status is not None and _is_an_end(evidence.wait_status)
    undone = evidence.boot_timeout or evidence.deadline_passed
    if status_known and evidence.channel_error is None and evidence.setup_failure is None and not undone:
        return None
    panic = _PANIC.search(evidence.console_tail)
    told = panic is not None or evidence.channel_error is not None or evidence.setup_failure is not None
    if evidence.instance_status is not None and not told:
        return _instance_ended(evidence, evidence.instance_status, supervisor)
    # From exec on, whatever breaks inside the guest may be the program's work, and must not pass for the host's.
    fault: Fault = "program" if evidence.stage in _STARTED else "host"
    return verdict(Outcome.GUEST_LOST, _lost_reason(evidence, panic[1] if panic else None), fault=fault)


def _lost_reason(evidence: Evidence, panic: str | None) -> str:
    """The first cause that applies, the most telling first."""
    doing = _DOING[evidence.stage]
    text = _shown(evidence.setup_failure or panic or evidence.channel_error or "")
    died = panic is not None and _INIT_DIED in panic
    causes = (
        (evidence.setup_failure is not None, f"the guest failed while {doing}: {text}"),
        (died, f"the guest's agent died while {doing} (kernel: {text})"),
        (panic is not None, f"the guest's kernel panicked while {doing} (kernel: {text})"),
        (evidence.channel_error is not None, f"the guest broke the channel's protocol while {doing}: {text}"),
        (evidence.boot_timeout, "the guest did not answer within the time allowed for booting"),
        (evidence.deadline_passed, f"the guest took too long while {doing}"),
        (evidence.wait_status is None, f"the guest's agent fell silent while {doing}"),
    )
    impossible = f"the guest reported a wait status that no ended program has: {evidence.wait_status}"
    return next((reason for applies, reason in causes if applies), impossible)


def _instance_ended(evidence: Evidence, status: int, supervisor: str) -> Verdict:
    doing = _DOING[evidence.stage]
    if spent := out_of_cpu_time(status):
        how = spent
    elif status < 0:
        how = f"was killed by {signal_name(-status)}"
    elif status > 0:
        how = f"ended with status {status}"
    elif evidence.stage in _STARTED:
        # Only root in the guest can switch it off, and the program is not root.
        return verdict(Outcome.GUEST_LOST, f"the guest switched itself off while {doing}", fault="program")
    else:
        how = "ended without an error"
    outcome = Outcome.BACKEND_ERROR if evidence.stage is Stage.START else Outcome.GUEST_LOST
    said = ""
    if status in {-_SIGKILL, SIGNAL_BASE + _SIGKILL}:
        said = _OUT_OF_MEMORY
    elif evidence.stage is Stage.BOOT and evidence.console_tail:  # nothing is in it yet that could lie
        said = f": {_shown(' '.join(evidence.console_tail.split())[-_SHOWN_CHARS:])}"
    return verdict(outcome, f"{supervisor} {how} while the guest was {doing}{said}")


def _ended_by_itself(evidence: Evidence, status: int, limits: Limits | RunLimits | None) -> Verdict:
    signal, code = status & 0x7F, status >> 8
    survived: tuple[str, ...] = ()
    if evidence.oom_kills:
        killed = f"{evidence.oom_kills} process{'es were' if evidence.oom_kills > 1 else ' was'} killed"
        survived = (f"{killed} for want of memory (limits.mem_bytes)",)
    chosen = None if signal else code
    end = Verdict(outcome=Outcome.OK, fault="none", reason="", exit_code=chosen, signal=signal or None)
    if evidence.cpu_exceeded:
        used = f"{limits.cpu_ms / 1000:g} s of CPU time" if limits else "all the CPU time that it may have"
        return _as(end, Outcome.CPU_LIMIT, f"the program used {used} (limits.cpu_ms)", survived)
    if evidence.oom_kills and signal == _SIGKILL:
        size = f"{limits.mem_bytes >> 20} MiB" if limits else "the memory that it may have"
        return _as(end, Outcome.OOM, f"the program was killed at {size} (limits.mem_bytes)")
    if signal:
        core = " and left a core" if status & 0x80 else ""
        return _as(end, Outcome.SIGNALLED, f"the program was ended by {signal_name(signal)}{core}", survived)
    return _as(end, Outcome.FAILED if code else Outcome.OK, f"the program ended with status {code}", survived)


def _as(end: Verdict, outcome: Outcome, reason: str, warnings: tuple[str, ...] = ()) -> Verdict:
    return replace(end, outcome=outcome, fault=OUTCOMES[outcome].fault, reason=reason, warnings=warnings)


def _is_an_end(status: int) -> bool:
    """Whether a wait status says that a process ended: not stopped, not continued, nor what a lying guest may say."""
    signal = status & 0x7F
    if not 0 <= status <= 0xFFFF:  # noqa: PLR2004 - sixteen bits are all it has
        return False
    if signal == 0:
        return status & 0x80 == 0
    return signal <= _LAST_SIGNAL and status >> 8 == 0


def _shown(text: str) -> str:
    """Text from the guest on one line, printable ASCII only, cut."""
    plain = "".join(char if " " <= char <= "~" else "?" for char in text.strip())
    return plain if len(plain) <= _SHOWN_CHARS else plain[:_SHOWN_CHARS] + "..."
