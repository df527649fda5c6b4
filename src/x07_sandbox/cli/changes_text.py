"""Messages about changes to files, and their form as a patch and as JSON, for `run`, `diff`, `apply` and `undo`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.cli.console import say, write_stdout
from x07_sandbox.cli.denials_text import how_to_allow_text
from x07_sandbox.cli.parser import nonempty
from x07_sandbox.files.changes import ChangeSet, decode, display_name, path_of, printable
from x07_sandbox.files.dependencies import with_later_applied
from x07_sandbox.files.patch import TEXT_MAX, patch
from x07_sandbox.runs.saved_changes import SavedChanges, find_saved

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from x07_sandbox.files.changes import Node
    from x07_sandbox.plan.denials import Denial
    from x07_sandbox.runs.result import Changes, Result

_CHUNK: Final = 1 << 16
_NAMED: Final = 8
_RULES: Final = {
    "fs.deny_hidden": "hidden",
    "fs.allow_symlinks": "a symbolic link",
}
_PROTECTED: Final = "protected"
_WHY_PROTECTED: Final = "protected: other tools execute or trust it"  # in the first entry of a line
_RETURN: Final = re.compile(rb"\r(?!\n)")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN."""
    doc = "the run's id, or its first characters (default: the latest run with changes)"
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
    applicable = {entry.name for entry in changes.left_out_entries if entry.take}
    word = "left out" if changes.left_out else "not allowed"
    denials = [one for one in result.denials if one.action == "change" and one.subject not in applicable]
    refused = [f"{word}: {_because(one)}{how_to_allow_text(one.how_to_allow, one.field)}" for one in denials]
    closing = [] if changes.left_out and not _counts(changes) else [_closing(changes)]
    return [*(f"{gone}: {name}" for name in deleted), *refused, *left_out(changes), *closing]


def _because(denial: Denial) -> str:
    return f"{denial.subject} ({denial.reason})" if denial.reason else denial.subject


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


def _closing(changes: Changes) -> str:
    why = f" ({changes.reason})" if changes.reason else ""
    if changes.state == "discarded" and why:
        return f"no changes to files were copied back: {changes.reason}"
    after = {
        "applied": "; see x07 diff, revert with x07 undo",
        "kept": "; see x07 diff, apply with x07 apply",
        "conflict": ", nothing was changed; see x07 diff, apply with x07 apply",
        "discarded": "",
    }
    return f"{_counts(changes) or 'changes'}: {changes.state}{why}{after[changes.state]}"


def summary(changes: ChangeSet, done: str) -> str:
    """Return the numbers of added, changed and deleted names, followed by the text *done*."""
    counts = {word: changes.count(word) for word in ("added", "changed", "deleted")}
    return f"{_in_words(counts) or 'nothing to do'}: {done}"


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def say_deleted(changes: ChangeSet, *, back: bool = False) -> None:
    """Print every name that is deleted. back: whether the changes are being reverted, which deletes added names."""
    action, several = "added" if back else "deleted", changes.several_roots
    for root in changes.roots:
        for change in root.changes:
            if change.action == action and not change.is_root_folder:
                say(f"deleted: {display_name(root.root, change.name, several_roots=several)}")


def include_applied(kept: SavedChanges) -> SavedChanges:
    """Return *kept* with those changes included that were left out at first and applied later. Raises HostError."""
    done = kept.done() if any(root.left_out for root in kept.changes.roots) else None
    return kept if not done else kept._replace(changes=with_later_applied(kept.changes, done))


def patch_chunks(kept: SavedChanges) -> Iterator[bytes]:
    """Yield the patch of a run's changes in chunks of many lines."""
    chunk = bytearray()
    for line in patch(kept.changes, _Before(kept), partial(_after, kept.folder / "data")):
        chunk += line
        if len(chunk) >= _CHUNK:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)


def _after(path: Path, _root: str, _name: str, node: Node) -> bytes | None:
    """Return the new content of a file, or None if the content is not saved or is too large for a patch."""
    if node.at is None or node.size > TEXT_MAX:
        return None
    with path.open("rb") as file:
        return os.pread(file.fileno(), node.size, node.at)


class _Before:
    """Reader of the old contents of files: from the host if the file is unchanged there, else from the undo data."""

    def __init__(self, kept: SavedChanges) -> None:
        self._at: dict[tuple[str, str], tuple[Path, int]] = {}
        for place in kept.undos:
            with contextlib.suppress(OSError, ValueError):  # no undo data
                undoing = decode((place / "undo/changes.json").read_bytes())
                for root in undoing.roots:
                    for change in root.changes:
                        if change.after is not None and change.after.at is not None:
                            self._at[root.root, change.name] = place / "undo/data", change.after.at

    def __call__(self, root: str, name: str, node: Node) -> bytes | None:
        if node.size > TEXT_MAX:
            return None
        found = _matching(Path(path_of(root, name)), 0, node)
        if found is None and (root, name) in self._at:
            found = _matching(*self._at[root, name], node)
        return found


def _matching(path: Path, at: int, node: Node) -> bytes | None:
    """Return the content of *node* from the offset *at* of a file, or None if the bytes there have another digest."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(fd, node.size, at)
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if hashlib.sha256(data).hexdigest() == node.sha256 else None


def changes_json(changes: ChangeSet) -> bytes:
    """Return all changes as JSON, with unprintable characters escaped."""
    import json

    def plain_names(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain_names(inner) for key, inner in value.items() if key != "at"}
        if isinstance(value, (list, tuple)):
            return [plain_names(inner) for inner in value]
        return printable(value) if isinstance(value, str) else value

    return json.dumps(plain_names(msgspec.to_builtins(changes)), indent=2).encode() + b"\n"


def print_bytes(data: bytes) -> None:
    """Write *data* (whole lines) to standard output, without control sequences on a terminal. Raises OSError."""
    if sys.stdout.isatty():
        from x07_sandbox.runs.streams import TerminalFilter

        # Users read a patch to judge it. A carriage return would hide the text before it.
        data = _RETURN.sub("\N{REPLACEMENT CHARACTER}".encode(), TerminalFilter()(data))
    write_stdout(data)
