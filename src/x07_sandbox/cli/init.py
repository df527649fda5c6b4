"""`x07 init`: write the first file of a project; overwrite nothing."""

import argparse
import contextlib
import os
import shlex
from functools import partial
from pathlib import Path
from typing import Final

from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import print_line, shell_path, show_written
from x07_sandbox.cli.parser import add_document_flags, folder_path, nonempty
from x07_sandbox.cli.policy import BASE_FOLDER, DIFFERENT, file_name
from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import raised_as, real_path
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.programs.project import FILE, ROWS, X07_JSON, project_root, sandbox_manifest, write_document
from x07_sandbox.reports.commands import InitReport
from x07_sandbox.x07.project import first_project

_FILES_MAX: Final = 10_000
_WITH_ENTRY: Final = tuple(row.name for row in ROWS if row.entries)
_WITH_ARTIFACT: Final = tuple(row.name for row in ROWS if row.artifact)
_DEPTH_MAX: Final = 256  # os.walk of Python 3.11 calls itself for each level
# Folders of builds and tools, which hold no sources.
_NO_SOURCES: Final = frozenset({"__pycache__", "bin", "build", "deps", "dist", "node_modules", "out", "target", "venv"})
_EPILOG: Final = f"""With --toolchain, x07 init writes {FILE}, which lists the sources in DIR. See
docs/reference/programs.md.

Without --toolchain, x07 init writes {X07_JSON} for a project in the X07 language. The file defines one profile,
`sandbox`, which says how to run the project and which policy file to use. To create the policy file, run x07 policy
init. The project also needs a lock file. To create it, run x07 pkg lock with the X07 language's own tool, which is
also called x07.

examples:
  x07 init --toolchain python
  x07 init --toolchain make --artifact bin/prog project
  x07 init && x07 policy init --template default

exit code: 0 the file was created or is up to date; 2 the file exists with other content (it is kept), or another error
"""


def add_init(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 init`."""
    parser.epilog = _EPILOG
    doc = "the project's folder (default: the current one)"
    parser.add_argument("folder", nargs="?", type=folder_path, default=Path(), metavar="DIR", help=doc)
    names = tuple(row.name for row in ROWS)
    parser.add_argument("--toolchain", choices=names, metavar="T", help=f"language or build tool: {', '.join(names)}")
    made = ", ".join(_WITH_ARTIFACT)
    doc = f"file to start; only for {', '.join(_WITH_ENTRY)} (default: main, with the language's suffix)"
    parser.add_argument("--entry", type=nonempty, metavar="FILE", help=doc)
    parser.add_argument("--artifact", metavar="FILE", help=f"file that {made} builds; required for {made}")
    doc = "for X07 projects: the template whose policy file x07.json names (default: default)"
    parser.add_argument("--template", choices=tuple(TEMPLATES), metavar="T", help=doc)
    add_document_flags(parser, "print one line of JSON")
    parser.set_defaults(carry_out=_init)


def _init(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    _check_options(options)
    template = options.template or "default"
    policy = "/".join((*BASE_FOLDER, file_name(template)))
    usable = partial(raised_as, UsageError, f"cannot use {folder}", "Name another folder")
    with usable():
        files = _files_below(folder) if folder.exists() else []
    if options.toolchain is None:
        data = first_project(files, policy)
    else:
        if options.toolchain == "make":
            with usable():
                files = [name for name in files if not _is_built(folder / name)]
        data = sandbox_manifest(options.toolchain, files, entry=options.entry, artifact=options.artifact)
    with usable():
        folder.mkdir(parents=True, exist_ok=True)  # only now: an error above leaves no empty folder
    root, name = real_path(folder), X07_JSON if options.toolchain is None else FILE
    status = write_document(root, (name,), data, overwrite=False)
    report = InitReport(toolchain=options.toolchain or "x07", project_root=str(root), out=name, status=status)
    silent = print_line(report, options) or options.quiet_json
    if status == "exists_different":
        say(f"{root / name} has different content and was not changed")
        return DIFFERENT
    following = f"x07 run {shell_path(root)}"
    if needs_policy := options.toolchain is None and not (root / policy).exists():
        where = f" --project {shlex.quote(str(folder / name))}"
        with contextlib.suppress(UsageError):  # the current folder is gone
            where = "" if project_root(None) == root else where
        following = f"x07 policy init --template {template}{where}"
    if not silent:
        show_written(root / name, status, following)
    elif needs_policy:
        say(f"the project's policy is missing. To create it: {following}")
    return 0


def _check_options(options: argparse.Namespace) -> None:
    for given, name, toolchains in (
        (options.entry, "--entry", _WITH_ENTRY),
        (options.artifact, "--artifact", _WITH_ARTIFACT),
        (options.template, "--template", (None,)),
    ):
        if given is not None and options.toolchain not in toolchains:
            where = " or ".join(f"--toolchain {name}" if name else "X07 projects" for name in toolchains)
            raise UsageError(f"cannot use {name}", f"it applies only to {where}", "Omit it")


def _files_below(folder: Path) -> list[str]:
    """Return a project's files, sorted. Skips hidden names, build folders and links. Raises OSError, UsageError."""
    found: list[str] = []
    seen = 0
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NO_SOURCES)
        seen += len(folders) + len(names)
        too_deep = place.count("/") - str(folder).count("/") > _DEPTH_MAX
        if too_deep or seen > _FILES_MAX:
            why = f"there are more than {_FILES_MAX} files"
            if too_deep:
                why = f"its folders are nested deeper than {_DEPTH_MAX}"
            raise UsageError(f"cannot start a project in {folder}", why, "Name a folder with only the sources")
        for name in names:
            path = os.path.relpath(Path(place) / name, folder)
            if not name.startswith(".") and path.isprintable():
                found.append(path)
    return sorted(found)


def _raise(exc: OSError) -> None:
    raise exc


def _is_built(path: Path) -> bool:
    """Whether a file is an object file, a library or an executable."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8).startswith((b"\x7fELF", b"!<arch>\n"))
