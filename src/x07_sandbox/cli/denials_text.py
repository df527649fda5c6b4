"""Messages of `x07 run` about the first few denials, each with a change that would allow the action, if any."""

import json
import posixpath
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from x07_sandbox.cli.console import say
from x07_sandbox.errors import printable
from x07_sandbox.policy.denials import CONNECTS, Denial, Hint, HowToAllow
from x07_sandbox.policy.templates import BUILT_IN, built_in
from x07_sandbox.sessions.result import Result

_SHOWN: Final = 4
_LISTED: Final = 4
_CHANGE: Final = "change"
_OF_PATHS: Final = frozenset({"read", "write"})
# Reported elsewhere: the reason of a refused run, and the outcome of changes.
_ELSEWHERE: Final = frozenset({"plan", _CHANGE})
# The words for a limit that was reached, by field and action.
_REACHED: Final = {
    ("limits.wall_ms", "run"): "time limit reached",
    ("limits.cpu_ms", "use"): "CPU time limit reached",
    ("limits.mem_bytes", "use"): "memory limit reached",
    ("limits.procs", "start"): "process limit reached",
    ("process.max_live", "start"): "child process limit reached",
    ("limits.fds", "open"): "open file limit reached",
    ("output", "write"): "output limit reached",
    ("fs.max_entries", "copy"): "limit of copied files and folders reached",
    ("fs.max_entries", "change"): "limit of changed files and folders reached",
}
_UNNOTICED: Final = CONNECTS | {"copy"}  # a program may succeed all the same
_FULL: Final = frozenset({"scratch", "limits.mem_bytes"})  # for these, the subject of a denied write is a sentence
# The words for other actions, followed by the subject. Names of system calls are not listed.
_ACTIONS: Final = {
    "break": "a violation of",
    "call": "the system call",
    "connect": "a connection to",
    "execute": "executing",
    "look up": "DNS lookup of",
    "open": "opening",
    "raise": "raising",
    "read": "reading",
    "replace": "replacing",
    "run": "running",
    "start": "starting",
    "use": "using",
    "write": "writing to",
}


def say_denials(result: Result) -> None:
    """Print the messages about a run's denials and hints."""
    for line in denial_lines(result):
        say(line)


def for_flags(result: Result, flags: Collection[str]) -> Result:
    """Return the result with advice for a command that has only *flags*.

    Advice to use another flag is replaced by a change to the policy or, if there is none, by advice to use `x07 run`.
    """

    def adapted(allowing: HowToAllow | None) -> HowToAllow | None:
        flag = allowing and (allowing.next_flag if allowing.command else allowing.flag)
        if allowing is None or not flag or flag.split()[0] in flags:
            return allowing
        if allowing.command:
            return replace(allowing, next_flag=f"x07 run with {flag}")
        return replace(allowing, flag=None if allowing.json_path is not None else f"x07 run with {flag}")

    denials = [replace(denial, how_to_allow=adapted(denial.how_to_allow)) for denial in result.denials]
    hints = [replace(hint, how=adapted(hint.how), to_write=adapted(hint.to_write)) for hint in result.hints]
    return replace(result, denials=denials, hints=hints)


def denial_lines(result: Result, command: str = "") -> list[str]:
    """Return the messages about a run's denials and hints, and how to make a policy file if the advice needs one.

    command: the words before --json in a message, such as "x07 run ", if the calling command has no --json.
    """
    lines = _unnoticed(result) if result.outcome == "ok" else _of_program(result, command)
    policy = result.policy or ""
    if policy.startswith(BUILT_IN) and _needs_policy_file(result):
        # --out is relative to the folder of an enclosing project, so the command contains an absolute path.
        init = f'x07 policy init --template {policy.removeprefix(BUILT_IN)} --out "$PWD/policy.json"'
        lines.append(f"to change the policy: {init}, then add --policy policy.json")
        if any(denial.field.startswith("process.") for denial in result.denials):
            lines += _with_processes(policy)
    return lines


