"""What `x07 run` says of what a program did not get: the first few, each with what would allow it."""

from __future__ import annotations

import json
import posixpath
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.cli.console import say
from x07_sandbox.policy.templates import BUILT_IN, built_in

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from x07_sandbox.plan.denials import Denial, Hint, HowToAllow
    from x07_sandbox.runs.result import Result

_SHOWN: Final = 4
_LISTED: Final = 4
# Of these others tell: the reason of a refused run, and what becomes of changes.
_CHANGE: Final = "change"
_OF_PATHS: Final = frozenset({"read", "write"})
_ELSEWHERE: Final = frozenset({"plan", _CHANGE})
# A limit that was reached, by the field and by what the program did.
_REACHED: Final = {
    ("limits.wall_ms", "run"): "time limit reached",
    ("limits.cpu_ms", "use"): "CPU time limit reached",
    ("limits.mem_bytes", "use"): "memory limit reached",
    ("limits.procs", "start"): "process limit reached",
    ("process.max_live", "start"): "limit of child processes reached",
    ("limits.fds", "open"): "limit of open files reached",
    ("output", "write"): "output limit reached",
}
_FULL: Final = frozenset({"scratch", "limits.mem_bytes"})  # fields of which a denied write is told as a sentence


def say_denials(result: Result) -> None:
    """After a program that did not end well: it may not know why itself."""
    for line in denial_lines(result):
        say(line)


def for_flags(result: Result, flags: Collection[str]) -> Result:
    """The result as a command with these flags alone tells it: what is advised can be done there, or by x07 run."""

    def adapted(allowing: HowToAllow | None) -> HowToAllow | None:
        if allowing is None or not allowing.flag or allowing.flag.partition(" ")[0] in {*flags, "x07"}:
            return allowing
        return replace(allowing, flag=None if allowing.json_path is not None else f"x07 run with {allowing.flag}")

    denials = [replace(denial, how_to_allow=adapted(denial.how_to_allow)) for denial in result.denials]
    hints = [replace(hint, how=adapted(hint.how), to_write=adapted(hint.to_write)) for hint in result.hints]
    return replace(result, denials=denials, hints=hints)


def denial_lines(result: Result, command: str = "") -> list[str]:
    """What is told. command: the one that has --json, where it is another.

    How to come to a policy stands here once, also for changes that were kept back, of which others tell.
    """
    told = [] if result.outcome == "ok" else _of_program(result, command)
    policy = result.policy or ""
    if policy.startswith(BUILT_IN) and _speaks_of_policy(result):  # nobody has a file of it yet
        # --out is relative to a project's folder, where one lies around this: so the whole name.
        init = f'x07 policy init --template {policy.removeprefix(BUILT_IN)} --out "$PWD/policy.json"'
        told.append(f"to change the policy: {init}, then --policy policy.json")
        if any(denial.field.startswith("process.") for denial in result.denials):
            told += _with_processes(policy)
    return told


def _with_processes(policy: str) -> list[str]:
    """How to start processes, and keep the folders of a template that forbids them."""
    held = built_in(policy)
    if held is None or held.process.may_spawn:
        return []
    flags = [f"--allow-read-root {root}" for root in held.fs.read_roots]
    flags += [f"--allow-write-root {root}" for root in held.fs.write_roots]
    return [f"{policy} starts no processes; to start some: {' '.join([f'--policy {BUILT_IN}default', *flags])}"]


def _of_program(result: Result, command: str) -> list[str]:
    """What is told of a program that did not end well."""
    found = _told_of(result)
    told = [_line(denial) for denial in found[:_SHOWN]]
    more = max(0, len(found) - _SHOWN) + result.denials_lost
    if more:
        most = "up to " if result.denials_lost else ""  # there it is records, of which a refusal has several
        told.append(f"and {most}{more} more denials; {command}--json lists those that were recorded")
    return [*told, *map(_hint, result.hints)]


