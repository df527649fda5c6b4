"""`x07 diff`, `x07 apply` and `x07 undo`: show, apply and revert the changes of a run.

A root is a host folder that the policy lets the program modify. A refusal is a reason why a change is not allowed.
Changes that are not allowed are left out: saved, but applied only if a flag of `x07 apply` allows them.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Set as AbstractSet
from typing import Final

from msgspec.structs import replace

from x07_sandbox.cli.console import print_bytes, say
from x07_sandbox.cli.json_output import deliver, document_wanted
from x07_sandbox.cli.messages import add_run_argument, left_out, say_deleted, summary
from x07_sandbox.cli.outputs import changes_json
from x07_sandbox.cli.parser import add_document_flags, add_row, nonempty, switch
from x07_sandbox.files.changes import ChangeSet
from x07_sandbox.options import OF_APPLY
from x07_sandbox.sessions.patches import include_applied, patch_chunks
from x07_sandbox.sessions.refusals import apply_command, denials_and_entries
from x07_sandbox.sessions.result import Changes
from x07_sandbox.sessions.saved_changes import SavedChanges, command, find_saved, folder_names, has_commits, undo_saved
from x07_sandbox.sessions.selection import Grants, apply_selected, below, select_changes

_RUN_ID: Final = re.compile(r"\d[\d-]*", re.ASCII)
_TERMINAL_LINES: Final = 2000
_APPLY_EPILOG: Final = """x07 apply applies all changes or none: if a file on the host has changed since it was copied
into the VM, x07 apply changes nothing. If x07 apply is killed, the next x07 command completes the changes or reverts
them. x07 diff shows which changes the run left out, and which flag would apply each of them. Changes that are not
applied stay saved, and can be applied later. x07 apply --only PATH changes nothing outside PATH, except that it creates
the new folders around PATH. If a selected link leads through a link or folder whose change is not selected, x07 apply
changes nothing, and says what to select.

examples:
  x07 apply                        apply the changes of the latest run in this folder
  x07 apply --only src --only '*.md'
  x07 apply --skip .github --skip notes.txt
  x07 apply --skip /home/me/project/notes.txt
  x07 apply --allow-protected Jenkinsfile

exit code: 0 applied, or already applied; 125 a conflict, or a change that is not allowed; 2 no such run
"""
_DIFF_EPILOG: Final = """x07 diff prints a patch in git's format, with deletions first. It marks each change that is not
allowed, and says why. On a terminal, it stops after about 2000 lines. A word that consists of digits and hyphens is
RUN; write ./123 for a path.

examples:
  x07 diff --stat
  x07 diff src '*.md'
  x07 diff | less
  x07 diff --json | jq '.roots[].changes[] | .name'
"""
_UNDO_EPILOG: Final = """x07 undo reverts all changes or none: if a file was changed after the changes were applied, x07
undo reverts nothing. x07 apply can apply reverted changes again. If changes of one run were applied in several steps
(by the run, then by x07 apply), each x07 undo reverts the latest step.

examples:
  x07 undo
  x07 undo 1764064

exit code: 0 reverted; 125 a conflict; 2 no such run, or no changes of the run are applied
"""


def add_apply(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 apply`."""
    parser.epilog = _APPLY_EPILOG
    add_run_argument(parser)
    for row in OF_APPLY:
        add_row(parser, row)
    add_document_flags(parser, "print what was done, or the error, as one JSON object")
    parser.set_defaults(carry_out=_apply)


