"""What a project consists of, for verbs that write into it and run nothing of it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import SandboxError
from x07_sandbox.files.patterns import Walk
from x07_sandbox.host.paths import read_bounded, real_path
from x07_sandbox.host.project import ProjectFolder
from x07_sandbox.programs import manifest
from x07_sandbox.programs.new_manifest import ROWS
from x07_sandbox.x07 import project as x07

if TYPE_CHECKING:
    from collections.abc import Iterator

_SOURCES: Final = (x07.SOURCE_SUFFIX, *(name.lower() for row in ROWS for name in row.project_files))
_POLICIES: Final = Path(".x07/policies")


def own_files(root: Path, report: Path | None) -> list[Path]:
    """Files of the project in *root*; *report*, which is to be written, is among them if its name is that of one.

    What a manifest that is there lists is taken from it; one that cannot be read lists nothing.
    """
    found = [root / name for name in (x07.PROJECT_FILE, manifest.FILE, x07.LOCK_FILE)]
    if report is not None and _is_named_as_one(root, report):
        found.append(report)
    for listed in (_of_x07(root), _of_ours(root)):
        with contextlib.suppress(SandboxError, OSError):
            found += [root / name for name in listed]
    return found


def _is_named_as_one(root: Path, report: Path) -> bool:
    """Whether it lies in the project and is called as a source is, or lies with the policies."""
    place, project = real_path(report), real_path(root)
    if place.is_relative_to(project / _POLICIES):
        return True
    return place.is_relative_to(project) and place.name.lower().endswith(_SOURCES)


def _of_x07(root: Path) -> Iterator[str]:
    place = root / x07.PROJECT_FILE
    project = x07.decode_project(read_bounded(place, "project", x07.MAX_BYTES), source=str(place))
    yield from filter(None, (project.lockfile,))
    for profile in project.profiles.values():
        yield from filter(None, (profile.policy, profile.input))


def _of_ours(root: Path) -> Iterator[str]:
    place = root / manifest.FILE
    found, _ = manifest.decode_manifest(read_bounded(place, "manifest", manifest.MAX_BYTES), source=str(place))
    yield from filter(None, (found.policy, found.run.input))
    yield from Walk(ProjectFolder(root), found.files, lambda: None).files()