def _told_of(result: Result) -> list[Denial]:
    """The refusals that are told here, each thing to do once; what can be allowed first."""
    found = [denial for denial in result.denials if denial.action not in _ELSEWHERE]
    # The rest is more often a mistake than a wish.
    found.sort(key=lambda denial: denial.how_to_allow is None)
    # A shell reads a program that it could not execute: two refusals, but one thing to do.
    done: dict[tuple[str, str], Denial] = {}
    for denial in found:
        done.setdefault((denial.subject, str(denial.how_to_allow or denial.action)), denial)
    return _folded(done.values())


def _folded(denials: Iterable[Denial]) -> list[Denial]:
    """The same, with one for all paths that the same flag or value would allow: the folder that they lie in."""
    groups: dict[str, list[Denial]] = {}
    for number, denial in enumerate(denials):
        same = denial.how_to_allow is not None and denial.subject.startswith("/") and denial.action in _OF_PATHS
        key = f"{denial.field} {denial.action} {denial.how_to_allow} {denial.reason}" if same else str(number)
        groups.setdefault(key, []).append(denial)
    return [_one(group) for group in groups.values()]


def _one(group: Sequence[Denial]) -> Denial:
    first = group[0]
    if len(group) == 1:
        return first
    folder = posixpath.commonpath([denial.subject for denial in group])
    subject = f"{folder.rstrip('/')}/ ({len(group)} places in it, such as {first.subject})"
    return replace(first, subject=subject, count=1)


def _speaks_of_policy(result: Result) -> bool:
    """Whether something that is told has no flag, so that its line names a value of the policy."""
    advice = [denial.how_to_allow for denial in result.denials if denial.action == _CHANGE]
    if result.outcome != "ok":
        advice += [denial.how_to_allow for denial in _told_of(result)[:_SHOWN]] + [hint.how for hint in result.hints]
    return any(one is not None and not (one.flag or one.setting) for one in advice)


def _hint(hint: Hint) -> str:
    if hint.kind == "library":
        return f"{hint.subject} cannot be loaded from there{how_to_allow_text(hint.how)}"
    if hint.kind == "network":
        return f"{hint.subject} failed, since this run has no network{how_to_allow_text(hint.how, 'net.allow_hosts')}"
    if hint.kind == "variable":
        return f"{hint.subject} is not set{how_to_allow_text(hint.how, 'env.allow_keys', purpose='set it')}"
    if hint.how.json_path is None:  # a program or a module
        return f"{hint.subject} is missing{how_to_allow_text(hint.how, purpose='add it')}"
    to_write = f" (to write: {hint.to_write.flag})" if hint.to_write and hint.to_write.flag else ""
    return f"{hint.subject} is not in the sandbox{how_to_allow_text(hint.how, 'fs.read_roots')}{to_write}"


def _line(denial: Denial) -> str:
    times = f" ({denial.count} times)" if denial.count > 1 else ""
    why = f" ({denial.reason})" if denial.reason else ""
    if reached := _REACHED.get((denial.field, denial.action)):
        return (
            f"denied: {reached}{times}{why}{how_to_allow_text(denial.how_to_allow, denial.field, purpose='allow more')}"
        )
    what = denial.subject if denial.action == "write" and denial.field in _FULL else f"{denial.action} {denial.subject}"
    if denial.field == "limit":
        return f"denied: {what}{times}{why}"
    return f"denied: {what}{times}{why}{how_to_allow_text(denial.how_to_allow, denial.field)}"


def how_to_allow_text(allowing: HowToAllow | None, field: str = "", *, purpose: str = "allow it") -> str:
    """What would allow it, as the end of a line; a flag stands last, to be copied. field: what refused it, if known."""
    if allowing is None:
        return ". Nothing allows it."
    if allowing.setting:
        return f". To {purpose}, set {allowing.setting} under [net] in your settings."
    if allowing.flag:
        return f". To {purpose}, use {allowing.flag}"
    value = f"{(allowing.json_path or '').removeprefix('$.')} to {_value(allowing.value)} in the policy"
    # A policy may need another field first: the next run then tells the rest.
    if allowing.json_path == f"$.{field}" or "." not in field:
        return f". To {purpose}, set {value}."
    return f". First set {value}, then {field}."


def _value(value: object) -> str:
    """As JSON; of a long list, what stands there already is left out."""
    if isinstance(value, list) and len(value) > _LISTED:
        return f"[..., {json.dumps(value[-1])}]"
    return json.dumps(value)