def _apply(options: argparse.Namespace) -> int:
    kept = find_saved(options.run, "apply")
    flags = {flag for flag in ("--allow-hidden", "--allow-symlinks") if getattr(options, flag[2:].replace("-", "_"))}
    grants = Grants(protected=tuple(options.allow_protected), flags=frozenset(flags))
    before = kept.done()
    applied = before if kept.applied else None
    changes = select_changes(kept.changes, options.skip, grants, only=options.only, applied=applied, notify=say)
    done = apply_selected(kept, changes, _say_waiting)
    if document_wanted(options) and deliver(changes_json(done), options):
        return 0
    before |= {(root.root, one.name) for root in changes.roots for one in root.changes}
    if done.roots or done.commits:
        say_deleted(done, _command(options, kept, "diff"))
        say(summary(done, f"applied; revert with {_command(options, kept, 'undo')}"))
    else:
        every = any(root.changes for root in changes.roots) or has_commits(changes)
        nothing = "already applied" if every else "nothing to apply"
        say(f"{nothing} in {folder_names(kept.changes)}")
    more = sum((root.root, one.name) not in before for root in kept.changes.roots for one in root.changes)
    if options.only and more:
        say(f"{more} more saved; apply with {_command(options, kept, 'apply')}")
    _say_left_out(kept.changes, before)
    return 0


def _say_waiting(path: str) -> None:
    say(f"waiting: another command is changing {path}")


def _command(options: argparse.Namespace, kept: SavedChanges, verb: str) -> str:
    """Return another command for the same run. It contains the run's id if the user gave one, or must give one."""
    return command(verb, kept.run, kept.roots if options.run is None else ())


def _say_left_out(kept: ChangeSet, applied: AbstractSet[tuple[str, str]]) -> None:
    """Print the changes that stay left out, and the command that applies them. applied: see `select_changes`."""
    if kept.all_or_nothing:
        return
    roots = [
        replace(root, refused=tuple(one for one in root.refused if (root.root, one.name) not in applied))
        for root in kept.roots
    ]
    _, entries = denials_and_entries(replace(kept, roots=tuple(roots)), built_in=True)
    for line in left_out(Changes(left_out_entries=entries, apply_left_out=apply_command(kept.run, entries))):
        say(line)


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 diff`."""
    parser.epilog = _DIFF_EPILOG
    add_run_argument(parser)
    doc = "show only PATH and what is below it: absolute, or relative to a folder granted to the run; may be a pattern"
    parser.add_argument("paths", nargs="*", type=nonempty, metavar="PATH", help=doc)
    switch(parser, "--stat", "print one line for each changed file, and for each new or deleted folder")
    add_document_flags(parser, "print all changes with digests as one JSON object")
    parser.set_defaults(carry_out=_diff)


def _diff(options: argparse.Namespace) -> int:
    if options.run is not None and not _RUN_ID.fullmatch(options.run):
        options.run, options.paths = None, [options.run, *options.paths]
    kept = include_applied(find_saved(options.run, "diff"))
    kept = kept._replace(changes=below(kept.changes, options.paths))
    if document_wanted(options) and deliver(changes_json(kept.changes), options):
        return 0
    lines = 0
    for chunk in patch_chunks(kept, stat=options.stat):
        print_bytes(chunk)
        lines += chunk.count(b"\n")
        if lines > _TERMINAL_LINES and sys.stdout.isatty():
            diff = " ".join([_command(options, kept, "diff"), *map(shlex.quote, options.paths)])
            say(f"stopped after {lines} lines; for a summary: {diff} --stat; for all lines: {diff} | less")
            break
    return 0


def add_undo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 undo`."""
    parser.epilog = _UNDO_EPILOG
    add_run_argument(parser)
    add_document_flags(parser, "print what was done, or the error, as one JSON object")
    parser.set_defaults(carry_out=_undo)


def _undo(options: argparse.Namespace) -> int:
    kept = find_saved(options.run, "undo")
    changes = undo_saved(kept, _say_waiting)
    if document_wanted(options) and deliver(changes_json(changes), options):
        return 0
    say_deleted(changes, _command(options, kept, "diff"), back=True)
    undo, apply = _command(options, kept, "undo"), _command(options, kept, "apply")
    then = f"to revert the earlier changes too: {undo}" if kept.undos else f"apply again with {apply}"
    say(summary(changes, f"reverted; {then}"))
    return 0
