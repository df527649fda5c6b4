"""Open sandboxes of this user, also those of other processes."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import ArgumentError, Command, UsageError
from x07_sandbox.host.locks import file_lock, is_locked
from x07_sandbox.host.paths import private_dir, state_dir
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.records.runs import SANDBOX, SOCKET, all_runs, described, is_named, record_of, runs_with
from x07_sandbox.reports.sandboxes import SandboxInfo

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping
    from pathlib import Path

    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.held import HeldSandbox

_LOCKS: Final = 64


def list_sandboxes(tags: Mapping[str, str] | None = None) -> list[SandboxInfo]:
    """Return the open sandboxes that have all of *tags*, oldest first. Raises HostError."""
    found, root = [], all_runs()
    for run in runs_with(SANDBOX):
        record = record_of(run)
        if record is not None and not record.paused and not is_locked(root / run):
            record = None
        if record is None or not (tags or {}).items() <= record.tags.items():
            continue
        status = None
        if held := os.path.lexists(root / run / SOCKET):
            from x07_sandbox.library.held import status_of

            status = status_of(run)
        paused = bool(record.paused) and status is None
        if held and status is None and not paused:  # it ends just now
            continue
        found.append(
            SandboxInfo(
                id=run,
                name=record.name,
                tags=record.tags,
                backend=record.backend,
                image=record.image,
                age_s=round((unix_ms() - record.opened_unix_ms) / 1000, 1),
                held=held or paused,
                paused=paused,
                left_s=None if status is None else round(status.left_s, 1),
                commands=None if status is None else status.commands,
                left_out=record.left_out,
            )
        )
    return found


def find_sandbox(word: str) -> str:
    """Return the id of the held sandbox with this id, start of an id, or name. Raises UsageError, HostError."""
    what, list_them = f"cannot find sandbox {word}", ("To list all sandboxes: ", Command("x07 sandbox list"))
    if not isinstance(word, str) or not word:
        raise ArgumentError("cannot find the sandbox", "its id is empty, or not a str", "Pass its id")
    held = _held(word) or _paused(word)
    if len(held) > 1:
        raise UsageError(what, f"{len(held)} sandboxes fit, such as {held[0]}", list_them, code="no-such-sandbox")
    if held:
        return held[0]
    named = [run for run in runs_with(SANDBOX) if _fits(run, word)]
    if any(is_locked(all_runs() / run) for run in named):
        why = "it belongs to the process that opened it, and ends with it"
        fix = "To open one that outlives its creator: ", Command("x07 sandbox create")
        raise UsageError(what, why, fix, code="no-such-sandbox")
    why = "it has ended" if named else f"none has {described(word)}, or this name"
    raise UsageError(what, why, list_them, code="no-such-sandbox")


def run_of(word: str) -> str:
    """Return the id of the newest run whose sandbox has the name *word*, or *word* if there is none."""
    if not os.path.lexists(state_dir()):
        return word
    named = [run for run in runs_with(SANDBOX) if (record := record_of(run)) is not None and record.name == word]
    return named[-1] if named else word


def connect_to(word: str, *, flags: bool = False) -> HeldSandbox:
    """Connect to the sandbox that *word* names: see `find_sandbox`, `HeldSandbox`. Raises SandboxError.

    One that was paused goes on.
    """
    from x07_sandbox.library.held import HeldSandbox

    run = find_sandbox(word)
    if run in _paused(run):
        from x07_sandbox.library.snapshots import resume  # few sandboxes were paused

        with file_lock(_lock_of(run)):
            if run in _paused(run):  # nobody was faster
                resume(run)
    return HeldSandbox(run, flags=flags)


def require_new_name(name: str) -> None:
    """Raise UsageError if an open sandbox has this name."""
    for run in [*_held(name), *_paused(name)] if name else ():
        fix = ("Use another name, or close that sandbox: ", Command(f"x07 sandbox close {name}"))
        raise UsageError("cannot open the sandbox", f"sandbox {run} has the name {name}", fix, code="name-taken")


def naming(name: str, cancel: Cancel) -> contextlib.AbstractContextManager[None]:
    """Keep others from opening a sandbox of this name by `Sandbox.get_or_create`. Raises HostError, Cancelled."""
    return file_lock(_lock_of(name), pause=cancel.pause)


def _lock_of(name: str) -> Path:
    # Lock files stay, and names are no file names: so there are few locks for all of them.
    folder = private_dir(private_dir(state_dir()) / "naming")
    return folder / str(zlib.crc32(name.encode(errors="replace")) % _LOCKS)


def _held(word: str) -> list[str]:
    """Return the held sandboxes that *word* names. Few runs have a socket, so few records are read."""
    root = all_runs()
    return [run for run in runs_with(SOCKET) if _fits(run, word) and is_locked(root / run)]


def _paused(word: str) -> list[str]:
    """Return the paused sandboxes that *word* names."""
    root = all_runs()
    named = [run for run in runs_with(SANDBOX) if _fits(run, word) and not is_locked(root / run)]
    return [run for run in named if (record := record_of(run)) is not None and record.paused]


def _fits(run: str, word: str) -> bool:
    """Whether *word* is the id of a run, the start of it, or the name of its sandbox."""
    if is_named(run, word):
        return True
    record = record_of(run)
    return record is not None and record.name == word
