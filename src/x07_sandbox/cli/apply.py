"""`x07 apply`: apply a run's saved changes."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.cli.changes_text import add_run, left_out, list_deleted, machine_form, summary
from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import deliver, wanted
from x07_sandbox.cli.parser import add_document_flags, named, repeated, switch
from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.files.changes import display_name, parent_folders, path_of
from x07_sandbox.files.dependencies import applicable
from x07_sandbox.files.protected import Protection
from x07_sandbox.runs.refusals import apply_command, denials_and_entries
from x07_sandbox.runs.result import Changes
from x07_sandbox.runs.saved_changes import apply_saved, find_saved

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from x07_sandbox.files.changes import ChangeSet, Refused, RootChanges

_TOLD_MAX: Final = 10
_EPILOG: Final = """All or nothing: where a name is no more as it was copied into the machine, nothing is changed. A
kill at any moment leaves the old files or the new ones, once the next x07 command has run. Where a part is applied
already, another needs x07 undo first. What a run left out needs the flag for its reason: see x07 diff. If the rest is
applied already, it has an undo of its own.

examples:
  x07 apply                        the latest run's
  x07 apply --skip .github --skip notes.txt
  x07 apply --skip /home/me/project/notes.txt
  x07 apply --allow-protected Jenkinsfile

exit code: 0 done, or done before; 125 a conflict, or names that may not be changed; 2 no such run
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("apply", help=help, description="Do what a run has changed.", epilog=_EPILOG)
    add_run(parser)
    repeated(parser, "--skip", "PATH", "leave a name below a root, or a path, out with all that is below it")
    repeated(parser, "--allow-protected", "PATTERN", "as x07 run has it", type=named)
    switch(parser, "--allow-hidden", "apply also names that begin with a dot")
    switch(parser, "--allow-symlinks", "apply also symbolic links")
    add_document_flags(parser, "what was done, as one JSON object; errors too")
    parser.set_defaults(carry_out=_apply)


def _apply(options: argparse.Namespace) -> int:
    kept = find_saved(options.run)
    flags = {flag for flag in ("--allow-hidden", "--allow-symlinks") if getattr(options, flag[2:].replace("-", "_"))}
    grants = Grants(protected=tuple(options.allow_protected), flags=frozenset(flags))
    before = set[tuple[str, str]]() if kept.changes.all_or_nothing else kept.done()
    changes = chosen(kept.changes, options.skip, grants=grants, applied=before if kept.applied else None)
    later = kept.applied and any(root.left_out for root in kept.changes.roots) and grants.any
    done = apply_saved(kept, changes, lambda path: say(f"waiting: another command changes {path}"), later=later)
    if wanted(options) and deliver(machine_form(changes if done.roots else done), options):
        return 0
    if done.roots:
        list_deleted(changes)
    there = "all of it is there already" if any(root.changes for root in changes.roots) else "nothing is left to apply"
    say(summary(changes, "applied; x07 undo") if done.roots else there)
    _tell_left_out(kept.changes, before | {(root.root, one.name) for root in changes.roots for one in root.changes})
    return 0


class Grants(NamedTuple):
    """What the user lets be applied in spite of a refusal. protected: patterns; flags: others of `x07 apply`."""

    protected: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        """Whether there is one at all."""
        return bool(self.protected or self.flags)

    def is_overridden(self, root: str) -> Callable[[Refused], bool]:
        """Return what tells whether a refusal in that root is overruled."""
        protection = Protection(root, allowed=self.protected)

        def is_let(refusal: Refused) -> bool:
            if refusal.rule == "protected":
                return protection.is_allowed(refusal.name)
            return bool(refusal.flag) and refusal.flag in self.flags

        return is_let


