"""The table of toolchains: how a source becomes an artifact in the build VM, and how that is started in the run VM."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from x07_sandbox.programs.protocol import Protocol
else:
    Protocol = object  # msgspec reads annotations; its module is loaded only where there is one


SOURCE_FOLDER: Final = "/x07/in"
PROJECT_FOLDER: Final = "/x07/in/project"
OUTPUT: Final = "/x07/out/compiled-out"
ARTIFACT: Final = "/x07/in/artifact"
PROGRAM_FOLDER: Final = "/x07/in/program"
_PYTHON: Final = "/usr/bin/python3"
_BASH: Final = "/bin/bash"
_SHELLS: Final = ("sh", "dash", "bash")
_SHELL_FOLDERS: Final = frozenset({"", "/bin", "/usr/bin", "/usr/local/bin"})
_ENV: Final = frozenset({"/usr/bin/env", "/bin/env"})
_ENV_SYNTAX: Final = frozenset("\"'\\$#")  # what is more than words to env -S
_NAME_MAX: Final = 200  # bytes; byte code gets a longer one, and a file system takes 255
_ELF: Final = b"\x7fELF"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What a toolchain is told of a source: where it lies in the build VM, and what of it counts.

    name: the file that is started, relative to the folder; "" where there is none (make).
    folder: its folder in the build VM. files: all files below it, sorted, where it is a tree; () for a single file.
    head: the first bytes of *name*. args: for the build tool. artifact: what make makes, relative to the folder.
    """

    name: str
    folder: str = SOURCE_FOLDER
    files: tuple[str, ...] = ()
    head: bytes = b""
    args: tuple[str, ...] = ()
    artifact: str = ""

    @property
    def path(self) -> str:
        """The file that is started, in the build VM."""
        return f"{self.folder}/{self.name}"

    @property
    def driver(self) -> str:
        """Where the driver of the build lies in the build VM, if the toolchain has one: beside what is built."""
        return f"{SOURCE_FOLDER}/{'driver.py' if self.name != 'driver.py' else 'build.py'}"

    def with_suffixes(self, suffixes: tuple[str, ...]) -> list[str]:
        """Paths of the files of a language in the build VM."""
        if not self.files:
            return [self.path]
        return [f"{self.folder}/{name}" for name in self.files if PurePosixPath(name).suffix.lower() in suffixes]


class Toolchain(msgspec.Struct, frozen=True, kw_only=True):
    """One language, or one way to build. Everything else about it is derived from its row in TOOLCHAINS.

    suffixes: of source files, lower case.
    beside: suffixes and names of the other files that `x07 init` lists in a project's manifest.
    build: argv of the build; the first is a path. None where the source is the artifact.
    archive: whether the build is `build_driver()`, whose artifact is unpacked to PROGRAM_FOLDER; else the artifact is
    an executable, at ARTIFACT.
    start: argv that starts the program.
    needs: Debian packages that the image must have; "x07" stands for X07's own toolchain.
    protocol: what its compiler and programs need beyond that; None where they are simply given bytes and arguments.
    entries: usual names of the file that is started, in order of preference; None where a project does not name it.
    artifact: whether a project names the file that its build makes. Such a toolchain builds projects only.
    """

    name: str
    suffixes: tuple[str, ...]
    beside: tuple[str, ...] = ()
    build: Callable[[Source], list[str]] | None
    archive: bool = False
    start: Callable[[Source], list[str]] = lambda _source: [ARTIFACT]
    needs: tuple[str, ...] = ()
    protocol: Protocol | None = None
    entries: tuple[str, ...] | None = None
    artifact: bool = False
    doc: str

    @property
    def driver(self) -> bool:
        """Whether the build is a Python script of ours, at Source.driver in the build VM."""
        return self.archive

    @property
    def project_files(self) -> tuple[str, ...]:
        """Suffixes and names of the files that its projects consist of; () where it has no projects of sources."""
        return self.suffixes + self.beside


_C: Final = (".c",)
_CPP: Final = (".cpp", ".cc", ".cxx", ".c++")
_HEADERS: Final = (".h", ".hpp", ".hh", ".hxx")
_LUA_PATH: Final = f"{PROGRAM_FOLDER}/?.lua;{PROGRAM_FOLDER}/?/init.lua"
MAKEFILES: Final = ("GNUmakefile", "makefile", "Makefile")  # in the order in which make looks for them


def _compiled_by(
    compiler: str, language: str, standard: str, suffixes: tuple[str, ...]
) -> Callable[[Source], list[str]]:
    """The build of a language that one call of a compiler makes an executable of."""

    def build(source: Source) -> list[str]:
        given = ["-x", language, *source.with_suffixes(suffixes), "-x", "none"]
        return [compiler, f"-std={standard}", "-O2", "-o", OUTPUT, *source.args, *given, "-lm", "-lpthread"]

    return build


def _build_archive(source: Source, *check: str) -> list[str]:
    words = ["tree" if source.files else "file", source.folder, source.name, PROGRAM_FOLDER, OUTPUT]
    return [_PYTHON, source.driver, *words, *check]


