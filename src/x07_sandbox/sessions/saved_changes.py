"""Saved changes of runs: finding, applying and undoing them, and recovery after a kill.

`runs/RUN/changes/` holds `changes.json` and `data` (see files/changes) as the guest reported them. While x07 applies
these changes, `runs/.applying/` contains a file named after the run. Left-out changes that are applied later get a
folder `changes/later-N/` with a journal and an undo set. `x07 undo` starts with the last such folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.errors import Command, HostError, RefusedError, SandboxError, UsageError, escaped
from x07_sandbox.host.locks import OnWait, is_locked, lock_fd_held, lock_for_removal
from x07_sandbox.host.paths import private_dir, read_bounded, state_dir
from x07_sandbox.policy.guest import is_below
from x07_sandbox.records.runs import APPLYING, RUN_NAME, all_runs, find_run, runs_dir, runs_with
from x07_sandbox.sessions.result import ChangedName, Changes, ChangesState, NewCommits

if TYPE_CHECKING:
    from x07_sandbox.files.changes import ChangeSet, Commits
    from x07_sandbox.files.repository import Repository

_SAVED: Final = "changes/changes.json"
_LATER: Final = "later-"
_FIX: Final = ("To let a program change a folder: ", Command("x07 run --workdir DIR ..."))
_RUN_AGAIN: Final = "Run the program again"
_CHANGES_MAX: Final = 1 << 30
_LISTED: Final = 3
_NAMES_MAX: Final = 1000  # in a result, deletions excepted; all names are in the run's folder


class SavedChanges(NamedTuple):
    """The changes of one run. folder: `runs/RUN/changes`."""

    run: str
    folder: Path
    changes: ChangeSet

    @property
    def roots(self) -> list[str]:
        """The folders that the program might change."""
        return [root.root for root in self.changes.roots]

    @property
    def applied(self) -> bool:
        """Whether the changes of the run, apart from the left-out changes, are applied."""
        return (self.folder / "undo").is_dir()

    @property
    def undos(self) -> list[Path]:
        """The folders whose changes can be undone, in the order in which the changes were applied."""
        return [place for place in (self.folder, *_later(self.folder)) if (place / "undo").is_dir()]

    @property
    def has_fetched(self) -> bool:
        """Whether the repository has the commits of the run. Raises HostError."""
        if not has_commits(self.changes):
            return False
        with _repository(self.changes) as (repository, commits):
            return repository.is_fetched(commits, self.run)

    def done(self) -> set[tuple[str, str]]:
        """Return the root and name of each applied change. Raises HostError."""
        from x07_sandbox.files.staging import undo_entries

        with _validated(self.run):
            return {name for place in self.undos for name in undo_entries(place)}


def _later(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_LATER}*"), key=lambda path: int(path.name.removeprefix(_LATER)))


def find_saved(run: str | None, verb: str = "diff") -> SavedChanges:
    """Return the changes of the run whose id is or starts with *run*. Raises UsageError.

    None stands for the latest run with changes in this folder (`is_here`); for the verb `undo`, for the latest one
    with applied changes to undo, if there is one. Runs whose changes are damaged count only if there are no others.
    """
    names = runs_with(_SAVED) if run is None else []
    elsewhere, unapplied = list[SavedChanges](), None
    for name in reversed(names):
        try:
            saved = _read(all_runs() / name)
        except UsageError:
            continue
        if not is_here(saved.roots):
            elsewhere.append(saved)
        elif verb != "undo" or _can_undo(saved):
            return saved
        else:
            unapplied = unapplied or saved
    if unapplied is not None:
        return unapplied
    if elsewhere:
        more = f", and {len(elsewhere) - _LISTED} earlier runs" if len(elsewhere) > _LISTED else ""
        named = "; ".join(f"{one.run} in {folder_names(one.changes)}" for one in elsewhere[:_LISTED])
        why = f"no run changed files in this folder. Runs elsewhere: {named}{more}"
        fix = ("Give the id of the run: ", Command(f"x07 {verb} {elsewhere[0].run}"))
        raise UsageError(f"cannot choose a run for x07 {verb}", why, fix)
    return _read(find_run(run, _SAVED, "changes to files", _FIX, action="changed any files"))


def _can_undo(saved: SavedChanges) -> bool:
    """Return whether there is something to undo; changes that were in effect before have an empty undo set."""
    try:
        return bool(saved.undos and saved.done()) or saved.has_fetched
    except HostError:  # `undo_saved` raises it again
        return True


def is_here(roots: Iterable[str]) -> bool:
    """Return whether the current folder is one of *roots*, lies in one, or contains one.

    Every folder lies in `/`, so there the answer is False, as in a folder that was removed.
    """
    try:
        here = os.getcwd()  # noqa: PTH109 - without links
    except OSError:
        return False
    real = map(os.path.realpath, roots if here != "/" else ())
    return any(here == root or is_below(here, root) or is_below(root, here) for root in real)


def command(verb: str, run: str, roots: Iterable[str]) -> str:
    """Return the command for a run that may change *roots*, with the run's id unless x07 would choose this run."""
    with contextlib.suppress(UsageError):
        if is_here(roots) and find_saved(None, verb).run == run:
            return f"x07 {verb}"
    return f"x07 {verb} {run}"


