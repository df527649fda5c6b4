"""`x07 apply`: apply a run's saved changes."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.cli.changed import add_run, list_deleted, machine_form, summary
from x07_sandbox.cli.console import say
from x07_sandbox.cli.documents import deliver, wanted
from x07_sandbox.cli.usage import add_document_flags, named, repeated
from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.files.changes import called, folders_above, path_of
from x07_sandbox.files.protected import Protection
from x07_sandbox.runs.kept import do, find

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from x07_sandbox.files.changes import ChangeSet, RootChanges

_EPILOG: Final = """All or nothing: where a name is no more as it was copied into the machine, nothing is changed. A
kill at any moment leaves the old files or the new ones, once the next x07 command has run. Where a part is applied
already, another needs x07 undo first.

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
    add_document_flags(parser, "what was done, as one JSON object; errors too")
    parser.set_defaults(carry_out=_apply)


def _apply(options: argparse.Namespace) -> int:
    kept = find(options.run)
    changes = chosen(kept.changes, options.skip, options.allow_protected)
    done = do(kept, changes, lambda path: say(f"waiting: another command changes {path}"))
    if wanted(options) and deliver(machine_form(changes if done.roots else done), options):
        return 0
    if done.roots:
        list_deleted(changes)
    there = "all of it is there already" if any(root.changes for root in changes.roots) else "nothing is left to apply"
    say(summary(changes, "applied; x07 undo") if done.roots else there)
    return 0


def chosen(changes: ChangeSet, skip: Sequence[str], allow_protected: Sequence[str]) -> ChangeSet:
    """The set without what is skipped; folders that hold some of it stay, and a line says so.

    skip: names below a root, or absolute paths. Raises UsageError, and RefusedError for what may not be done.
    """
    parts = [_without(root, skip, allow_protected, of_several=changes.of_several) for root in changes.roots]
    if unused := set(skip).difference(*(used for _, used in parts)):
        raise UsageError("cannot skip", f"nothing that was changed is called {min(unused)}", "See x07 diff")
    return replace(changes, roots=tuple(root for root, _ in parts))


def _without(
    root: RootChanges, skip: Sequence[str], allow_protected: Sequence[str], *, of_several: bool
) -> tuple[RootChanges, set[str]]:
    """What is left of a root; and which of *skip* are of any use."""
    told = {change.name for change in root.changes} | {refusal.name for refusal in root.refused}
    by_word = {word: {name for name in told if _covers(word, root.root, name)} for word in skip}
    skipped = set[str]().union(*by_word.values())
    # What is skipped and is there stays, also what was not copied in, and with it the folders that it lies in.
    staying = [change.name for change in root.changes if change.name in skipped and change.before is not None]
    words = {word: folders_above([word.rstrip("/").removeprefix(f"{root.root}/")]) for word in skip}
    holding = folders_above(staying).union(*words.values()) & _ended(root) - skipped
    protection = Protection(root.root, allowed=allow_protected)
    left = [
        refusal
        for refusal in root.refused
        if refusal.name not in skipped | holding and not (refusal.rule == "protected" and protection.lets(refusal.name))
    ]
    if left:
        told_of = [f"{called(root.root, refusal.name, of_several=of_several)}: {refusal.why}" for refusal in left[:10]]
        more = f", and {len(left) - 10} more" if len(left) > 10 else ""  # noqa: PLR2004 - as many as above
        raise RefusedError("cannot apply the changes", "; ".join(told_of) + more, "Leave them out with --skip PATH")
    for name in sorted(holding):
        say(f"stays, since it holds what is skipped: {called(root.root, name, of_several=of_several)}")
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
