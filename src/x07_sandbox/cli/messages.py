"""What `x07 run` says about a run: its denials with a change that would allow each, its changes to files, its plan."""

from __future__ import annotations

import argparse
import json
import posixpath
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.outputs import print_failure
from x07_sandbox.cli.parser import nonempty
from x07_sandbox.errors import RefusedError, printable
from x07_sandbox.files.changes import ChangeSet, display_name
from x07_sandbox.policy.denials import CONNECTS, Denial, Hint, HowToAllow
from x07_sandbox.policy.outcomes import REFUSED_EXIT
from x07_sandbox.policy.templates import BUILT_IN, built_in
from x07_sandbox.sessions.result import Changes, Result
from x07_sandbox.sessions.saved_changes import command, find_saved, folder_names

if TYPE_CHECKING:
    from x07_sandbox.sessions.preview import Preview
    from x07_sandbox.sessions.request import RunCaller, RunRequest

_SHOWN: Final = 4
_ENTRIES: Final = 4
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
_NAMED: Final = 8
_DELETED_MAX: Final = 20
_RULES: Final = {
    "fs.deny_hidden": "hidden",
    "fs.allow_symlinks": "a symbolic link",
}
_PROTECTED: Final = "protected"
_WHY_PROTECTED: Final = "protected: other tools execute or trust it"  # in the first entry of a line
_LISTED: Final = 8
_STATES: Final = {"advisory": "advisory (not enforced; some libraries check them)"}
_ACCESS: Final = {False: "read-only", True: "writable"}


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
    if isinstance(value, list) and len(value) > _ENTRIES:
        return f"[..., {json.dumps(value[-1])}]"
    return json.dumps(value)


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN."""
    doc = "the run's id, or its first characters (default: the latest run with changes in this folder)"
    parser.add_argument("run", nargs="?", type=nonempty, metavar="RUN", help=doc)


def say_changes(result: Result) -> None:
    """Print messages about a run's changes: what was deleted or left out, and whether the changes were applied."""
    for line in change_lines(result):
        say(line)


def change_lines(result: Result) -> list[str]:
    """Return a line for every deletion, lines about changes left out, and a line with the counts and the state."""
    changes = result.changes
    if changes.state == "none":
        return []
    several = len({one.root for one in changes.names}) > 1
    if len(changes.names) < changes.added + changes.changed + changes.deleted:  # cut: there may be more roots
        several = find_saved(result.run).changes.several_roots
    deleted = [
        display_name(one.root, one.name, several_roots=several) for one in changes.names if one.action == "deleted"
    ]
    gone = "deleted" if changes.state == "applied" else "would be deleted"
    diff = command("diff", result.run, {one.root for one in changes.names})
    applicable = {entry.name for entry in changes.left_out_entries if entry.take}
    word = "left out" if changes.left_out else "not allowed"
    denials = [one for one in result.denials if one.action == "change" and one.subject not in applicable]
    refused = [
        f"{word}: {one.subject}{f' ({one.reason})' * bool(one.reason)}{how_to_allow_text(one.how_to_allow, one.field)}"
        for one in denials
    ]
    closing = [] if (changes.left_out or refused) and not _counts(changes) else [_closing(result.run, changes)]
    refs = [f"commits on {one.branch}: git log {shlex.quote(one.ref)}" for one in changes.commits]
    shown = refs[:_NAMED] if changes.state == "applied" else []
    return [*_capped(f"{gone}: ", deleted, diff), *refused, *left_out(changes), *shown, *closing]


def _capped(before: str, names: Sequence[str], diff: str) -> list[str]:
    """Return a line for each of the first few names, and one with the command that lists the others."""
    more = len(names) - _DELETED_MAX
    lines = [f"{before}{name}" for name in names[:_DELETED_MAX]]
    return [*lines, f"{before}{more} more names; to list all: {diff} --json"] if more > 0 else lines


def left_out(changes: Changes) -> list[str]:
    """Return a line with the changes left out and the command that applies them, or no line if none can be applied."""
    entries = [entry for entry in changes.left_out_entries if entry.take]
    if not entries:
        return []
    names = [f"{entry.name} ({', '.join(_RULES.get(rule, rule) for rule in entry.rules)})" for entry in entries]
    first = next((number for number, entry in enumerate(entries) if _PROTECTED in entry.rules), None)
    if first is not None:
        others = [_RULES.get(rule, rule) for rule in entries[first].rules if rule != _PROTECTED]
        names[first] = f"{entries[first].name} ({', '.join([*others, _WHY_PROTECTED])})"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"left out: {', '.join(names[:_NAMED])}{more}; to apply: {changes.apply_left_out}"]


def _counts(changes: Changes) -> str:
    counts = {"added": changes.added, "changed": changes.changed, "deleted": changes.deleted}
    return _in_words(counts, [one.branch for one in changes.commits])