def folder_names(changes: ChangeSet) -> str:
    """Return the names of the folders that *changes* changes."""
    names = [escaped(root.root) for root in changes.roots if root.changes or root.left_out or root.refused]
    names += [] if names or changes.commits is None else [escaped(changes.commits.root)]
    more = f" and {len(names) - _LISTED} more folders" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def summarize(
    changes: ChangeSet, state: ChangesState, reason: str = "", *, names_max: int | None = _NAMES_MAX
) -> Changes:
    """Return a summary of *changes* for a result. names_max: limit of the names, deletions excepted."""
    from x07_sandbox.files.changes import in_json

    every = [(root.root, change) for root in changes.roots for change in root.changes]
    every.sort(key=lambda one: one[1].action != "deleted")
    deletions = sum(change.action == "deleted" for _, change in every)
    names = tuple(
        ChangedName(root=escaped(root), name=name, action=change.action, name_base64=raw)
        for root, change in every[: None if names_max is None else max(names_max, deletions)]
        for name, raw in (in_json(change.name),)
    )
    added, changed, deleted = map(changes.count, ("added", "changed", "deleted"))
    return Changes(
        state=state,
        reason=reason,
        names=names,
        added=added,
        changed=changed,
        deleted=deleted,
        commits=_new_commits(changes),
    )


def has_commits(changes: ChangeSet) -> bool:
    """Return whether there are commits that can be fetched."""
    return changes.commits is not None and bool(changes.commits.branches)


def _new_commits(changes: ChangeSet) -> tuple[NewCommits, ...]:
    if changes.commits is None or not has_commits(changes):
        return ()
    from x07_sandbox.files.repository import refs_of

    refs = refs_of(changes.commits, changes.run)
    rows = zip(changes.commits.branches, refs.items(), strict=True)
    return tuple(NewCommits(branch=branch, commit=oid, ref=ref) for branch, (ref, oid) in rows)


def _read(path: Path) -> SavedChanges:
    from x07_sandbox.files.changes import decode

    name, folder = path.name, path / "changes"
    try:
        changes = decode(read_bounded(folder / "changes.json", "list of changes", _CHANGES_MAX))
    except ValueError as exc:
        raise UsageError(f"cannot use the changes of run {name}", f"they are damaged ({exc})", _RUN_AGAIN) from exc
    return SavedChanges(run=name, folder=folder, changes=changes)


def apply_saved(saved: SavedChanges, changes: ChangeSet, on_wait: OnWait, *, later: bool = False) -> ChangeSet:
    """Apply *changes*, which are all or some of the changes in *saved*, and fetch their commits, or do neither.

    Raises ConflictError, HostError.

    later: whether *changes* were left out when x07 applied the other changes. x07 then makes a separate undo set.
    """
    from x07_sandbox.files.apply import apply
    from x07_sandbox.files.inode import ConflictError, conflict_error

    lock = _locked(saved.folder, on_wait) if later else contextlib.nullcontext()
    with lock, _validated(saved.run), (saved.folder / "data").open("rb") as data, _fetched(saved, changes):
        if not any(root.changes for root in changes.roots):
            return replace(changes, roots=(), commits=None)
        place = saved.folder / f"{_LATER}{len(saved.undos)}" if later else saved.folder
        try:
            done = apply(changes, data.fileno(), place, on_wait=on_wait, around=applying(saved.run))
        except ConflictError as exc:
            review = command("diff", saved.run, saved.roots)
            raise (conflict_error(exc.names, exc.count, review) if exc.names else exc) from None
        if later and not done.roots:
            import shutil

            shutil.rmtree(place)  # everything was in effect already: there is nothing to undo
        return done


def undo_saved(saved: SavedChanges, on_wait: Callable[[str], None]) -> ChangeSet:
    """Undo the changes that were applied last, and with the first ones the references to the run's commits.

    Return what was undone. Raises UsageError, ConflictError, HostError.
    """
    what, run = f"cannot undo the changes of run {saved.run}", saved.run
    with _locked(saved.folder, on_wait), _validated(run), applying(run), contextlib.ExitStack() as stack:
        fetched = saved.has_fetched
        if not saved.undos and not fetched:  # checked under the lock
            raise UsageError(what, "they are not applied", ("To see them: ", Command(f"x07 diff {run}")))
        files = partial(_undo_files, saved, what, on_wait) if saved.undos else partial(replace, saved.changes, roots=())
        if not fetched or len(saved.undos) > 1:
            return files()
        repository, commits = stack.enter_context(_repository(saved.changes))
        refs = repository.own_refs(commits, run)
        done = files()
        repository.forget(refs)
        return replace(done, commits=commits)


