"""The tables of outcomes and reasons, and the classifier that derives both from the evidence about a finished phase.

A reason is a code with parameters, and a sentence for each code. Code that learns more about an end changes the
parameters, never the sentence. An error that ended a run is a reason too: its code is the error's (`errors`), and its
sentence is the error's text.

Only evidence from the host or the kernel's counters is used, since a program may choose an exit status of 137.

Precedence: cancelled, refused, output-limit, timeout, guest-lost, cpu-limit, oom, signalled, failed, ok. The host
causes the first four, so they explain whatever the guest reports afterwards.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import Flag, SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import out_of_cpu_time
from x07_sandbox.host.waiting import BY_KILL
from x07_sandbox.policy.denials import STARTS, Denial, Outcome
from x07_sandbox.policy.features import Features, vm_features

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Limits

Fault = Literal["program", "policy", "host", "none"]

REFUSED_EXIT: Final = 125
SIGNAL_BASE: Final = 128
SIGINT: Final = 2
_SIGKILL: Final = 9
# A shell's exit status for a program that the kernel could not execute.
_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127
# Errors of execve that the program itself causes: its format, interpreter, mode or arguments.
_PROGRAM_ERRORS: Final = frozenset(
    {errno.ENOEXEC, errno.ENOENT, errno.EACCES, errno.ELIBBAD, errno.EINVAL, errno.E2BIG, errno.ELOOP, errno.ENOTDIR}
)
_LAST_SIGNAL: Final = 64
_MAY_LACK_TASKS: Final = frozenset({"failed", "signalled", "timeout", "cpu-limit", "oom", "output-limit"})
_SHOWN_CHARS: Final = 160  # of a text from the guest
# Linux numbers, since the guest is Linux on every host.
# fmt: off
_SIGNALS: Final = (
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGUSR1", "SIGSEGV",
    "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGSTKFLT", "SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN",
    "SIGTTOU", "SIGURG", "SIGXCPU", "SIGXFSZ", "SIGVTALRM", "SIGPROF", "SIGWINCH", "SIGIO", "SIGPWR", "SIGSYS",
)
# fmt: on
_PANIC: Final = re.compile(r"Kernel panic - not syncing: ([^\n]*)")
_OUTPUT_FLAG: Final = Flag("--max-output-bytes")
_NO_UIDS: Final = re.compile("setpriv: setres[ug]id")  # printed by setpriv(1), which starts QEMU
_SUBJECT: Final = {"subject": "program"}  # of a reason
_INIT_DIED: Final = "Attempted to kill init"


class ExitRule(StrEnum):
    """Source of an exit code that is not fixed."""

    PROGRAM = "the program's own"
    SIGNAL = "128 + the program's signal"
    CANCEL = "130 for SIGINT, else 143"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The row of one outcome. fault: the default; a verdict may have another fault."""

    fault: Fault
    exit: int | ExitRule
    doc: str


OUTCOMES: Final[dict[Outcome, Row]] = {
    "ok": Row(fault="none", exit=ExitRule.PROGRAM, doc="The program exited with status 0."),
    "failed": Row(
        fault="program",
        exit=ExitRule.PROGRAM,
        doc="The program exited with another status, or could not be executed (status 126; 127 for a missing file).",
    ),
    "signalled": Row(fault="program", exit=ExitRule.SIGNAL, doc="A signal killed the program."),
    "timeout": Row(
        fault="policy", exit=124, doc="The program reached its time limit (limits.wall_ms), or a sandbox its lifetime."
    ),
    "cpu-limit": Row(fault="policy", exit=124, doc="The program reached its CPU time limit (limits.cpu_ms)."),
    "oom": Row(fault="policy", exit=137, doc="The kernel killed the program at its memory limit (limits.mem_bytes)."),
    "output-limit": Row(
        fault="policy", exit=153, doc="The program wrote more to an output stream than the limit allows."
    ),
    "refused": Row(
        fault="policy",
        exit=REFUSED_EXIT,
        doc="The program was not run, because the request cannot be enforced or is not allowed.",
    ),
    "guest-lost": Row(
        fault="host", exit=REFUSED_EXIT, doc="The VM failed or was killed, or x07's agent in the VM failed."
    ),
    "gate-lost": Row(
        fault="host", exit=REFUSED_EXIT, doc="The egress gate, the host process that checks connections, failed."
    ),
    "backend-error": Row(fault="host", exit=REFUSED_EXIT, doc="The VM failed to start or stop."),
    "internal-error": Row(fault="host", exit=REFUSED_EXIT, doc="x07-sandbox has a bug."),
    "build-failed": Row(fault="program", exit=126, doc="The program could not be built."),
    "cancelled": Row(fault="none", exit=ExitRule.CANCEL, doc="The user or another process cancelled the run."),
    "usage-error": Row(fault="policy", exit=2, doc="The request is invalid."),
}