def _closing(run: str, changes: Changes) -> str:
    why = f" ({changes.reason})" if changes.reason else ""
    if changes.state == "discarded" and why:
        return f"no changes to files were copied back: {changes.reason}"
    roots = {one.root for one in changes.names}
    diff, apply, undo = (command(verb, run, roots) for verb in ("diff", "apply", "undo"))
    after = {
        "applied": f"; see {diff}, revert with {undo}",
        "kept": f"; see {diff}, apply with {apply}",
        "conflict": f", nothing was changed; see {diff}, apply with {apply}",
        "discarded": "",
    }
    return f"{_counts(changes) or 'changes'}: {changes.state}{why}{after[changes.state]}"


def summary(changes: ChangeSet, done: str) -> str:
    """Return the numbers of added, changed and deleted names, followed by the text *done*."""
    counts = {word: changes.count(word) for word in ("added", "changed", "deleted")}
    words = _in_words(counts, [] if changes.commits is None else [*changes.commits.branches])
    return f"{words} in {folder_names(changes)}: {done}" if words else f"nothing to do: {done}"


def _in_words(counts: dict[str, int], branches: Sequence[str]) -> str:
    """Return the numbers of changed names, and the branches with new commits."""
    words = [f"{count} {word}" for word, count in counts.items() if count]
    return ", ".join([*words, *([f"commits on {_listed(branches)}"] if branches else [])])


def say_deleted(changes: ChangeSet, diff: str, *, back: bool = False) -> None:
    """Print the names that are deleted. back: whether the changes are being reverted, which deletes added names.

    diff: the command that shows the changes of the run.
    """
    action, several = "added" if back else "deleted", changes.several_roots
    names = [
        display_name(root.root, change.name, several_roots=several)
        for root in changes.roots
        for change in root.changes
        if change.action == action and not change.is_root_folder
    ]
    for line in _capped("deleted: ", names, diff):
        say(line)


def show_plan(request: RunRequest, caller: RunCaller, options: argparse.Namespace) -> int:
    """Print the plan of a run. Return 0 if the run could start, or 125 if it would be refused. Raises SandboxError."""
    from x07_sandbox.sessions.preview import preview  # few runs show it

    try:
        found = preview(request, caller)
    except RefusedError as exc:  # the result of a run; not an error before it, which would have X07's exit code 2
        if options.json and not options.quiet_json:
            return print_failure(exc)
        say(str(exc))
        return REFUSED_EXIT
    if not print_document(found, options):
        for line in _lines(found):
            show(line)
    return REFUSED_EXIT if found.plan.refusals else 0


def _lines(found: Preview) -> list[str]:
    limits = found.plan.limits
    states = Counter(control.state for control in found.plan.controls)
    denied = f" (denied: {_listed(found.denied_hosts)})" if found.denied_hosts else ""
    built = "nothing to build" if found.build is None else f"build in a VM without network: {_short(found.build)}"
    counts = [f"{count} {_STATES.get(state, state)}" for state, count in sorted(states.items(), reverse=True)]
    values = (
        f"time {limits.wall_ms / 1000:g} s",
        f"CPU time {limits.cpu_ms / 1000:g} s",
        f"memory {limits.mem_bytes >> 20} MiB",
        f"{limits.procs} processes besides the first",
        f"{limits.fds} open files",
    )
    files = [f"toolchain: {found.toolchain}", built, f"files copied into the VM: {_listed(found.files)}"]
    return [
        *(files if found.files else []),
        *(f"folder {root.host}: copied to {root.guest}, {_ACCESS[root.write]}" for root in found.roots),
        f"run in another VM: {_short(found.run)}",
        *(["user: root in the VM, over a writable layer of its system"] if found.guest_root else []),
        f"limits: {', '.join(values)}",
        *([] if found.scaling is None else [f"scaled for emulation: time limits times {found.scaling.factor}"]),
        f"network: {_listed(found.hosts) or 'none'}{denied}",
        *(f"blocked: {blocked}" for blocked in found.blocked_hosts[:_LISTED]),
        *(["addresses of names: chosen by your proxy, and not checked"] if found.proxy_resolves else []),
        *([f"image {found.image}: {found.digests['image']}"] if "image" in found.digests else []),
        f"policy fields: {', '.join(counts)}; to list them: x07 policy explain",
        *(f"refused: {refusal.why}" for refusal in found.plan.refusals),
    ]


def _listed(names: Sequence[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    return ", ".join(names if len(names) <= _LISTED else [*names[:_LISTED], f"and {len(names) - _LISTED} more"])


def _short(argv: list[str]) -> str:
    shown = " ".join("..." if "\n" in word else shlex.quote(word) for word in argv)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."  # noqa: PLR2004 - a line
