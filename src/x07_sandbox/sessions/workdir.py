"""Checks of the folder that `--workdir` names, and the root made from that folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.errors import Command, Flag, RefusedError, Text, UsageError, escaped
from x07_sandbox.files.roots import Root
from x07_sandbox.host.paths import cache_dir, collapse_leading_slashes, is_folder, real_path, state_dir
from x07_sandbox.policy.guest import WORK

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.sessions.request import Program, RunRequest


def workdir_root(request: RunRequest, program: Program | None, policy: Policy, workdir: Path) -> Root:
    """Return the root for *workdir*. The program starts in a copy of that folder. Raises RefusedError, UsageError."""
    what = _cannot_use(workdir)
    if program is not None and program.toolchain.protocol is not None:
        roots = ("Use ", Flag("--allow-read-root"), " or ", Flag("--allow-write-root"))
        raise UsageError(what, "an X07 program sees only the folders of its policy", roots)
    if not policy.fs.enabled:
        fix = ("Set fs.enabled to true in the policy, or remove ", Flag("--workdir"))
        why = f"fs.enabled is false in policy {policy.policy_id}"
        raise RefusedError(what, why, fix, code="files-disabled").caused_by("fs.enabled", value=True)
    if policy.fs.deny_hidden and any(part.startswith(".") and part.strip(".") for part in workdir.parts):
        fix = ("Set fs.deny_hidden to false in the policy, or change to that folder and use ", Flag("--workdir ."))
        why = "it is hidden, and fs.deny_hidden is true"
        raise RefusedError(what, why, fix, code="workdir-hidden").caused_by("fs.deny_hidden", value=False)
    host = working_folder(workdir)
    if request.files and (program is None or program.toolchain.build is None):
        why = "`files` are placed in the private working folder, which workdir replaces"
        raise UsageError(what, why, "Write the files to the folder of workdir, or do not use workdir")
    return Root(field="--workdir", given=str(workdir), host=str(host), guest=WORK, write=not request.read_only)


def _cannot_use(workdir: Path) -> Text:
    return "cannot use ", Flag("--workdir"), f" {workdir}"


def working_folder(workdir: Path) -> Path:
    """Return the absolute path of *workdir*. Raises UsageError if the folder is missing or must not be copied."""
    what = _cannot_use(workdir)
    folder = real_path(Path()) / workdir
    if not is_folder(folder):
        command = Command(f"mkdir -p {shlex.quote(escaped(str(workdir)))}")
        raise UsageError(what, "it does not exist", ("To create it: ", command))
    real = real_path(folder)
    home = real_path(Path(os.path.expanduser("~")))  # noqa: PTH111 - Path's own raises where there is none
    if real == home or real in home.parents:
        why = "it is the root of the file system" if real == Path("/") else "it is or contains your home folder"
        raise UsageError(what, f"{why}, and all of it would be copied", "Use the folder of one project")
    own = (*map(Path, ("/proc", "/sys", "/dev")), real_path(state_dir()), real_path(cache_dir()))
    ours = next((place for place in own if real == place or place in real.parents), None)
    if ours is not None:
        why = f"{ours} belongs to the system or contains x07's own records"
        raise UsageError(what, why, "Use the folder of one project")
    return Path(collapse_leading_slashes(os.path.normpath(folder)))
