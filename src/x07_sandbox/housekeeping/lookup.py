"""Look-up of runs by id or a unique prefix of the id, among the folders of runs and the records of jobs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from x07_sandbox.errors import Command, UsageError
from x07_sandbox.host.paths import state_dir
from x07_sandbox.housekeeping.pruner import entries
from x07_sandbox.jobs.active import JOB_NAME
from x07_sandbox.runs.folder import RUN_NAME, described, is_named, runs_dir

if TYPE_CHECKING:
    from pathlib import Path


def run_folder(run: str) -> Path:
    """Return the folder of a run's files. The folder may not exist."""
    return runs_dir(state_dir()) / run


def known_run(word: str) -> str:
    """Return the id of the run that *word* names: a run id, a unique prefix of one, or a job id. Raises UsageError."""
    job = JOB_NAME.fullmatch(word)
    wanted = job[1] if job else word
    names = set()
    if os.path.lexists(state_dir()):
        names = {match[1] for path in entries(state_dir()) if (match := JOB_NAME.fullmatch(path.name))}
        names |= {path.name for path in entries(runs_dir(state_dir())) if RUN_NAME.fullmatch(path.name)}
    found = sorted(name for name in names if is_named(name, wanted))
    if not found:
        why = f"no run has {described(wanted)}"
        raise UsageError(f"cannot find run {word}", why, ("To list all runs: ", Command("x07 ps --all")))
    if len(found) > 1:
        why = f"{len(found)} run ids start with {word}, such as {found[0]}"
        raise UsageError(f"the run id {word} is ambiguous", why, "Use more digits of the id")
    return found[0]
