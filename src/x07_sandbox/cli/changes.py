"""`x07 diff`, `x07 apply` and `x07 undo`: show, apply and revert the changes of a run.

A root is a host folder that the policy lets the program modify. A refusal is a reason why a change is not allowed.
Changes that are not allowed are left out: saved, but applied only if a flag of `x07 apply` allows them.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.cli.changes_text import (
    add_run_argument,
    changes_json,
    include_applied,
    left_out,
    patch_chunks,
    print_bytes,
    say_deleted,
    summary,
)
from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import deliver, document_wanted
from x07_sandbox.cli.parser import add_document_flags, nonempty, repeated, switch
from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.files.changes import display_name, parent_folders, path_of
from x07_sandbox.files.dependencies import applicable
from x07_sandbox.files.protected import Protection
from x07_sandbox.runs.refusals import apply_command, denials_and_entries
from x07_sandbox.runs.result import Changes
from x07_sandbox.runs.saved_changes import apply_saved, find_saved, undo_saved

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from x07_sandbox.files.changes import ChangeSet, Refused, RootChanges

_LISTED: Final = 10
_APPLY_EPILOG: Final = """x07 apply applies all changes or none: if a file on the host has changed since it was copied
into the VM, x07 apply changes nothing. If x07 apply is killed, the next x07 command completes the changes or reverts
them. x07 diff shows which changes the run left out, and which flag would apply each of them. To apply a different
selection of changes, run x07 undo first.

examples:
  x07 apply                        apply the changes of the latest run
  x07 apply --skip .github --skip notes.txt
  x07 apply --skip /home/me/project/notes.txt
  x07 apply --allow-protected Jenkinsfile

exit code: 0 applied, or already applied; 125 a conflict, or a change that is not allowed; 2 no such run
"""
_DIFF_EPILOG: Final = """x07 diff prints a patch in git's format, with deletions first. It marks each change that is not
allowed, and says why.

examples:
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
    repeated(parser, "--skip", "PATH", "skip changes to PATH (absolute, or relative to a folder granted to the run)")
    repeated(
        parser,
        "--allow-protected",
        "PATTERN",
        "also apply changes to protected names such as .git or Jenkinsfile",
        type=nonempty,
    )
    switch(parser, "--allow-hidden", "also apply changes to dotfiles")
    switch(parser, "--allow-symlinks", "also apply symbolic links")
    add_document_flags(parser, "print what was done, or the error, as one JSON object")
    parser.set_defaults(carry_out=_apply)


def _apply(options: argparse.Namespace) -> int:
    kept = find_saved(options.run)
    flags = {flag for flag in ("--allow-hidden", "--allow-symlinks") if getattr(options, flag[2:].replace("-", "_"))}
    grants = Grants(protected=tuple(options.allow_protected), flags=frozenset(flags))
    before = set[tuple[str, str]]() if kept.changes.all_or_nothing else kept.done()
    changes = select_changes(kept.changes, options.skip, grants, applied=before if kept.applied else None)
    later = kept.applied and any(root.left_out for root in kept.changes.roots) and grants.any
    done = apply_saved(kept, changes, lambda path: say(f"waiting: another command is changing {path}"), later=later)
    if document_wanted(options) and deliver(changes_json(changes if done.roots else done), options):
        return 0
    if done.roots:
        say_deleted(changes)
    nothing = "already applied" if any(root.changes for root in changes.roots) else "nothing to apply"
    say(summary(changes, "applied; revert with x07 undo") if done.roots else nothing)
    _say_left_out(kept.changes, before | {(root.root, one.name) for root in changes.roots for one in root.changes})
    return 0


class Grants(NamedTuple):
    """Flags of `x07 apply` that allow refused changes. protected: values of --allow-protected. flags: other flags."""

    protected: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        """Whether any of these flags was given."""
        return bool(self.protected or self.flags)

    def is_allowed(self, root: str) -> Callable[[Refused], bool]:
        """Return a function that tells whether these flags allow a refused change in *root*."""
        protection = Protection(root, allowed=self.protected)

        def is_let(refusal: Refused) -> bool:
            if refusal.rule == "protected":
                return protection.is_allowed(refusal.name)
            return bool(refusal.flag) and refusal.flag in self.flags

        return is_let


NO_GRANTS: Final = Grants()


def select_changes(
    changes: ChangeSet,
    skip: Sequence[str],
    grants: Grants = NO_GRANTS,
    *,
    applied: AbstractSet[tuple[str, str]] | None = None,
) -> ChangeSet:
    """Return the changes to apply: those not in *skip*, and changes that were left out and that *grants* allows.

    A folder that contains a skipped name is kept, and a message says so. skip: names below a root, or absolute paths.
    applied: root and name of each change applied earlier. With *applied* and *grants*, only left-out changes return.
    Raises UsageError, and RefusedError for changes that are not allowed.
    """
    roots = changes.roots
    if not changes.all_or_nothing:
        roots = tuple(_with_left_out(root, grants, applied) for root in roots)
        was_left_out = any(root.left_out for root in changes.roots)
        if grants.any and was_left_out and not any(root.left_out for root in roots):
            raise _nothing_allowed(changes, grants)
    parts = [_without(root, skip, grants, several_roots=changes.several_roots) for root in roots]
    out = [(root.root, one.name) for root in changes.roots for one in root.left_out]
    out += [(root.root, one.name) for root in changes.roots for one in root.refused]
    unused = {word for word in skip if not any(_covers(word, root, name) for root, name in out)}
    if unused := unused.difference(*(used for _, used in parts)):
        raise UsageError(f"cannot skip {min(unused)}", "no change has this name", "See x07 diff")
    return replace(changes, roots=tuple(replace(root, left_out=()) for root, _ in parts))


