"""Advice for source files in languages without a toolchain. Imported only for the error about such a file."""

import shlex
from pathlib import PurePosixPath
from typing import Final

from x07_sandbox.errors import Command, Text
from x07_sandbox.policy.packages import ImageInUse, package_of_program

# The interpreter for the first line, by suffix.
_SCRIPTS: Final = {
    ".rb": "/usr/bin/ruby",
    ".php": "/usr/bin/php",
    ".r": "/usr/bin/Rscript",
    ".tcl": "/usr/bin/tclsh",
    ".awk": "/usr/bin/gawk -f",
}
# The program, and the shell line that builds and runs a file, by suffix. {file}: its name; {stem}: without suffix.
_COMMANDS: Final = {
    ".go": ("go", "go run {file}"),
    ".rs": ("rustc", "rustc -o /tmp/program {file} && /tmp/program"),
    ".java": ("javac", "java {file}"),
    ".ts": ("tsc", "tsc --outDir /tmp {file} && node /tmp/{stem}.js"),
}


def advice(path: str) -> Text | None:
    """Return how to run a source file of another language, as commands to paste, or None for an unknown language."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _SCRIPTS:
        interpreter = _SCRIPTS[suffix]
        program = PurePosixPath(interpreter.partition(" ")[0]).name
        image = program.lower()
        run = f"x07 run --image {image} {shlex.quote(path)}"
        return f"Add #!{interpreter} as its first line, then run: ", Command(f"{_build(image, program)} && {run}")
    if suffix in _COMMANDS:
        image, (program, line) = suffix[1:], _COMMANDS[suffix]
        name, folder = PurePosixPath(path), shlex.quote(str(PurePosixPath(path).parent))
        line = line.format(file=shlex.quote(name.name), stem=shlex.quote(name.stem))
        command = f"sh -c {shlex.quote(line)}" if "&&" in line else line
        run = f"x07 exec --image {image} --workdir {folder} -- {command}"
        return "Run: ", Command(f"{_build(image, program)} && {run}")
    return None


def _build(image: str, program: str) -> str:
    flag, package = package_of_program(program)
    return ImageInUse(image).adding(flag, [package]).text
