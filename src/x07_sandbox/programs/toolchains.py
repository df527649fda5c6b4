"""The table of toolchains: how a source becomes an artifact in the build VM, and how that is started in the run VM."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE_FOLDER: Final = "/x07/in"
OUTPUT: Final = "/x07/out/compiled-out"
ARTIFACT: Final = "/x07/in/artifact"
PROGRAM_FOLDER: Final = "/x07/in/program"
_PYTHON: Final = "/usr/bin/python3"
_NAME_MAX: Final = 200  # bytes; byte code gets a longer one, and a file system takes 255


class Toolchain(msgspec.Struct, frozen=True, kw_only=True):
    """One language.

    suffixes: of source files, lower case.
    build: argv of the build, given the source's path in the guest and the file's own name; the first is a path.
    archive: whether the artifact is an archive that is unpacked to PROGRAM_FOLDER, else an executable at ARTIFACT.
    start: argv that starts the program, given the file's own name.
    """

    name: str
    suffixes: tuple[str, ...]
    build: Callable[[str, str], list[str]]
    archive: bool
    start: Callable[[str], list[str]]
    doc: str


def _build_c(source: str, _name: str) -> list[str]:
    return ["/usr/bin/gcc", "-std=gnu17", "-O2", "-o", OUTPUT, "-x", "c", source, "-x", "none", "-lm", "-lpthread"]


def _start_executable(_name: str) -> list[str]:
    return [ARTIFACT]


def _build_python(source: str, name: str) -> list[str]:
    return [_PYTHON, "-I", "-S", "-c", _driver(), source, name, PROGRAM_FOLDER, OUTPUT]


def _start_python(name: str) -> list[str]:
    return [_PYTHON, f"{PROGRAM_FOLDER}/{name}"]


@cache
def _driver() -> str:
    return (Path(__file__).parent / "data" / "build_python.py").read_text(encoding="utf-8")


TOOLCHAINS: Final = (
    Toolchain(
        name="c",
        suffixes=(".c",),
        build=_build_c,
        archive=False,
        start=_start_executable,
        doc="C, by the image's gcc: one source file, optimised, linked with libm and threads.",
    ),
    Toolchain(
        name="python",
        suffixes=(".py",),
        build=_build_python,
        archive=True,
        start=_start_python,
        doc="Python, by the image's python3: checked, byte-compiled, started as a script.",
    ),
)


def toolchain_for(path: str) -> Toolchain:
    """The toolchain of a source file, by its suffix. Raises UsageError."""
    suffix = PurePosixPath(path).suffix.lower()
    for toolchain in TOOLCHAINS:
        if suffix in toolchain.suffixes:
            return toolchain
    known = ", ".join(suffix for toolchain in TOOLCHAINS for suffix in toolchain.suffixes)
    raise UsageError(
        f"cannot run {path}",
        f"no toolchain for {suffix or 'a file without suffix'}",
        f"Name the source with one of: {known}",
    )


def source_name(path: str) -> str:
    """The name under which a source travels: its own, if that is harmless. Raises UsageError."""
    name = PurePosixPath(path).name
    if any("\udc80" <= char <= "\udcff" for char in name):
        raise UsageError(f"cannot run {path!r}", "its name is no UTF-8", "Rename the file")
    if (
        not name
        or name.startswith((".", "-"))
        or not name.isprintable()
        or len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX
    ):
        raise UsageError(
            f"cannot run {path!r}",
            "its name begins with '.' or '-', is too long or has control characters",
            "Rename the file",
        )
    return name


def describe(names: Sequence[Toolchain] = TOOLCHAINS) -> str:
    """One line a toolchain, for help texts."""
    return "\n".join(f"{', '.join(toolchain.suffixes)}: {toolchain.doc}" for toolchain in names)
