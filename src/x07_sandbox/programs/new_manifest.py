"""The first version of a project's manifest, from the names of the files that are there.

Pure. What is made here is read back by the decoder that a run uses before anybody writes it.
"""

from __future__ import annotations

import glob
import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.programs import manifest
from x07_sandbox.programs.makefile import program_of
from x07_sandbox.programs.toolchains import MAKEFILES, TOOLCHAINS, toolchain_named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from x07_sandbox.programs.toolchains import Toolchain

ROWS: Final = tuple(row for row in TOOLCHAINS if row.project_files)
# What a build leaves beside the sources, and what names files of the machine that it ran on.
_LEFT_BY_BUILDS: Final = frozenset({".d", ".gch", ".la", ".lo", ".pyc"})


def sandbox_manifest(
    toolchain: str,
    files: Sequence[str],
    *,
    entry: str | None = None,
    artifact: str | None = None,
    makefiles: Mapping[str, str] | None = None,
) -> bytes:
    """x07-sandbox.toml for *files* (relative names). makefiles: texts of make's, by name. Raises UsageError."""
    row = toolchain_named(toolchain)
    lines = [f"schema_version = {_text(manifest.SCHEMA)}", f"toolchain = {_text(toolchain)}"]
    lines.append(f"files = [{', '.join(map(_text, _patterns(row, files)))}]")
    if row.entries:
        lines.append(f"entry = {_text(entry or _entry(row, files))}")
    if row.artifact:
        lines.append(f"artifact = {_text(artifact or program_of(makefiles or {}, set(files)))}")
    data = ("# The files of this project. Reference: docs/reference/programs.md\n" + "\n".join(lines) + "\n").encode()
    manifest.decode_manifest(data, source=manifest.FILE)
    return data


def _patterns(row: Toolchain, files: Sequence[str]) -> list[str]:
    """One pattern for each folder and suffix that is there, so that a file added later is taken too.

    make may need any file: sub-Makefiles, configure's inputs, data of tests.
    """
    found = []
    for name in files:
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if row.artifact and (suffix in _LEFT_BY_BUILDS or name == manifest.FILE):
            continue
        if path.suffix and (row.artifact or suffix in row.project_files):
            folder = "" if str(path.parent) == "." else f"{glob.escape(str(path.parent))}/"
            found.append(f"{folder}*{glob.escape(path.suffix)}")
        elif row.artifact or name in row.beside:
            found.append(glob.escape(name))
    if row.artifact and not any(name in MAKEFILES for name in files):
        why = "there is no Makefile at the top"
        fix = "Write one, or name another --toolchain"
        if "configure" in files:
            why = "there is no Makefile; ./configure makes it"
            fix = "Build it in the folder: x07 exec --workdir . -- sh -c './configure && make'"
        raise UsageError("cannot begin a make project", why, fix)
    if not found:
        why = f"there is no file that ends in {', '.join(row.project_files)}"
        raise UsageError(f"cannot begin a {row.name} project", why, "Put one there, or name another --toolchain")
    patterns = list(dict.fromkeys(found))
    if row.artifact and (len(patterns) > manifest.FILES_MAX or len(str(patterns)) > manifest.MAX_BYTES // 2):
        folders = (glob.escape(str(PurePosixPath(name).parent)) for name in files)
        patterns = list(dict.fromkeys("*" if folder == "." else f"{folder}/*" for folder in folders))
    if len(patterns) > manifest.FILES_MAX:
        why = f"they are in more than {manifest.FILES_MAX} folders"
        fix = f"Begin it in a folder with its sources alone, or write {manifest.FILE} with patterns like **/*.py"
        raise UsageError(f"cannot list the sources of a {row.name} project", why, fix)
    return patterns


def _entry(row: Toolchain, files: Sequence[str]) -> str:
    """The file that is started: one with the usual name, or the only one at the top. Raises UsageError."""
    for name in row.entries or ():
        if name in files:
            return name
    top = [name for name in files if "/" not in name and PurePosixPath(name).suffix in row.suffixes]
    if len(top) != 1:
        why = f"it could be any of {', '.join(top[:5])}" if top else "there is none at the top"
        raise UsageError("cannot tell which file is started", why, "Name it with --entry")
    return top[0]


def _text(value: str) -> str:
    """A basic string of TOML; what JSON writes is one, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