# What set a limit: a policy field, an option, or x07 itself.
_SET_BY: Final = "[ ({field})][ ({option})][ (to allow more, use {more})][ ({fixed})]"
_DENIED: Final = "[; it was denied {denied}]"  # new processes or threads, the lack of which often explains the end
_TIME: Final = f"reached its time limit[ of {{limit}}]{_SET_BY}"
# In braces: a parameter. In brackets: words that are left out if their parameter is missing.
REASONS: Final = {
    "exited": f"the {{subject}} exited with status {{status}}{_DENIED}",
    "signal": f"the {{subject}} was killed by {{signal}}[ ({{core}})]{_DENIED}",
    "wall-time": f"the {{subject}} {_TIME}{_DENIED}",
    "wall-time-emulated": (
        f"the {{subject}} {_TIME}; the VM is emulated, so CPU work takes many times longer than on hardware{_DENIED}"
    ),
    "wall-time-stopped": f"the {{subject}} was stopped by a signal and then {_TIME}{_DENIED}",
    "cpu-time": f"the {{subject}} reached its CPU time limit[ of {{limit}}]{_SET_BY}{_DENIED}",
    "memory": f"the {{subject}} was killed at its memory limit[ of {{limit}}]{_SET_BY}{_DENIED}",
    "output": f"the {{subject}} exceeded the output limit of {{limit}} for {{stream}}{_SET_BY}{_DENIED}",
    "not-executable": "the {subject} could not be executed: {problem}",
    "no-interpreter": "the {subject} could not be executed: {problem} (its interpreter or loader)",
    "command-not-in-image": "the command {name} is not in the image {image}. {advice}: {command}",
    "command-not-in-vm": "{name} or its interpreter does not exist in the VM",
    "command-not-on-host": "the command {name} is not installed on this host",
    "built": "the program was built",
    "not-built": "the build succeeded, but its output {problem}",
    "cancelled": "the run was cancelled[ by {by}][ while the guest was {doing}]",
    "cancelled-before-apply": "the run was cancelled[ by {by}] before its changes were applied",
    "rolled-back": "the sandbox was rolled back to a moment before the command was started",
    "not-prepared": "the guest could not prepare the program: {problem}",
    "guest-failed": "the guest failed while {doing}: {problem}",
    "agent-died": "the guest agent died while {doing} (kernel: {problem})",
    "kernel-panic": "the guest kernel panicked while {doing} (kernel: {problem})",
    "protocol": "the guest violated the channel protocol[ while {doing}]: {problem}",
    "boot-late": "the guest did not boot in time",
    "guest-late": "the guest reached its deadline while {doing}",
    "guest-silent": "the guest agent stopped responding while {doing}",
    "wait-status": "the guest reported an invalid wait status: {status}",
    "guest-off": "the guest powered off while {doing}",
    "supervisor-ended": "{supervisor} {how} while the guest was {doing}[: {problem}]",
    "supervisor-uid": "{supervisor} {how} while the guest was {doing}: {problem}",
    "supervisor-killed": (
        "{supervisor} {how} while the guest was {doing}; if this host ran out of memory, run fewer programs at once "
        "(X07_VM_MAX_RUNNING=1)"
    ),
    "closed": "the sandbox was closed",
    "expired": "the sandbox reached its lifetime of {limit}[ after {event}]",
    "idle": "the sandbox was idle for {limit}",
    "gate-exited": "the egress gate exited while the guest was {doing}",
    "bug": "bug in x07-sandbox: {problem}",
}
_OPTIONAL: Final = re.compile(r"\[([^]]*)\]")