def _undo_files(saved: SavedChanges, what: str, on_wait: Callable[[str], None]) -> ChangeSet:
    import shutil

    from x07_sandbox.files.apply import apply
    from x07_sandbox.files.changes import decode
    from x07_sandbox.files.inode import ConflictError, undo_conflict_error
    from x07_sandbox.files.staging import UNDOING

    folder = saved.undos[-1]
    place = folder / "undo"
    changes = decode(read_bounded(place / "changes.json", "list of changes", _CHANGES_MAX))
    with (place / "data").open("rb") as data:
        try:
            # The replaced content is saved already, so no undo set is needed, and a full disk does not matter.
            done = apply(changes, data.fileno(), folder / UNDOING, on_wait=on_wait)
        except ConflictError as exc:
            review = command("diff", saved.run, saved.roots)
            raise (undo_conflict_error(exc, what, review) if exc.names else exc) from None
        except HostError as exc:
            raise HostError(what, exc.why, exc.fix) from exc
    shutil.rmtree(folder / UNDOING)
    return done


@contextlib.contextmanager
def _repository(changes: ChangeSet) -> Iterator[tuple[Repository, Commits]]:
    """Yield the repository of the commits in *changes*, and these. Raises HostError."""
    from x07_sandbox.files.repository import Repository  # few runs get one

    assert changes.commits is not None  # the caller has checked it
    try:
        with Repository(changes.commits.root) as repository:
            yield repository, changes.commits
    except (UsageError, RefusedError) as exc:
        raise HostError(exc.what, exc.why, exc.fix) from exc


@contextlib.contextmanager
def _fetched(saved: SavedChanges, changes: ChangeSet) -> Iterator[None]:
    """Fetch any commits, and revert that if the context ends by an exception. Raises HostError."""
    if not has_commits(changes):
        yield
        return
    from x07_sandbox.files.repository import BUNDLE

    with _repository(changes) as (repository, commits):
        before = repository.is_fetched(commits, saved.run)
        try:
            repository.fetch(commits, saved.run, saved.folder / BUNDLE)
        except HostError as exc:
            only = Command(f"x07 apply {saved.run} --only .")
            raise HostError("cannot apply the commits", exc.why, ("To apply only the files: ", only)) from exc
        try:
            yield
        except BaseException:
            if not before:
                repository.forget(repository.own_refs(commits, saved.run))
            raise


@contextlib.contextmanager
def _locked(folder: Path, on_wait: OnWait) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with lock_fd_held(fd, on_wait=lambda: on_wait(str(folder))):
        yield


@contextlib.contextmanager
def _validated(run: str) -> Iterator[None]:
    try:
        yield
    except ValueError as exc:
        raise HostError(f"cannot use the changes of run {run}", f"they are damaged ({exc})", _RUN_AGAIN) from exc


@contextlib.contextmanager
def applying(run: str) -> Iterator[None]:
    """Mark a run's changes as being applied, so that `recover_all` finds them after a kill. The caller has the lock."""
    marker = private_dir(all_runs() / APPLYING) / run
    marker.touch(mode=0o600)
    try:
        yield
    finally:
        # After a failed rollback the marker stays, and the next command retries.
        folder = marker.parent.parent / run / "changes"
        if not _pending(folder):
            marker.unlink(missing_ok=True)


def _places(folder: Path) -> list[Path]:
    from x07_sandbox.files.staging import UNDOING

    every = (folder, *_later(folder))
    return [place for part in every for place in (part, part / UNDOING) if place.is_dir()]


def _pending(folder: Path) -> bool:
    from x07_sandbox.files.journal import pending

    return any(map(pending, _places(folder)))


def recover_all(progress: Callable[[str], None]) -> None:
    """Roll back or finish changes that killed commands were applying. Report failures to *progress*, to retry later."""
    root = runs_dir(state_dir())
    try:
        names = [path.name for path in (root / APPLYING).iterdir()]
    except OSError:
        return
    from x07_sandbox.files.apply import recover

    for name in names:
        folder = root / name / "changes"
        if not RUN_NAME.fullmatch(name) or not folder.is_dir():
            (root / APPLYING / name).unlink(missing_ok=True)
            continue
        if any(map(is_locked, _places(folder))):  # a process is applying
            continue
        try:
            for place in _places(folder):
                recover(place)
        except SandboxError as exc:
            progress(f"{exc} The journal is below {folder}.")
            continue
        with contextlib.suppress(OSError), lock_for_removal(folder) as free:  # not free while another process applies
            if free and not _pending(folder):
                (root / APPLYING / name).unlink(missing_ok=True)
