"""Writes the first manifest of a project, based on the names of its files. No I/O. The result is decoded as a check."""

import glob
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final, NoReturn

from x07_sandbox.errors import Command, Text, UsageError
from x07_sandbox.programs import manifest
from x07_sandbox.programs.toolchains import MAKEFILES, TOOLCHAINS, Toolchain, toolchain_named

ROWS: Final = tuple(row for row in TOOLCHAINS if row.project_files)
# Files that a build leaves beside the sources. They may contain paths of another machine.
_LEFT_BY_BUILDS: Final = frozenset({".d", ".gch", ".la", ".lo", ".pyc"})


def sandbox_manifest(
    toolchain: str, files: Sequence[str], *, entry: str | None = None, artifact: str | None = None
) -> bytes:
    """Return a x07-sandbox.toml for *files* (relative names). Raises UsageError."""
    row = toolchain_named(toolchain)
    lines = [f"schema_version = {_text(manifest.SCHEMA)}", f"toolchain = {_text(toolchain)}"]
    lines.append(f"files = [{', '.join(map(_text, _patterns(row, files)))}]")
    if row.entries:
        lines.append(f"entry = {_text(entry or _entry(row, files))}")
    if row.artifact:
        lines.append(f"artifact = {_text(artifact or _no_artifact(files))}")
    data = ("# The files of this project. Reference: docs/reference/programs.md\n" + "\n".join(lines) + "\n").encode()
    manifest.decode_manifest(data, source=manifest.FILE)
    return data


def _patterns(row: Toolchain, files: Sequence[str]) -> list[str]:
    """Return one pattern for each folder and suffix, so that files that are added later match too.

    A make project gets all its files, because make may need sub-Makefiles, inputs of configure and test data.
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
        fix: Text = "Write a Makefile, or use another --toolchain"
        if "configure" in files:
            why = "there is no Makefile before ./configure has created it"
            fix = ("To build it in the folder: ", Command("x07 exec --workdir . -- sh -c './configure && make'"))
        raise UsageError("cannot create a make project", why, fix)
    if not found:
        why = f"no file ends in {' or '.join(row.project_files)}"
        raise UsageError(f"cannot create a {row.name} project", why, "Add such a file, or use another --toolchain")
    patterns = list(dict.fromkeys(found))
    if row.artifact and (len(patterns) > manifest.FILES_MAX or len(str(patterns)) > manifest.MAX_BYTES // 2):
        folders = (glob.escape(str(PurePosixPath(name).parent)) for name in files)
        patterns = list(dict.fromkeys("*" if folder == "." else f"{folder}/*" for folder in folders))
    return patterns


def _entry(row: Toolchain, files: Sequence[str]) -> str:
    for name in row.entries or ():
        if name in files:
            return name
    top = [name for name in files if "/" not in name and PurePosixPath(name).suffix in row.suffixes]
    if len(top) != 1:
        why = f"it could be any of {', '.join(top[:5])}" if top else "no such file is in the top folder"
        raise UsageError("cannot tell which file to start", why, "Add --entry FILE")
    return top[0]


def _no_artifact(files: Sequence[str]) -> NoReturn:
    command = "sh -c './configure && make'" if "configure" in files else "make test"
    fix = ("Add --artifact FILE, or run make in the folder: ", Command(f"x07 exec --workdir . -- {command}"))
    raise UsageError("cannot create a make project", "the program that make builds is not named", fix)


def _text(value: str) -> str:
    """Return *value* as a TOML string, whose form differs from a JSON string only in the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
