"""The folders of runs, `runs/RUN/`: where they are, the names of their files, and runs that a user names.

A run's folder holds everything that is stored about the run except the records of its jobs. It is locked while the run
is in progress.
"""

import os
import re
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.errors import Command, Text, UsageError
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.paths import entries, private_dir, state_dir
from x07_sandbox.policy.denials import Denial
from x07_sandbox.records.record import JOB_NAME, state_home

KILL: Final = "kill"  # a pipe to the x07 process of the run
SANDBOX: Final = "sandbox.json"  # a SandboxRecord
SOCKET: Final = "socket"  # of the holder of a sandbox
NET_LOG: Final = "net.jsonl"  # of the egress gate
REQUEST: Final = "request.json"  # identifies the run until there is a result
RUN_NAME: Final = re.compile(r"\d{1,15}-\d{1,10}-\d{1,10}")
# Beside the folders of the runs:
APPLYING: Final = ".applying"  # a folder of sessions/saved_changes
RETENTION: Final = ".retention"  # its time is that of the last removal; it has content once the message was shown


def runs_dir(root: Path) -> Path:
    """Return the folder for all runs. It is inside the state folder *root* if other users can write to its parent."""
    home = state_home(root)
    return home / ("runs" if home != root else ".runs")


def all_runs() -> Path:
    """Return the folder that contains the folders of all this user's runs. Raises HostError."""
    return private_dir(runs_dir(private_dir(state_dir())))


def run_folder(run: str) -> Path:
    """Return the folder of a run's files. The folder may not exist."""
    return runs_dir(state_dir()) / run


def run_names() -> list[str]:
    """Return the ids of all runs of this user that have a folder."""
    return [path.name for path in entries(runs_dir(state_dir())) if RUN_NAME.fullmatch(path.name)]


def runs_with(file: str) -> list[str]:
    """Return the ids of the runs that have *file*, oldest first."""
    root = all_runs()
    names = [name for name in run_names() if (root / name / file).is_file()]
    return sorted(names, key=lambda name: [int(part) for part in name.split("-")])


def started_ms(run: str) -> int:
    """Return when a run started, in milliseconds since 1970."""
    return int(run.partition("-")[0])


def find_run(run: str | None, file: str, what: str, fix: Text, *, action: str = "") -> Path:
    """Return the folder of the run whose id is or starts with *run* (`is_named`); None stands for the latest run.

    Only runs that have *file* count. Raises UsageError if none or several match.
    what, action, fix: parts of the error: the content of *file*, what a run that has *file* did, and the advice.
    """
    names = [name for name in runs_with(file) if run is None or is_named(name, run)]
    if not names:
        why = f"no run{f' with {described(run)}' if run else ''} has {action or what}"
        raise UsageError(f"cannot find {what}", why, fix)
    return all_runs() / (names[-1] if run is None else _only(names, run))


def known_run(word: str) -> str:
    """Return the id of the run that *word* names: a run id, a unique prefix of one, or a job id. Raises UsageError."""
    job = JOB_NAME.fullmatch(word)
    wanted = job[1] if job else word
    names = set()
    if os.path.lexists(state_dir()):
        names = {match[1] for path in entries(state_dir()) if (match := JOB_NAME.fullmatch(path.name))}
        names.update(run_names())
    found = sorted(name for name in names if is_named(name, wanted))
    if not found:
        why = f"no run has {described(wanted)}"
        raise UsageError(f"cannot find run {word}", why, ("To list all runs: ", Command("x07 ps --all")))
    return _only(found, word)


def _only(names: list[str], word: str) -> str:
    if len(names) > 1:
        why = f"{len(names)} run ids start with {word}, such as {names[0]}"
        raise UsageError(f"the run id {word} is ambiguous", why, "Use more digits of the id")
    return names[0]


def is_named(name: str, word: str) -> bool:
    """Return whether *word* is the run id *name* or the start of it. A whole id is never the start of another one."""
    return name == word or (not RUN_NAME.fullmatch(word) and name.startswith(word))


def described(word: str) -> str:
    """Return a description of the ids that `is_named` accepts for *word*."""
    return f"the id {word}" if RUN_NAME.fullmatch(word) else f"an id that starts with {word}"


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The file SANDBOX of the folder of a run: facts about a sandbox. image: the digest of its image, or None.

    until_unix_ms: when its lifetime ends. left_out: one denial for each reason why entries of its folders were not
    copied in.
    """

    name: str
    tags: dict[str, str]
    opened_unix_ms: int
    until_unix_ms: int
    backend: str
    image: str | None
    left_out: tuple[Denial, ...] = ()


def record_of(run: str) -> SandboxRecord | None:
    """Return the record of a sandbox, or None if it has none."""
    try:
        return msgspec.json.decode((all_runs() / run / SANDBOX).read_bytes(), type=prepared(SandboxRecord))
    except (OSError, msgspec.MsgspecError):
        return None
