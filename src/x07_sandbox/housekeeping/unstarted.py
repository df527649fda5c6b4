"""Folders of jobs whose runner was killed before it wrote owner.json, so before anything started."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.paths import state_dir
from x07_sandbox.housekeeping.records import doomed_name
from x07_sandbox.jobs.active import JOB_NAME
from x07_sandbox.runs.folder import runs_dir

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.jobs.reader import StoredJob

_OWN_BACKENDS: Final = frozenset({"qemu", "os", "none"})  # X07's tools use none of these
_UPSTREAM_PHASES: Final = frozenset({"build", "run"})
_SETTLED_MS: Final = 60_000
_SURELY_MS: Final = 3_600_000  # far longer than a runner takes to write owner.json


def why_unstarted(stored: StoredJob) -> str:
    """Return why a folder without an owner can go, "" if it must stay.

    It must be ours, since X07's tools write a job.json alone. And nobody may be about to start the job: a run in
    progress locks its folder; any other creator, such as a probe, is a live process, or was a moment ago.
    """
    match = JOB_NAME.fullmatch(stored.folder.name)
    if match is None or stored.standing != "unowned" or os.path.lexists(stored.folder / "owner.json"):
        return ""
    run = runs_dir(state_dir()) / match[1]
    backend = stored.job.backend if stored.job is not None else ""
    ours = backend in _OWN_BACKENDS or match[4] not in _UPSTREAM_PHASES or run.is_dir()
    if not ours or is_locked(run) or not _holds_nothing(stored.folder):
        return ""
    if run.is_dir():  # jobs of a run exist only while it is locked
        return "it was never started, and its runner is gone"
    age_ms = unix_ms() - stored.info.st_mtime_ns // 1_000_000
    creator_lives = os.path.exists(f"/proc/{int(match[3])}")  # noqa: PTH110 - in /proc
    if age_ms > (_SURELY_MS if creator_lives else _SETTLED_MS):
        return "it was never started, and its runner is gone"
    return ""


def _holds_nothing(folder: Path) -> bool:
    """Whether a folder only has files that a runner writes before it starts anything."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names are wanted
    except OSError:
        return False
    return all(name == "job.json" or name.startswith((".job.json.", ".owner.json.")) for name in names)


def remove_unstarted(folder: Path) -> bool:
    """Remove such a folder and return whether it is gone. A runner that lives after all fails without it."""
    doomed = doomed_name(folder)
    try:
        folder.rename(doomed)
        if os.path.lexists(doomed / "owner.json"):  # the job was just started
            doomed.rename(folder)
            return False
        shutil.rmtree(doomed)
    except OSError:
        return False
    return True
