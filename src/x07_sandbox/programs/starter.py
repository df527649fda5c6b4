"""The first version of a project's manifest, from the names of the files that are there.

Pure. What is made here is read back by the decoder that a run uses before anybody writes it.
"""

from __future__ import annotations

import glob
import json
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.programs import manifest
from x07_sandbox.programs.toolchains import MAKEFILES, TOOLCHAINS, toolchain_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from x07_sandbox.programs.toolchains import Toolchain

ROWS: Final = tuple(row for row in TOOLCHAINS if row.project_files)
_LINE_MAX: Final = 4096  # characters of a Makefile's line that are looked at
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,1023}")


def sandbox_manifest(
    toolchain: str, files: Sequence[str], *, entry: str | None = None, artifact: str | None = None, makefile: str = ""
) -> bytes:
    """x07-sandbox.toml for *files* (relative names). makefile: the text of make's. Raises UsageError."""
    row = toolchain_named(toolchain)
    lines = [f"schema_version = {_text(manifest.SCHEMA)}", f"toolchain = {_text(toolchain)}"]
    lines.append(f"files = [{', '.join(map(_text, _patterns(row, files)))}]")
    if row.entries:
        lines.append(f"entry = {_text(entry or _entry(row, files))}")
    if row.artifact:
        lines.append(f"artifact = {_text(artifact or _artifact(makefile))}")
    data = ("# What this project consists of. All keys: docs/programs.md\n" + "\n".join(lines) + "\n").encode()
    manifest.decode_manifest(data, source=manifest.FILE)
    return data


def _patterns(row: Toolchain, files: Sequence[str]) -> list[str]:
    """One pattern for each folder and suffix that is there, so that a file added later is taken too."""
    found = []
    for name in files:
        path = PurePosixPath(name)
        if name in row.beside:
            found.append(name)
        elif path.suffix and path.suffix.lower() in row.project_files:
            folder = "" if str(path.parent) == "." else f"{glob.escape(str(path.parent))}/"
            found.append(f"{folder}*{path.suffix}")
    if row.artifact and not any(name in MAKEFILES for name in found):
        fix = "Write one, or name another --toolchain"
        raise UsageError("cannot begin a make project", "there is no Makefile", fix)
    if not found:
        why = f"there is no file that ends in {', '.join(row.project_files)}"
        raise UsageError(f"cannot begin a {row.name} project", why, "Put one there, or name another --toolchain")
    patterns = list(dict.fromkeys(found))
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


def _artifact(makefile: str) -> str:
    """What make makes: its first target, or what `all` needs first, if that is a plain name. Raises UsageError."""
    # Line by line, and only the first rule's variables are put in: nobody knows who wrote it, and how long it makes us.
    lines = [line[:_LINE_MAX] for line in makefile.replace("\\\n", " ").split("\n")]
    assigned = dict(filter(None, map(_assignment, lines)))

    def words(text: str) -> list[str]:
        return re.sub(r"\$[({](\w+)[)}]", lambda match: assigned.get(match[1], match[0]), text).split()

    rules = ((words(targets), needs) for targets, needs in filter(None, map(_rule, lines)))
    first, needs = next((rule for rule in rules if rule[0]), ([], ""))
    name = next(iter(words(needs) if first == ["all"] else first), "")
    if not _PLAIN.fullmatch(name):
        why = f"the Makefile's first target is {name[:64]!r}" if name else "the Makefile has no plain first target"
        raise UsageError("cannot tell which file make makes", why, "Name it with --artifact")
    return name


def _assignment(line: str) -> tuple[str, str] | None:
    """The variable that a line sets, and its value."""
    name, equals, value = line.partition("=")
    name = name.rstrip(":? \t")
    return (name, value.partition("#")[0].strip()) if equals and _NAME.fullmatch(name) else None


def _rule(line: str) -> tuple[str, str] | None:
    """The targets of a rule's line, and what they need."""
    targets, colon, needs = line.partition(":")
    if not colon or not targets or targets[0] in ".\t#" or needs[:1] in {":", "="} or {"=", "#"} & set(targets):
        return None
    return targets, re.split("[#;=]", needs, maxsplit=1)[0]


def _text(value: str) -> str:
    """A basic string of TOML; what JSON writes is one, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