def _with_left_out(root: RootChanges, grants: Grants, applied: AbstractSet[tuple[str, str]] | None) -> RootChanges:
    """Return *root* without refusals, and with those left-out changes added that *grants* allows."""
    is_allowed, done = grants.is_allowed(root.root), applied or set()
    more = applicable(root, lambda one: (root.root, one.name) in done or is_allowed(one)) if grants.any else ()
    alone = applied is not None and grants.any
    every = [*more] if alone else sorted((*root.changes, *more), key=lambda change: change.name)
    changes = [change for change in every if not (alone and (root.root, change.name) in done)]
    missing = root.missing and not (alone and root.changes)  # otherwise the folder exists by now
    return replace(root, changes=tuple(changes), missing=missing, refused=(), left_out=more)


def _nothing_allowed(changes: ChangeSet, grants: Grants) -> RefusedError:
    """Return the error for flags that allow none of the changes left out."""
    left = [
        (root.root, refusal)
        for root in changes.roots
        for refusal in root.refused
        if not grants.is_allowed(root.root)(refusal)
    ]
    return _refused(left, "See x07 diff, and give a flag for each reason", several_roots=changes.several_roots)


def _refused(left: Sequence[tuple[str, Refused]], fix: str, *, several_roots: bool) -> RefusedError:
    """Return the error for changes that are not allowed, given as pairs of a root and a refusal."""
    lines = [f"{display_name(root, one.name, several_roots=several_roots)} ({one.why})" for root, one in left[:_LISTED]]
    more = f", and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
    return RefusedError("cannot apply the changes", "; ".join(lines) + more, fix)


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


def _without(
    root: RootChanges, skip: Sequence[str], grants: Grants, *, several_roots: bool
) -> tuple[RootChanges, set[str]]:
    """Return *root* without the skipped changes, and the entries of *skip* that matched a change."""
    names = {change.name for change in root.changes} | {refusal.name for refusal in root.refused}
    by_word = {word: {name for name in names if _covers(word, root.root, name)} for word in skip}
    skipped = set[str]().union(*by_word.values())
    # Skipped files that exist stay, whether they were copied in or not, and so do the folders around these files.
    staying = [change.name for change in root.changes if change.name in skipped and change.before is not None]
    words = {word: parent_folders([word.rstrip("/").removeprefix(f"{root.root}/")]) for word in skip}
    holding = parent_folders(staying).union(*words.values()) & _removed_folders(root) - skipped
    is_allowed = grants.is_allowed(root.root)
    left = [(root.root, one) for one in root.refused if one.name not in skipped | holding and not is_allowed(one)]
    if left:
        raise _refused(left, "Leave them out with --skip PATH", several_roots=several_roots)
    for name in sorted(holding):
        say(f"kept because it contains skipped files: {display_name(root.root, name, several_roots=several_roots)}")
    changes = [change for change in root.changes if change.name not in skipped | holding]
    used = {word for word in skip if by_word[word] or words[word] & holding}
    return replace(root, changes=tuple(changes), refused=()), used


def _removed_folders(root: RootChanges) -> set[str]:
    """Return the names of folders that are deleted or replaced by a file or a link."""
    return {
        change.name
        for change in root.changes
        if change.before is not None and change.before.kind == "folder"
        if change.after is None or change.after.kind != "folder"
    }


def _covers(word: str, root: str, name: str) -> bool:
    """Whether *word* is *name* below *root*, or a folder above *name*. The root's last part stands for the root."""
    if word.startswith("/"):
        path, above = path_of(root, name), word.rstrip("/")
        return path == above or path.startswith(f"{above}/")
    above = word.rstrip("/")
    return above in {name, name or posixpath.basename(root)} or name.startswith(f"{above}/")


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 diff`."""
    parser.epilog = _DIFF_EPILOG
    add_run_argument(parser)
    add_document_flags(parser, "print all changes with digests as one JSON object")
    parser.set_defaults(carry_out=_diff)


def _diff(options: argparse.Namespace) -> int:
    kept = include_applied(find_saved(options.run))
    if document_wanted(options) and deliver(changes_json(kept.changes), options):
        return 0
    for chunk in patch_chunks(kept):
        print_bytes(chunk)
    return 0


def add_undo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 undo`."""
    parser.epilog = _UNDO_EPILOG
    add_run_argument(parser)
    add_document_flags(parser, "print what was done, or the error, as one JSON object")
    parser.set_defaults(carry_out=_undo)


def _undo(options: argparse.Namespace) -> int:
    kept = find_saved(options.run)
    changes = undo_saved(kept, lambda path: say(f"waiting: another command is changing {path}"))
    if document_wanted(options) and deliver(changes_json(changes), options):
        return 0
    say_deleted(changes, back=True)
    then = "to revert the earlier changes too: x07 undo" if kept.undos else "apply again with x07 apply"
    say(summary(changes, f"reverted; {then}"))
    return 0