def _checked_by(*check: str) -> Callable[[Source], list[str]]:
    """The build of a language that is not compiled. check: argv of its syntax check, run in the source's folder."""
    return lambda source: _build_archive(source, *check)


def _started_by(*interpreter: str) -> Callable[[Source], list[str]]:
    return lambda source: [*interpreter, f"{PROGRAM_FOLDER}/{source.name}"]


def _asked(head: bytes) -> list[str]:
    """The interpreter that a first line names and its options, as the kernel and env(1) read them; nothing for none."""
    line = head.partition(b"\n")[0].decode("utf-8", "surrogateescape").strip()
    words = line[2:].split(None, 1) if line.startswith("#!") else []
    if len(words) > 1 and words[0] in _ENV:
        # The kernel passes all that follows as one word: a program's name to env, or a line of words after -S.
        rest = words[1]
        split = rest.startswith("-S") and not set(rest) & _ENV_SYNTAX
        return (rest[2:].split() if split else None) or [rest]
    return words


def _shell(source: Source) -> list[str]:
    """The shell of a script's first line, with its options; bash where it asks for none. Raises UsageError."""
    asked = _asked(source.head)
    if not asked:
        return [_BASH]
    folder, _, name = asked[0].rpartition("/")
    if folder in _SHELL_FOLDERS and name in _SHELLS and all(word.isprintable() for word in asked):
        return [f"/bin/{name}", *asked[1:]]
    raise UsageError(
        f"cannot run {source.name} as a shell script",
        f"its first line asks for {' '.join(asked)!r}, and {', '.join(_SHELLS)} are the shells that there are",
        "Ask for one of them (env takes options after -S only), or name its toolchain executable, and an image with it",
    )


def _shell_check(source: Source) -> list[str]:
    """The start of a command that has the script's shell read it and do nothing."""
    shell, *options = _shell(source)
    # bash takes long options before all others only, and nothing is an option after - or --.
    long = next((at for at, word in enumerate(options) if not word.startswith("--") or word == "--"), len(options))
    return [shell, *options[:long], "-n", *options[long:]]


# The tree is copied, since what came in cannot be written, with its mtimes, by which make decides. The artifact is
# moved, not copied: whatever it is (a link, a fifo) arrives as that, and is looked at from outside.
_MAKE: Final = (
    "/bin/sh",
    "-c",
    """
set -e
cp -R --preserve=timestamps -- "$1/." "$4"
cd "$4"
artifact=$2 output=$3
shift 4
make "$@"
if [ ! -e "$artifact" ] && [ ! -L "$artifact" ]; then
    echo "make ended well, but there is no file $artifact" >&2
    exit 1
fi
mv -T -- "$artifact" "$output"
""",
    "make",
)


@cache
def build_driver() -> bytes:
    """The driver of builds that make an archive."""
    return (Path(__file__).parent / "data" / "build_archive.py").read_bytes()


TOOLCHAINS: Final = (
    Toolchain(
        name="c",
        suffixes=_C,
        build=_compiled_by("/usr/bin/gcc", "c", "gnu17", _C),
        beside=(".h",),
        needs=("gcc", "libc6-dev"),
        doc="C, by the image's gcc: optimised, linked with libm and threads.",
    ),
    Toolchain(
        name="cpp",
        suffixes=_CPP,
        build=_compiled_by("/usr/bin/g++", "c++", "gnu++20", _CPP),
        beside=_HEADERS,
        needs=("g++", "libc6-dev"),
        doc="C++20, by the image's g++: optimised, linked with libm and threads.",
    ),
    Toolchain(
        name="python",
        suffixes=(".py",),
        build=_build_archive,
        archive=True,
        start=_started_by(_PYTHON),
        needs=("python3",),
        entries=("main.py", "__main__.py", "app.py"),
        doc="Python, by the image's python3: checked, byte-compiled, started as a script.",
    ),
    Toolchain(
        name="shell",
        suffixes=(".sh", ".bash"),
        build=lambda source: _build_archive(source, *_shell_check(source)),
        archive=True,
        start=lambda source: [*_shell(source), f"{PROGRAM_FOLDER}/{source.name}"],
        needs=("bash",),
        entries=("main.sh", "run.sh", "main.bash"),
        doc="Shell: checked, started by the shell of its first line with its options, else bash.",
    ),
    Toolchain(
        name="javascript",
        suffixes=(".js", ".mjs", ".cjs"),
        beside=("package.json",),
        build=_checked_by("/usr/bin/node", "--check"),
        archive=True,
        start=_started_by("/usr/bin/node"),
        needs=("nodejs",),
        entries=("main.js", "main.mjs", "main.cjs", "index.js", "index.mjs", "index.cjs"),
        doc="JavaScript, by the image's node: checked, started as a script or a module.",
    ),
    Toolchain(
        name="perl",
        suffixes=(".pl",),
        beside=(".pm",),
        build=_checked_by("/usr/bin/perl", "-I.", "-Ilib", "-c"),
        archive=True,
        start=_started_by("/usr/bin/perl", f"-I{PROGRAM_FOLDER}", f"-I{PROGRAM_FOLDER}/lib"),
        needs=("perl-base",),
        entries=("main.pl",),
        doc="Perl, by the image's perl: checked with its modules, started as a script.",
    ),
    Toolchain(
        name="lua",
        suffixes=(".lua",),
        build=_checked_by("/usr/bin/luac5.4", "-p"),
        archive=True,
        start=_started_by("/usr/bin/lua5.4", "-e", f"package.path = '{_LUA_PATH};' .. package.path"),
        needs=("lua5.4",),
        entries=("main.lua",),
        doc="Lua 5.4, by the image's lua5.4: checked, started as a script.",
    ),
    Toolchain(
        name="make",
        suffixes=(),
        beside=(*MAKEFILES, *_C, *_CPP, *_HEADERS, ".s", ".mk"),
        build=lambda source: [*_MAKE, source.folder, source.artifact, OUTPUT, "/x07/out/tree", *source.args],
        needs=("make",),
        artifact=True,
        doc="A project with a Makefile: make, then the artifact that the manifest names.",
    ),
    Toolchain(
        name="executable",
        suffixes=(),
        build=None,
        entries=(),
        doc="A ready Linux executable, or a script that names its interpreter: run as it is.",
    ),
)
BY_NAME: Final = {toolchain.name: toolchain for toolchain in TOOLCHAINS}


