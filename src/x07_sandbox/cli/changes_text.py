"""What `x07 run`, `diff`, `apply` and `undo` say of changes to files, and where they get their contents."""

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

from x07_sandbox.cli.console import put, say
from x07_sandbox.cli.denials_text import how
from x07_sandbox.cli.parser import named
from x07_sandbox.errors import SandboxError
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

_PIECE: Final = 1 << 16
_NAMED: Final = 8
_RULES: Final = {"fs.deny_hidden": "hidden", "fs.allow_symlinks": "a link"}
_RETURN: Final = re.compile(rb"\r(?!\n)")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The argument that all of them take; none of the run's files becomes their --report-out."""
    doc = "its name, or the beginning of it (default: the latest with changes)"
    parser.add_argument("run", nargs="?", type=named, metavar="RUN", help=doc)
    parser.set_defaults(writes=_touched)


def _touched(options: argparse.Namespace) -> list[Path]:
    """The host's files that a run has changed, or would change."""
    try:
        roots = find_saved(options.run).changes.roots
    except SandboxError:
        return []  # the verb says so itself, and writes nothing
    return [Path(path_of(root.root, change.name)) for root in roots for change in (*root.changes, *root.left_out)]


def tell(result: Result) -> None:
    """After a run: print what became of its changes."""
    for line in lines(result):
        say(line)


def lines(result: Result) -> list[str]:
    """Every deletion, then what was kept back or left out, then one line with what became of all the rest."""
    changes = result.changes
    if changes.state == "none":
        return []
    several = len({one.root for one in changes.names}) > 1
    if len(changes.names) < changes.added + changes.changed + changes.deleted:  # others may be of further roots
        several = find_saved(result.run).changes.several_roots
    deleted = [
        display_name(one.root, one.name, several_roots=several) for one in changes.names if one.action == "deleted"
    ]
    gone = "deleted" if changes.state == "applied" else "would be deleted"
    taken = {entry.name for entry in changes.left_out_entries if entry.take}
    word = "left out" if changes.left_out else "not allowed"
    kept_back = [denial for denial in result.denials if denial.action == "change" and denial.subject not in taken]
    refused = [f"{word}: {_because(denial)}{how(denial.how_to_allow, denial.field)}" for denial in kept_back]
    closing = [] if changes.left_out and not _counts(changes) else [_closing(changes)]
    return [*(f"{gone}: {name}" for name in deleted), *refused, *left_out(changes), *closing]


def _because(denial: Denial) -> str:
    return f"{denial.subject}: {denial.reason}" if denial.reason else denial.subject


def left_out(changes: Changes) -> list[str]:
    """One line with what was left out and can be applied, and the command for that; none where nothing can."""
    entries = [entry for entry in changes.left_out_entries if entry.take]
    if not entries:
        return []
    names = [f"{entry.name} ({', '.join(_RULES.get(rule, rule) for rule in entry.rules)})" for entry in entries]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"left out: {', '.join(names[:_NAMED])}{more}; to apply: {changes.apply_left_out}"]


def _counts(changes: Changes) -> dict[str, int]:
    counts = {"added": changes.added, "changed": changes.changed, "deleted": changes.deleted}
    return {word: count for word, count in counts.items() if count}


def _closing(changes: Changes) -> str:
    text = _in_words(_counts(changes)) or "changes"
    why = f" ({changes.reason})" if changes.reason else ""
    after = {
        "applied": "; x07 diff, x07 undo",
        "kept": "; x07 diff, x07 apply",
        "conflict": ": nothing was changed; x07 diff, x07 apply",
        "discarded": "",
    }
    return f"{text}: {changes.state}{why}{after[changes.state]}"


def summary(changes: ChangeSet, done: str) -> str:
    """What was done to how many."""
    counts = {word: changes.count(word) for word in ("added", "changed", "deleted")}
    return f"{_in_words(counts) or 'nothing to do'}: {done}"


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def list_deleted(changes: ChangeSet, *, back: bool = False) -> None:
    """Every name that goes. back: where these changes are taken back."""
    action, several = "added" if back else "deleted", changes.several_roots
    for root in changes.roots:
        for change in root.changes:
            if change.action == action and not change.is_root_folder:
                say(f"deleted: {display_name(root.root, change.name, several_roots=several)}")


def as_applied(kept: SavedChanges) -> SavedChanges:
    """The same, where what was left out and is applied by now is a change like the others. Raises HostError."""
    done = kept.done() if any(root.left_out for root in kept.changes.roots) else None
    return kept if not done else kept._replace(changes=with_later_applied(kept.changes, done))


def pieces(kept: SavedChanges) -> Iterator[bytes]:
    """The patch of a run's changes, many lines at a time: a million of them are not written one by one."""
    some = bytearray()
    for line in patch(kept.changes, _Before(kept), partial(_after, kept.folder / "data")):
        some += line
        if len(some) >= _PIECE:
            yield bytes(some)
            some.clear()
    if some:
        yield bytes(some)


def _after(path: Path, _root: str, _name: str, node: Node) -> bytes | None:
    """New contents, as they came."""
    if node.at is None or node.size > TEXT_MAX:
        return None
    with path.open("rb") as file:
        return os.pread(file.fileno(), node.size, node.at)


class _Before:
    """Old contents: from the host, if they are still there, else from what was kept to undo the changes."""

    def __init__(self, kept: SavedChanges) -> None:
        self._at: dict[tuple[str, str], tuple[Path, int]] = {}
        for place in kept.undos:
            with contextlib.suppress(OSError, ValueError):  # it cannot be undone
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
    """The bytes there, if they are those that are meant."""
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


def machine_form(changes: ChangeSet) -> bytes:
    """All of it as JSON, names as text that can be written anywhere."""
    import json

    def plain_names(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain_names(inner) for key, inner in value.items() if key != "at"}
        if isinstance(value, (list, tuple)):
            return [plain_names(inner) for inner in value]
        return printable(value) if isinstance(value, str) else value

    return json.dumps(plain_names(msgspec.to_builtins(changes)), indent=2).encode() + b"\n"


def print_bytes(data: bytes) -> None:
    """Whole lines to standard output; a terminal gets no control sequences. Raises OSError."""
    if sys.stdout.isatty():
        from x07_sandbox.runs.streams import TerminalFilter

        # Who reads a patch judges what it brings: what follows a carriage return would be shown in place of it.
        data = _RETURN.sub("\N{REPLACEMENT CHARACTER}".encode(), TerminalFilter()(data))
    put(data)
