"""The folder of `--workdir`: checks, and its root."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.files.changes import printable
from x07_sandbox.files.roots import Root
from x07_sandbox.host.paths import cache_dir, collapse_leading_slashes, is_folder, real_path, state_dir
from x07_sandbox.plan.guest_paths import WORK

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.request import RunRequest


def workdir_root(request: RunRequest, program: Program, policy: Policy, workdir: Path) -> Root:
    """Return the root of the folder in whose copy the program starts. Raises RefusedError, UsageError."""
    what = f"cannot use --workdir {printable(str(workdir))}"
    if program.toolchain.protocol is not None:
        fix = "Use --allow-read-root or --allow-write-root"
        raise UsageError(what, "an X07 program sees only the folders of its policy", fix)
    if not policy.fs.enabled:
        fix = "Set fs.enabled to true in it, or leave --workdir out"
        why = f"fs.enabled is false in policy {policy.policy_id}"
        raise RefusedError(what, why, fix).caused_by("fs.enabled", value=True)
    if policy.fs.deny_hidden and any(part.startswith(".") and part.strip(".") for part in workdir.parts):
        fix = "Set fs.deny_hidden to false, or change to that folder and use --workdir ."
        why = "it is hidden, and fs.deny_hidden is true"
        raise RefusedError(what, why, fix).caused_by("fs.deny_hidden", value=False)
    host = working_folder(workdir)
    if request.files and program.toolchain.build is None:
        why = "`files` go to the private working folder, which workdir replaces"
        raise UsageError(what, why, "Write the files to that folder, or leave workdir out")
    return Root(field="--workdir", given=str(workdir), host=str(host), guest=WORK, write=not request.workdir_read)


def working_folder(workdir: Path) -> Path:
    """Return the path of that folder. Raises UsageError if it does not exist or holds the user's home folder."""
    what = f"cannot use --workdir {printable(str(workdir))}"
    folder = real_path(Path()) / workdir
    if not is_folder(folder):
        raise UsageError(what, "it does not exist", f"Create it: mkdir -p {shlex.quote(printable(str(workdir)))}")
    real = real_path(folder)
    home = real_path(Path(os.path.expanduser("~")))  # noqa: PTH111 - Path's own raises where there is none
    if real == home or real in home.parents:
        why = "it is the root of the file system" if real == Path("/") else "it is your home folder, or holds it"
        raise UsageError(what, f"{why}, and all of it would be copied", "Name the folder of one project")
    ours = next((place for place in _not_copied() if real == place or place in real.parents), None)
    if ours is not None:
        why = f"{ours} belongs to the system or holds x07's own records"
        raise UsageError(what, why, "Name the folder of one project")
    return Path(collapse_leading_slashes(os.path.normpath(folder)))


def _not_copied() -> list[Path]:
    return [*map(Path, ("/proc", "/sys", "/dev")), real_path(state_dir()), real_path(cache_dir())]
