"""What to do for source files of languages that have no toolchain here. Loaded only for the error about one."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from typing import Final

# Suffix: Debian package, and the interpreter that a first line may name.
_SCRIPTS: Final = {
    ".rb": ("ruby", "/usr/bin/ruby"),
    ".php": ("php-cli", "/usr/bin/php"),
    ".r": ("r-base-core", "/usr/bin/Rscript"),
    ".tcl": ("tcl", "/usr/bin/tclsh"),
    ".awk": ("gawk", "/usr/bin/gawk -f"),
}
_NAMED_ALIKE: Final = ("fish", "gawk", "lua5.4", "ruby", "zsh")  # programs and their packages
_FIRST_LINE: Final = re.compile(rb"#!\s*(?:/usr)?/bin/(?:env\s+(?:-S\s*)?)?([A-Za-z0-9][\w.+-]{0,63})\s")
# Suffix: Debian package, and the shell line that builds and runs a file; {file} is its name, {stem} without suffix.
_COMMANDS: Final = {
    ".go": ("golang-go", "go run {file}"),
    ".rs": ("rustc", "rustc -o /tmp/program {file} && /tmp/program"),
    ".java": ("openjdk-21-jdk-headless", "java {file}"),
    ".ts": ("node-typescript", "tsc --outDir /tmp {file} && node /tmp/{stem}.js"),
}


def advice(path: str) -> str | None:
    """How to run a source file of another language, with lines to paste; None where nothing is known about it."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _SCRIPTS:
        package, interpreter = _SCRIPTS[suffix]
        image = package.partition("-")[0]
        run = f"x07 run --image {image} {shlex.quote(path)}"
        return f"Make #!{interpreter} its first line, then: {_build(image, package)} && {run}"
    if suffix in _COMMANDS:
        package, line = _COMMANDS[suffix]
        name, folder = PurePosixPath(path), shlex.quote(str(PurePosixPath(path).parent))
        line = line.format(file=shlex.quote(name.name), stem=shlex.quote(name.stem))
        command = f"sh -c {shlex.quote(line)}" if "&&" in line else line
        image = suffix[1:]
        return f"Use x07 exec: {_build(image, package)} && x07 exec --image {image} --workdir {folder} -- {command}"
    return None


def interpreter_of(head: bytes) -> tuple[str, str] | None:
    """The name of the interpreter that a script's first line asks for, and the package that has it, if it is known."""
    found = _FIRST_LINE.match(head)
    if found is None:
        return None
    name = found[1].decode()
    known = (package for package, path in _SCRIPTS.values() if PurePosixPath(path.split()[0]).name == name)
    return name, next(known, {"node": "nodejs"}.get(name, name if name in _NAMED_ALIKE else "PACKAGE"))


def _build(image: str, package: str) -> str:
    return f"x07 image build --name {image} --include {package}"