def _unnoticed(result: Result) -> list[str]:
    """Return the messages that matter after success: what was not copied in, unless by --hide, and connections."""
    found = [one for one in result.denials if one.action in _UNNOTICED and one.field != "hide"]
    lines = [_line(denial) for denial in found[:_SHOWN]]
    more = len(found) - len(lines)
    return [*lines, f"and {more} more denials"] if more else lines


def _with_processes(policy: str) -> list[str]:
    """If the built-in *policy* forbids processes, return a message with flags that allow processes and its folders."""
    held = built_in(policy)
    if held is None or held.process.may_spawn:
        return []
    flags = [f"--allow-read-root {root}" for root in held.fs.read_roots]
    flags += [f"--allow-write-root {root}" for root in held.fs.write_roots]
    return [f"{policy} allows no processes; to allow them, use {' '.join([f'--policy {BUILT_IN}default', *flags])}"]


def _of_program(result: Result, command: str) -> list[str]:
    found = _to_report(result)
    lines = [_line(denial) for denial in found[:_SHOWN]]
    more = max(0, len(found) - _SHOWN) + result.denials_lost
    if more:
        most = "up to " if result.denials_lost else ""  # several lost records may belong to one denial
        lines.append(f"and {most}{more} more denials; {command}--json lists those that were recorded")
    return [*lines, *_failed_connections(result, command), *map(_hint, result.hints)]


def _failed_connections(result: Result, command: str) -> list[str]:
    """Return a line for each of the first destinations that were allowed but could not be reached."""
    rows = [] if result.net is None else [row for row in result.net.failed if row.rule != "dial:given-up"]
    lines = []
    for row in rows[:_SHOWN]:
        host = f"[{row.host}]" if ":" in row.host else row.host
        times = f" ({row.count} times)" if row.count > 1 else ""
        reason = row.reason[:1].lower() + row.reason[1:]
        lines.append(f"connection to {host}:{row.port} failed{times}: {reason}")
    if more := len(rows) - len(lines):
        lines.append(f"and {more} more failed connections; {command}--json lists them")
    return lines


def _to_report(result: Result) -> list[Denial]:
    """Return the denials to print, without repetitions. Denials that can be allowed come first."""
    found = [denial for denial in result.denials if denial.action not in _ELSEWHERE]
    found.sort(key=lambda denial: denial.how_to_allow is None)
    # If a shell cannot execute a program, it tries to read the program: two denials with one remedy.
    by_remedy: dict[tuple[str, str], Denial] = {}
    for denial in found:
        by_remedy.setdefault((denial.subject, str(denial.how_to_allow or denial.action)), denial)
    return _folded(by_remedy.values())


def _folded(denials: Iterable[Denial]) -> list[Denial]:
    """Replace denials of several paths that have the same remedy by one denial of the paths' common folder."""
    groups: dict[str, list[Denial]] = {}
    for number, denial in enumerate(denials):
        same = denial.how_to_allow is not None and denial.subject.startswith("/") and denial.action in _OF_PATHS
        key = f"{denial.field} {denial.action} {denial.how_to_allow} {denial.reason}" if same else str(number)
        groups.setdefault(key, []).append(denial)
    return [_merged(group) for group in groups.values()]


def _merged(group: Sequence[Denial]) -> Denial:
    first = group[0]
    if len(group) == 1:
        return first
    folder = posixpath.commonpath([denial.subject for denial in group])
    subject = f"{len(group)} paths in {folder.rstrip('/')}/, such as {first.subject}"
    return replace(first, subject=subject, count=1)


def _needs_policy_file(result: Result) -> bool:
    """Whether a printed denial or hint can be allowed only by a value in the policy, not by a flag or a setting."""
    advice = [denial.how_to_allow for denial in result.denials if denial.action == _CHANGE]
    if result.outcome != "ok":
        advice += [denial.how_to_allow for denial in _to_report(result)[:_SHOWN]] + [hint.how for hint in result.hints]
    return any(one is not None and one.json_path and not (one.flag or one.setting) for one in advice)