def chosen(
    changes: ChangeSet,
    skip: Sequence[str],
    allow_protected: Sequence[str] = (),
    *,
    grants: Grants | None = None,
    applied: AbstractSet[tuple[str, str]] | None = None,
) -> ChangeSet:
    """The set without what is skipped; folders that hold some of it stay, and a line says so.

    skip: names below a root, or absolute paths. applied: what is applied already, by root and name, so that what
    *grants* lets of what was left out goes alone. Raises UsageError, and RefusedError for what may not be done.
    """
    grants = grants or Grants(protected=tuple(allow_protected))
    roots = changes.roots
    if not changes.all_or_nothing:
        roots = tuple(_with_left_out(root, grants, applied) for root in roots)
        was_left_out = any(root.left_out for root in changes.roots)
        if grants.any and was_left_out and not any(root.left_out for root in roots):
            raise _nothing_let(changes, grants)
    parts = [_without(root, skip, grants, several_roots=changes.several_roots) for root in roots]
    out = [(root.root, one.name) for root in changes.roots for one in root.left_out]
    out += [(root.root, one.name) for root in changes.roots for one in root.refused]
    unused = {word for word in skip if not any(_covers(word, root, name) for root, name in out)}
    if unused := unused.difference(*(used for _, used in parts)):
        raise UsageError("cannot skip", f"nothing that was changed is called {min(unused)}", "See x07 diff")
    return replace(changes, roots=tuple(replace(root, left_out=()) for root, _ in parts))


def _with_left_out(root: RootChanges, grants: Grants, applied: AbstractSet[tuple[str, str]] | None) -> RootChanges:
    """The root with what is let of what was left out, as changes and as left_out, and without reasons."""
    is_overridden, done = grants.is_overridden(root.root), applied or set()
    more = applicable(root, lambda one: (root.root, one.name) in done or is_overridden(one)) if grants.any else ()
    alone = applied is not None and grants.any
    every = [*more] if alone else sorted((*root.changes, *more), key=lambda change: change.name)
    changes = [change for change in every if not (alone and (root.root, change.name) in done)]
    missing = root.missing and not (alone and root.changes)  # else it is there by now
    return replace(root, changes=tuple(changes), missing=missing, refused=(), left_out=more)


def _nothing_let(changes: ChangeSet, grants: Grants) -> RefusedError:
    """The error where flags were given that let nothing of what was left out."""
    left = [
        f"{display_name(root.root, refusal.name, several_roots=changes.several_roots)}: {refusal.why}"
        for root in changes.roots
        for refusal in root.refused
        if not grants.is_overridden(root.root)(refusal)
    ]
    return _refused(left, "See x07 diff, and give a flag for each reason")


def _refused(left: list[str], fix: str) -> RefusedError:
    more = f", and {len(left) - _TOLD_MAX} more" if len(left) > _TOLD_MAX else ""
    return RefusedError("cannot apply the changes", "; ".join(left[:_TOLD_MAX]) + more, fix)


def _tell_left_out(kept: ChangeSet, applied: AbstractSet[tuple[str, str]]) -> None:
    """Say what stays left out, and the command that applies it. applied: by root and name."""
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
    """What is left of a root; and which of *skip* are of any use."""
    told = {change.name for change in root.changes} | {refusal.name for refusal in root.refused}
    by_word = {word: {name for name in told if _covers(word, root.root, name)} for word in skip}
    skipped = set[str]().union(*by_word.values())
    # What is skipped and is there stays, also what was not copied in, and with it the folders that it lies in.
    staying = [change.name for change in root.changes if change.name in skipped and change.before is not None]
    words = {word: parent_folders([word.rstrip("/").removeprefix(f"{root.root}/")]) for word in skip}
    holding = parent_folders(staying).union(*words.values()) & _ended(root) - skipped
    is_overridden = grants.is_overridden(root.root)
    left = [refusal for refusal in root.refused if refusal.name not in skipped | holding and not is_overridden(refusal)]
    if left:
        told_of = [
            f"{display_name(root.root, refusal.name, several_roots=several_roots)}: {refusal.why}" for refusal in left
        ]
        raise _refused(told_of, "Leave them out with --skip PATH")
    for name in sorted(holding):
        say(f"stays, since it holds what is skipped: {display_name(root.root, name, several_roots=several_roots)}")
    changes = [change for change in root.changes if change.name not in skipped | holding]
    used = {word for word in skip if by_word[word] or words[word] & holding}
    return replace(root, changes=tuple(changes), refused=()), used


def _ended(root: RootChanges) -> set[str]:
    """Folders that are to be none any more."""
    return {
        change.name
        for change in root.changes
        if change.before is not None and change.before.kind == "folder"
        if change.after is None or change.after.kind != "folder"
    }


def _covers(word: str, root: str, name: str) -> bool:
    """Whether *word* is that name, or one above it. The root itself has its last part as a name, too."""
    if word.startswith("/"):
        path, above = path_of(root, name), word.rstrip("/")
        return path == above or path.startswith(f"{above}/")
    above = word.rstrip("/")
    return above in {name, name or posixpath.basename(root)} or name.startswith(f"{above}/")
