"""Messages about changes to files, and their form as a patch and as JSON, for `run`, `diff`, `apply` and `undo`."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Final

import msgspec

from x07_sandbox.cli.console import say, write_stdout
from x07_sandbox.cli.denials_text import how_to_allow_text
from x07_sandbox.cli.parser import nonempty
from x07_sandbox.files.changes import ChangeSet, display_name, in_json
from x07_sandbox.sessions.result import Changes, Result
from x07_sandbox.sessions.saved_changes import command, find_saved, folder_names

_NAMED: Final = 8
_DELETED_MAX: Final = 20
_RULES: Final = {
    "fs.deny_hidden": "hidden",
    "fs.allow_symlinks": "a symbolic link",
}
_PROTECTED: Final = "protected"
_WHY_PROTECTED: Final = "protected: other tools execute or trust it"  # in the first entry of a line
_RETURN: Final = re.compile(rb"\r(?!\n)")


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
    closing = [] if changes.left_out and not _counts(changes) else [_closing(result.run, changes)]
    return [*_capped(f"{gone}: ", deleted, diff), *refused, *left_out(changes), *closing]


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
    return _in_words({"added": changes.added, "changed": changes.changed, "deleted": changes.deleted})


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
    return f"{_in_words(counts) or 'nothing to do'} in {folder_names(changes)}: {done}"


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


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


def changes_json(changes: ChangeSet) -> bytes:
    """Return all changes as JSON. A text KEY that is not valid UTF-8 is escaped, and KEY_base64 has its bytes."""
    import json

    def with_bytes(value: object) -> object:
        if isinstance(value, dict):
            texts = {key: in_json(inner)[1] for key, inner in value.items() if isinstance(inner, str)}
            exact = {f"{key}_base64": raw for key, raw in texts.items() if raw}
            return {key: with_bytes(inner) for key, inner in value.items() if key != "at"} | exact
        if isinstance(value, (list, tuple)):
            return [with_bytes(inner) for inner in value]
        return in_json(value)[0] if isinstance(value, str) else value

    return json.dumps(with_bytes(msgspec.to_builtins(changes)), indent=2).encode("ascii") + b"\n"


def print_bytes(data: bytes) -> None:
    """Write *data* (whole lines) to standard output, without control sequences on a terminal. Raises OSError."""
    if sys.stdout.isatty():
        from x07_sandbox.sessions.transfers import TerminalFilter

        # Users read a patch to judge it. A carriage return would hide the text before it.
        data = _RETURN.sub(rb"\\r", TerminalFilter()(data))
    write_stdout(data)