def _hint(hint: Hint) -> str:
    if hint.kind == "library":
        return f"{hint.subject} cannot be loaded from there{how_to_allow_text(hint.how)}"
    if hint.kind == "network":
        return f"{hint.subject} failed: this run has no network{how_to_allow_text(hint.how, 'net.allow_hosts')}"
    if hint.kind == "variable":
        return f"{hint.subject} is not set{how_to_allow_text(hint.how, 'env.allow_keys', purpose='set it')}"
    if hint.kind == "elsewhere":
        return f"{hint.subject} has another path in the VM: {hint.in_vm}"
    if hint.how.json_path is None:  # a program or a module
        return f"{hint.subject} is missing{how_to_allow_text(hint.how, purpose='add it')}"
    to_write = f" (to write: {hint.to_write.flag})" if hint.to_write and hint.to_write.flag else ""
    return f"{hint.subject} is not in the sandbox{how_to_allow_text(hint.how, 'fs.read_roots')}{to_write}"


def _line(denial: Denial) -> str:
    times = f" ({denial.count} times)" if denial.count > 1 and denial.action != "copy" else ""
    why = f" ({denial.reason})" if denial.reason else ""
    if reached := _REACHED.get((denial.field, denial.action)):
        how = how_to_allow_text(denial.how_to_allow, denial.field, purpose="allow more")
        return f"denied: {reached}{times}{why}{how}"
    what = denial.subject if denial.action == "write" and denial.field in _FULL else _action(denial)
    if denial.field in {"limit", "scratch"} or (denial.field.startswith("limit:") and denial.how_to_allow is None):
        return f"denied: {what}{times}{why}."
    purpose = "allow more" if denial.field in _FULL else "allow it"
    return f"denied: {what}{times}{why}{how_to_allow_text(denial.how_to_allow, denial.field, purpose=purpose)}"


def _action(denial: Denial) -> str:
    """Return a denied action as a noun phrase, so that no reader takes it for advice."""
    action, subject = denial.action, denial.subject
    if action == "copy":
        return f"copying {subject} into the VM"
    words = _ACTIONS.get(action, f"{action} on")  # else the name of a system call
    if subject.startswith("("):  # the call, whose path is not known
        return f"{words} {'a resource limit' if action == 'raise' else 'an unknown path'} {subject}"
    if not subject.startswith("/"):
        return f"{words} {subject}"
    place = subject.rstrip("/") or "/"
    if action == "write" and (given := _relative_folder(denial.how_to_allow)):
        return f"{words} {given} ({place} in the VM)"
    return f"{words} the folder {place}" if subject.endswith("/") else f"{words} {place}"


def _relative_folder(allowing: HowToAllow | None) -> str:
    """Return the host folder that would have to be writable if it is not an absolute path; else ""."""
    if allowing is None or allowing.json_path != "$.fs.write_roots" or not isinstance(allowing.value, list):
        return ""
    given = str(allowing.value[-1]) if allowing.value else ""
    return "" if given.startswith("/") else printable(given)


def how_to_allow_text(allowing: HowToAllow | None, field: str = "", *, purpose: str = "allow it") -> str:
    """Return the end of a message: the remedy, with a flag last, for copying. field: the policy field that denies."""
    if allowing is None:
        return ". It cannot be allowed."
    if allowing.setting:
        in_policy = f", and {_in_policy(allowing)}." if allowing.json_path else "."
        also = f", and use {allowing.flag}" if allowing.flag else in_policy
        return f". To {purpose}, set {allowing.setting} under [net] in your settings{also}"
    if allowing.command:
        return (
            f". To {purpose}, run {allowing.command}{f', then use {allowing.next_flag}' if allowing.next_flag else ''}"
        )
    if allowing.flag:
        return f". To {purpose}, use {allowing.flag}"
    if allowing.json_path == f"$.{field}" or "." not in field:
        return f". To {purpose}, {_in_policy(allowing)}."
    return f". To {purpose}, first {_in_policy(allowing)}. The next run then names the next step."


def _in_policy(allowing: HowToAllow) -> str:
    return f"set {(allowing.json_path or '').removeprefix('$.')} to {_value(allowing.value)} in the policy"


def _value(value: object) -> str:
    """Return the value as JSON. A long list is shortened to its last entry, which is the one to add."""
    if isinstance(value, list) and len(value) > _LISTED:
        return f"[..., {json.dumps(value[-1])}]"
    return json.dumps(value)