def toolchain_named(name: str) -> Toolchain:
    """The toolchain of that name. Raises UsageError."""
    if name not in BY_NAME:
        raise UsageError(f"no toolchain {name!r}", "there is none of that name", f"Use one of {', '.join(BY_NAME)}")
    return BY_NAME[name]


def toolchain_for(path: str, head: bytes = b"") -> Toolchain:
    """The toolchain of a source file, by its suffix, else by its first bytes. Raises UsageError."""
    suffix = PurePosixPath(path).suffix.lower()
    for toolchain in TOOLCHAINS:
        if suffix in toolchain.suffixes:
            return toolchain
    if head.startswith((_ELF, b"#!")):
        return BY_NAME["executable"]
    known = ", ".join(suffix for toolchain in TOOLCHAINS for suffix in toolchain.suffixes)
    raise UsageError(
        f"cannot run {path}",
        f"{suffix or 'no suffix'} names no toolchain, and it is no executable",
        f"Name the source with one of {known}, or its toolchain (x07 run --toolchain)",
    )


def require_packages(
    toolchain: Toolchain, installed: Collection[str], image: str, included: Sequence[str] = ()
) -> None:
    """Refuse an image that lacks what *toolchain* needs. Raises RefusedError.

    image: how a user names it. included: packages that were added to it, which the command in the error keeps.
    """
    missing = [name for name in toolchain.needs if name not in installed]
    build = f"Run x07 image build --name {image}"
    if missing == ["x07"]:
        fix = f"{build} --x07-toolchain DIR, with X07's Linux build in DIR"
        raise RefusedError("cannot run an X07 program", f"the image {image} carries no X07 toolchain", fix)
    if missing:
        what, why = f"the image {image} cannot run {toolchain.name} programs", f"it has no {', '.join(missing)}"
        raise RefusedError(what, why, f"{build} --include {','.join([*included, *missing])}")


def check_executable(path: str, head: bytes, machine: str, elf_machine: int) -> None:
    """Refuse an executable of another machine. elf_machine: e_machine of the guest's (elf(5)). Raises UsageError."""
    if not head.startswith(_ELF):
        if head.startswith(b"#!"):
            return
        why = "it is neither an ELF file nor a script"
        raise UsageError(f"cannot run {path}", why, "Name its toolchain (x07 run --toolchain)")
    # 64 bits, little endian; e_machine is at 18 (elf(5)).
    if head[4:6] != b"\x02\x01" or head[18:20] != elf_machine.to_bytes(2, "little"):
        raise UsageError(f"cannot run {path}", f"it is no executable for {machine}", "Build it for that machine")


def source_name(path: str) -> str:
    """The name under which a source travels: its own, if that is harmless. Raises UsageError."""
    what, fix, name = f"cannot run {path!r}", "Rename the file", PurePosixPath(path).name
    if any("\udc80" <= char <= "\udcff" for char in name):
        raise UsageError(what, "its name is no UTF-8", fix)
    too_long = len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX
    if not name or name.startswith((".", "-")) or not name.isprintable() or too_long:
        raise UsageError(what, "its name begins with '.' or '-', is too long or has control characters", fix)
    return name


def describe(rows: Sequence[Toolchain] = TOOLCHAINS) -> str:
    """One line a toolchain, for help texts."""
    names = {row.name: f" ({', '.join(row.suffixes)})" if row.suffixes else "" for row in rows}
    return "\n".join(f"  {row.name}{names[row.name]}: {row.doc}" for row in rows)