def exit_code(outcome: Outcome, *, program_exit: int | None, signal: int | None) -> int:
    """Return the exit code of ``x07 run``. Raises ValueError if it depends on a missing status or signal.

    signal: the signal that killed the program or, for cancelled, the signal that x07 received.
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
    """Return the outcomes by exit code, in the order of the table. The key of a code that is not fixed is in words."""
    found: dict[str, list[Outcome]] = {}
    for outcome, row in OUTCOMES.items():
        found.setdefault(str(row.exit), []).append(outcome)
    return found


def describe_exits() -> str:
    """Return the exit codes for a command's help, one per line."""
    return "".join(f"  {code}: {', '.join(outcomes)}\n" for code, outcomes in outcomes_by_exit().items())


class Stage(StrEnum):
    """A stage of a job."""

    START = "start"  # the instance was being started
    BOOT = "boot"  # until the agent answered
    SETUP = "setup"  # files copied in, confinement
    RUN = "run"  # from the program's exec on
    COLLECT = "collect"  # the program has ended, its results are being returned


_STARTED: Final = frozenset({Stage.RUN, Stage.COLLECT})
_DOING: Final = {
    Stage.START: "starting",
    Stage.BOOT: "booting",
    Stage.SETUP: "preparing the program",
    Stage.RUN: "running the program",
    Stage.COLLECT: "returning the results",
}
_BUILDING: Final = {  # the same for a build
    _DOING[Stage.RUN]: "building the program",
    _DOING[Stage.COLLECT]: "returning the built program",
}


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Evidence about a finished phase."""

    stage: Stage  # in which the phase ended
    wait_status: int | None = None  # the program's status from waitpid in the guest's init; None if it was not received
    deadline_passed: bool = False  # whether the host's deadline for the stage expired first
    stopped: bool = False  # whether a signal had stopped the program's processes at the deadline
    cpu_exceeded: bool = False  # whether the cgroup's counter exceeded limits.cpu_ms
    cpu_us: int | None = None  # the cgroup's final counter, in microseconds; None if it was not received
    oom_kills: int = 0  # the cgroup's counter of processes killed for memory
    output_overflow: str | None = None  # the stream that exceeded its limit: "stdout" or "stderr"
    output_max_bytes: int = 0  # that limit
    channel_error: str | None = None  # how the guest violated the protocol; a stream that merely ends is no violation
    instance_status: int | None = None  # of the machine's or container's process (-N for signal N); None while it runs
    console_tail: str = ""  # the end of the console output; hostile text, used only if the guest was lost
    cancelled_by: int | None = None  # who cancelled the run: see Cancel.signal
    setup_failure: str | None = None  # the step that the agent or the host could not do for the job
    exec_errno: int = 0  # the error of execve in the guest; 0 if execve succeeded
    boot_timeout: bool = False  # whether the agent did not answer in time
    gate_lost: bool = False  # whether the egress gate ended before the program did
    rolled_back: bool = False  # whether the sandbox went back to a moment before the program was started

    @property
    def killed(self) -> bool:
        """Whether the machine's process was killed from outside, which says nothing about a fault of the machine."""
        status = self.instance_status
        return status in {-_SIGKILL, SIGNAL_BASE + _SIGKILL} or bool(out_of_cpu_time(status))


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a phase ended. exit_code: the program's own status, if it exited.

    signal: the signal that killed the program or, for cancelled, the signal that x07 received.
    code, params: the reason. error: the error that is the reason, if *code* is not in that table.
    """

    outcome: Outcome
    fault: Fault
    code: str
    params: dict[str, Any] = {}
    error: SandboxError | None = None
    exit_code: int | None = None
    signal: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def x07_exit_code(self) -> int:
        """The exit code of ``x07 run``."""
        return exit_code(self.outcome, program_exit=self.exit_code, signal=self.signal)

    @property
    def reason(self) -> str:
        """The reason as a sentence without full stop, for users of the command line."""
        return self.reason_for(str)

    def reason_for(self, word: Callable[[Flag], str]) -> str:
        """Return the reason as a sentence without full stop. word: returns the name of an option, for the reader."""
        return sentence(self.code, self.params, word) if self.error is None else self.error.sentence

    @property
    def limited_by(self) -> str:
        """What set the limit that was reached: a policy field or a flag; "" if no limit was reached."""
        return str(self.params.get("field") or self.params.get("option") or "")

    def having(self, **params: object) -> Verdict:
        """Return the verdict with changed parameters of its reason. None removes a parameter."""
        changed = self.params | params
        return replace(self, params={name: value for name, value in changed.items() if value is not None})


def verdict(
    outcome: Outcome, code: str, params: dict[str, Any] | None = None, *, fault: Fault | None = None
) -> Verdict:
    """Return a verdict that has no program status. fault: None for the outcome's default fault."""
    return Verdict(outcome=outcome, fault=fault or OUTCOMES[outcome].fault, code=code, params=params or {})


def cancelled_verdict(by: int, code: str = "cancelled") -> Verdict:
    """Return the verdict on a cancelled run. by: see Cancel.signal."""
    who = {"by": "x07 kill" if by == BY_KILL else signal_name(by)} if by else {}
    return replace(verdict("cancelled", code, who), signal=by if by > 0 else None)


def classify(evidence: Evidence, *, features: Features | None = None, limits: Limits | None = None) -> Verdict:
    """Return the verdict on *evidence*. features: the backend's, if known. limits: the limits to show in the reason."""
    features = features or vm_features("vm-hardware")
    if evidence.gate_lost and evidence.cancelled_by is None and not evidence.deadline_passed:
        return verdict("gate-lost", "gate-exited", {"doing": _DOING[evidence.stage]})
    if evidence.rolled_back:
        return verdict("cancelled", "rolled-back")
    ended = _ended_by_us(evidence, emulated=features.emulated, limits=limits)
    if ended := ended or _lost(evidence, features.words.supervisor):
        return ended
    assert evidence.wait_status is not None  # else it is lost
    return _ended_by_itself(evidence, evidence.wait_status, limits)


def build_verdict(found: Verdict, wall_ms: int = settings.BUILD_WALL_MS, subject: str = "compiler") -> Verdict:
    """Return the verdict on a build. Whatever ended the compiler, the build failed.

    wall_ms: the build's time limit. subject: what the program of the phase was.
    """
    doing = found.params.get("doing")
    found = found.having(subject=subject, doing=_BUILDING.get(str(doing), doing))
    if found.outcome not in {"failed", "signalled", "timeout", "cpu-limit", "oom", "output-limit"}:
        return found
    if found.outcome in {"timeout", "cpu-limit"} and wall_ms < settings.BUILD_S_MAX * 1000:
        more_s = min(settings.BUILD_S_MAX, 2 * max(1, wall_ms // 1000))
        found = limit_set_by(found, more=Flag(f"--build-timeout {more_s}"))
    else:
        found = limit_set_by(found, fixed="fixed for builds")
    return replace(found, outcome="build-failed", fault="program")


def with_denied_tasks(found: Verdict, denials: Sequence[Denial]) -> Verdict:
    """Return the verdict on a program that failed, with what it was denied of processes and threads as a reason too."""
    lacks = found.outcome in _MAY_LACK_TASKS
    tasks = next((denial for denial in denials if lacks and denial.action == STARTS), None)
    return found if tasks is None else found.having(denied=f"{tasks.subject} ({tasks.field})")


def limit_set_by(found: Verdict, **setter: str) -> Verdict:
    """Return the verdict on a reached limit with what set the limit: `option`, `more` or `fixed`."""
    return found.having(**{"field": None, "option": None, **setter}) if found.limited_by else found


def sentence(code: str, params: Mapping[str, object], word: Callable[[Flag], str] = str) -> str:
    """Return the sentence for a code, without a full stop. word: returns the name of an option, for the reader."""
    values = {name: word(value) if isinstance(value, Flag) else value for name, value in params.items()}
    words = []
    for number, part in enumerate(_OPTIONAL.split(REASONS[code])):
        try:
            words.append(part.format_map(values))
        except KeyError:
            if number % 2 == 0:  # not in brackets
                raise
    return "".join(words)


def ends_with_command(code: str) -> bool:
    """Return whether the sentence ends with a command to paste, which no full stop may follow."""
    return REASONS[code].endswith("{command}")


def ending_line(outcome: Outcome, code: str, reason: str, error: SandboxError | None) -> str:
    """Return how a run ended as one line of text. code, reason, error: the reason for the outcome, as in a result."""
    if code not in REASONS and error is not None:
        return f"{outcome}: {error}"
    return f"{outcome}: {reason}{'' if code in REASONS and ends_with_command(code) else '.'}"


def signal_name(number: int) -> str:
    """Return the Linux name of a signal, such as SIGSEGV or SIGRTMIN+1."""
    if 1 <= number <= len(_SIGNALS):
        return _SIGNALS[number - 1]
    return f"SIGRTMIN+{number - 34}" if 34 <= number <= _LAST_SIGNAL else f"signal {number}"  # noqa: PLR2004 - glibc's


def _ended_by_us(evidence: Evidence, *, emulated: bool, limits: Limits | None) -> Verdict | None:
    if evidence.cancelled_by is not None:
        return cancelled_verdict(evidence.cancelled_by).having(doing=_DOING[evidence.stage])
    if evidence.exec_errno in _PROGRAM_ERRORS and evidence.stage not in _STARTED:
        return _not_executed(evidence.exec_errno)
    if evidence.setup_failure is not None and evidence.stage not in _STARTED:
        return verdict("refused", "not-prepared", {"problem": _shown(evidence.setup_failure)}, fault="host")
    if evidence.output_overflow is not None:
        most = evidence.output_max_bytes
        limit = f"{most >> 20} MiB" if most and most % settings.MIB == 0 else f"{most} bytes"
        facts = {"limit": limit, "stream": evidence.output_overflow, "option": _OUTPUT_FLAG}
        return verdict("output-limit", "output", _SUBJECT | facts)
    if evidence.deadline_passed and evidence.stage is Stage.RUN:
        code = "wall-time-stopped" if evidence.stopped else "wall-time"
        if emulated and not evidence.stopped and not mostly_waited(evidence, limits):
            code = "wall-time-emulated"
        return verdict("timeout", code, _limit("wall_ms", limits))
    return None


def _limit(field: Literal["wall_ms", "cpu_ms", "mem_bytes"], limits: Limits | None) -> dict[str, str]:
    """Return the parameters of a reason about a limit of the policy."""
    facts = _SUBJECT | {"field": f"limits.{field}"}
    if limits is None:
        return facts
    limit: int = getattr(limits, field)
    return facts | {"limit": f"{limit >> 20} MiB" if field == "mem_bytes" else f"{limit / 1000:g} s"}


def _not_executed(number: int) -> Verdict:
    missing = number == errno.ENOENT
    code, status = ("no-interpreter", _NOT_FOUND) if missing else ("not-executable", _NOT_EXECUTABLE)
    # The image was the caller's choice. Its lack of an interpreter is no fault of the program.
    fault: Fault = "policy" if missing else "program"
    return replace(verdict("failed", code, _SUBJECT | {"problem": os.strerror(number)}, fault=fault), exit_code=status)


def mostly_waited(evidence: Evidence, limits: Limits | None) -> bool:
    """Return whether the program was idle most of the time. A slow CPU was then not the cause of a timeout."""
    return limits is not None and evidence.cpu_us is not None and evidence.cpu_us < limits.wall_ms * 1000 // 2


def _lost(evidence: Evidence, supervisor: str) -> Verdict | None:
    """Return the verdict if the program's status is unknown or not credible, or None if the status can be used."""
    status_known = evidence.wait_status is not None and _is_an_end(evidence.wait_status)
    late = evidence.boot_timeout or evidence.deadline_passed
    if status_known and evidence.channel_error is None and evidence.setup_failure is None and not late:
        return None
    panic = _PANIC.search(evidence.console_tail)
    explained = panic is not None or evidence.channel_error is not None or evidence.setup_failure is not None
    if evidence.instance_status is not None and not explained:
        return _instance_ended(evidence, evidence.instance_status, supervisor)
    # After exec the program may have caused any failure inside the guest, so the host is not blamed.
    fault: Fault = "program" if evidence.stage in _STARTED else "host"
    return replace(_lost_verdict(evidence, panic[1] if panic else None), fault=fault)


def _lost_verdict(evidence: Evidence, panic: str | None) -> Verdict:
    """Return the verdict with the most specific reason why the guest was lost. panic: the kernel's message, or None."""
    text = _shown(evidence.setup_failure or panic or evidence.channel_error or "")
    causes = (
        (evidence.setup_failure is not None, "guest-failed"),
        (panic is not None and _INIT_DIED in panic, "agent-died"),
        (panic is not None, "kernel-panic"),
        (evidence.channel_error is not None, "protocol"),
        (evidence.boot_timeout, "boot-late"),
        (evidence.deadline_passed, "guest-late"),
        (evidence.wait_status is None, "guest-silent"),
    )
    code = next((code for applies, code in causes if applies), "wait-status")
    return verdict(
        "guest-lost", code, {"doing": _DOING[evidence.stage], "problem": text, "status": evidence.wait_status}
    )


def _instance_ended(evidence: Evidence, status: int, supervisor: str) -> Verdict:
    facts = {"doing": _DOING[evidence.stage], "supervisor": supervisor}
    if spent := out_of_cpu_time(status):
        how = spent
    elif status < 0:
        how = f"was killed by {signal_name(-status)}"
    elif status > 0:
        how = f"exited with status {status}"
    elif evidence.stage in _STARTED:
        # Only root in the guest can switch it off, and the program is not root.
        return verdict("guest-lost", "guest-off", facts, fault="program")
    else:
        how = "exited without an error"
    outcome: Outcome = "backend-error" if evidence.stage is Stage.START else "guest-lost"
    if status in {-_SIGKILL, SIGNAL_BASE + _SIGKILL}:
        return verdict(outcome, "supervisor-killed", facts | {"how": how})
    code, said = "supervisor-ended", evidence.console_tail
    if evidence.stage is Stage.BOOT and said:  # the program has not run yet
        facts["problem"] = _shown(" ".join(said.split())[-_SHOWN_CHARS:])
        code = "supervisor-uid" if _NO_UIDS.search(said) else code
    return verdict(outcome, code, facts | {"how": how})


def _ended_by_itself(evidence: Evidence, status: int, limits: Limits | None) -> Verdict:
    signal, code = status & 0x7F, status >> 8
    survived: tuple[str, ...] = ()
    if evidence.oom_kills:
        killed = f"{evidence.oom_kills} process{'es were' if evidence.oom_kills > 1 else ' was'} killed"
        limit = "" if limits is None else f" of {limits.mem_bytes >> 20} MiB"
        survived = (f"{killed} at the memory limit{limit}",)
    if evidence.cpu_exceeded:
        end = verdict("cpu-limit", "cpu-time", _limit("cpu_ms", limits))
    elif evidence.oom_kills and signal == _SIGKILL:
        survived = ()
        end = verdict("oom", "memory", _limit("mem_bytes", limits))
    elif signal:
        core = {"core": "core dumped"} if status & 0x80 else {}
        end = verdict("signalled", "signal", _SUBJECT | core | {"signal": signal_name(signal)})
    else:
        end = verdict("failed" if code else "ok", "exited", _SUBJECT | {"status": str(code)})
    return replace(end, exit_code=None if signal else code, signal=signal or None, warnings=survived)


def _is_an_end(status: int) -> bool:
    """Return whether a wait status means that the process ended: it is valid, and not "stopped" or "continued"."""
    signal = status & 0x7F
    if not 0 <= status <= 0xFFFF:  # noqa: PLR2004 - 16 bits
        return False
    if signal == 0:
        return status & 0x80 == 0
    return signal <= _LAST_SIGNAL and status >> 8 == 0


def _shown(text: str) -> str:
    """Return text from the guest on one line, truncated, in printable ASCII."""
    plain = "".join(char if " " <= char <= "~" else "?" for char in text.strip())
    return plain if len(plain) <= _SHOWN_CHARS else plain[:_SHOWN_CHARS] + "..."
