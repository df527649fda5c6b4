"""The table of toolchains: how a source is built in the build VM, and how the artifact is started in the run VM."""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.channel.messages import IN, OUT
from x07_sandbox.errors import Command, Flag, RefusedError, UsageError

if TYPE_CHECKING:
    from x07_sandbox.policy.hints import ImageInUse


class BuildExtras(msgspec.Struct, frozen=True, kw_only=True):
    """Data that the compiler gets in addition to the source."""

    files: Mapping[str, bytes]  # contents by path in the build VM
    env: Mapping[str, str]  # additional environment variables
    key: tuple[bytes, ...]  # data that changes the artifact, for its cache key


class Protocol(typing.Protocol):
    """The conventions between a run, a compiler and its programs."""

    @property
    def input_max_bytes(self) -> int:
        """The size limit for the input. The whole input is read before the run."""

    @property
    def usage_exit(self) -> int:
        """The exit code of a command after a usage error."""

    def require_policy(self, *, given: bool) -> None:
        """Raise UsageError if programs of this protocol need an explicit policy and *given* is false."""

    def build_extras(self, policy: bytes) -> BuildExtras:
        """Return the data that the compiler gets. policy: the policy document of the run."""

    def run_files(self, data: bytes) -> Mapping[str, bytes]:
        """Return the files for the run VM: contents by path. data: the whole input."""

    def frame_input(self, data: bytes) -> bytes:
        """Return the input in the form that the program reads from standard input."""

    def output_caps(self, most: int) -> tuple[int, int]:
        """Return the limits for standard output and standard error. most: limit for the program's output in bytes."""


OUTPUT: Final = f"{OUT}/compiled-out"
ARTIFACT: Final = f"{IN}/artifact"
PROGRAM_FOLDER: Final = f"{IN}/program"
_PYTHON: Final = "/usr/bin/python3"
_SHELLS: Final = ("sh", "dash", "bash")
_SHELL_FOLDERS: Final = frozenset({"", "/bin", "/usr/bin", "/usr/local/bin"})
_ENV: Final = frozenset({"/usr/bin/env", "/bin/env"})
_ENV_SYNTAX: Final = frozenset("\"'\\$#")  # characters that env -S interprets
_NAME_MAX: Final = 200  # bytes; byte code has a longer name, and the file system's limit is 255
_ELF: Final = b"\x7fELF"


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source in the build VM. Names are relative to the folder."""

    name: str  # the file to start; "" if there is none (make)
    folder: str = IN
    files: tuple[str, ...] = ()  # all files below the folder, sorted; () for a single file
    head: bytes = b""  # the first bytes of the file to start
    args: tuple[str, ...] = ()  # arguments for the build tool
    artifact: str = ""  # the file that make builds

    @property
    def path(self) -> str:
        """The path of the file to start."""
        return f"{self.folder}/{self.name}"

    @property
    def driver(self) -> str:
        """The path of the script `build_driver()` in the build VM, if the toolchain packs the program."""
        return f"{IN}/{'driver.py' if self.name != 'driver.py' else 'build.py'}"

    def with_suffixes(self, suffixes: tuple[str, ...]) -> list[str]:
        """Return the paths of the files that have one of these suffixes."""
        if not self.files:
            return [self.path]
        return [f"{self.folder}/{name}" for name in self.files if PurePosixPath(name).suffix.lower() in suffixes]


class Toolchain(msgspec.Struct, frozen=True, kw_only=True):
    """One language, or one way to build."""

    name: str
    suffixes: tuple[str, ...]  # of source files, in lower case
    beside: tuple[str, ...] = ()  # suffixes and names of other files that `x07 init` includes
    # Returns the build's command line, which starts with a path. None: the source is the artifact.
    build: Callable[[Source], list[str]] | None
    # Whether `build_driver()` builds. Its artifact is a tree, unpacked to PROGRAM_FOLDER; others are at ARTIFACT.
    packs: bool = False
    start: Callable[[Source], list[str]] = lambda _source: [ARTIFACT]  # returns the program's command line
    needs: tuple[str, ...] = ()  # Debian packages of the image; "x07" stands for X07's own toolchain
    protocol: Protocol | None = None  # hooks for programs that need more than bytes and arguments
    # Usual names of the file to start, the preferred one first. None: a project does not specify that file.
    entries: tuple[str, ...] | None = None
    # Whether a project specifies the file that its build creates. Such a toolchain builds only projects.
    artifact: bool = False
    doc: str

    @property
    def project_files(self) -> tuple[str, ...]:
        """Suffixes and names of the files in its projects; () if it has no projects of source files."""
        return self.suffixes + self.beside


_C: Final = (".c",)
_CPP: Final = (".cpp", ".cc", ".cxx", ".c++")
_HEADERS: Final = (".h", ".hpp", ".hh", ".hxx")
_LUA_PATH: Final = f"{PROGRAM_FOLDER}/?.lua;{PROGRAM_FOLDER}/?/init.lua"
MAKEFILES: Final = ("GNUmakefile", "makefile", "Makefile")  # in make's order


def _compiled_by(
    compiler: str, language: str, standard: str, suffixes: tuple[str, ...]
) -> Callable[[Source], list[str]]:

    def build(source: Source) -> list[str]:
        given = ["-x", language, *source.with_suffixes(suffixes), "-x", "none"]
        return [compiler, f"-std={standard}", "-O2", "-o", OUTPUT, *source.args, *given, "-lm", "-lpthread"]

    return build


def _packed(source: Source, *check: str) -> list[str]:
    words = ["tree" if source.files else "file", source.folder, source.name, PROGRAM_FOLDER, OUTPUT]
    return [_PYTHON, source.driver, *words, *check]


def _checked_by(*check: str) -> Callable[[Source], list[str]]:
    return lambda source: _packed(source, *check)


def _started_by(*interpreter: str) -> Callable[[Source], list[str]]:
    return lambda source: [*interpreter, f"{PROGRAM_FOLDER}/{source.name}"]


def _first_line(head: bytes) -> list[str]:
    """Return the interpreter and options of a #! line as the kernel and env(1) read it, or [] without a #! line."""
    line = head.partition(b"\n")[0].decode("utf-8", "surrogateescape").strip()
    words = line[2:].split(None, 1) if line.startswith("#!") else []
    if len(words) > 1 and words[0] in _ENV:
        # The kernel passes the rest of the line as one word. For env that is a program, or after -S a line of words.
        rest = words[1]
        split = rest.startswith("-S") and not set(rest) & _ENV_SYNTAX
        return (rest[2:].split() if split else None) or [rest]
    return words


def _shell(source: Source) -> list[str]:
    words = _first_line(source.head)
    if not words:
        return ["/bin/bash"]
    folder, _, name = words[0].rpartition("/")
    if folder in _SHELL_FOLDERS and name in _SHELLS and all(word.isprintable() for word in words):
        return [f"/bin/{name}", *words[1:]]
    raise UsageError(
        f"cannot run {source.name} as a shell script",
        f"the interpreter in its first line is {' '.join(words)!r}; the supported shells are {', '.join(_SHELLS)}",
        (
            "Use one of them (with options: env -S), or ",
            Flag("--toolchain executable"),
            " with an image that has that shell",
        ),
    )


def _shell_check(source: Source) -> list[str]:
    shell, *options = _shell(source)
    # bash accepts long options only before all others, and no options after - or --.
    long = next((at for at, word in enumerate(options) if not word.startswith("--") or word == "--"), len(options))
    return [shell, *options[:long], "-n", *options[long:]]


# The read-only tree is copied with its mtimes, because make needs them. The artifact is moved, not copied: a link or a
# fifo stays what it is, and is checked outside the VM.
_MAKE: Final = (
    "/bin/sh",
    "-c",
    """
set -e
cp -R --preserve=timestamps -- "$1/." "$4"
cd "$4"
sources=$1 artifact=$2 output=$3
shift 4
make "$@"
if [ ! -e "$artifact" ] && [ ! -L "$artifact" ]; then
    echo "make succeeded, but did not build $artifact. Set artifact in the manifest to the file that it builds" >&2
    find . -type f -perm -100 | head -n 1000 | while read -r file; do
        [ -e "$sources/$file" ] || echo "it built the program ${file#./}" >&2
    done
    exit 1
fi
mv -T -- "$artifact" "$output"
""",
    "make",
)


@cache
def build_driver() -> bytes:
    """Return the script for builds that pack the program."""
    return (Path(__file__).parent / "data" / "build_tree.py").read_bytes()


TOOLCHAINS: Final = (
    Toolchain(
        name="c",
        suffixes=_C,
        build=_compiled_by("/usr/bin/gcc", "c", "gnu17", _C),
        beside=(".h",),
        needs=("gcc", "libc6-dev"),
        doc="C, compiled by gcc with optimisation, and linked with libm and threads.",
    ),
    Toolchain(
        name="cpp",
        suffixes=_CPP,
        build=_compiled_by("/usr/bin/g++", "c++", "gnu++20", _CPP),
        beside=_HEADERS,
        needs=("g++", "libc6-dev"),
        doc="C++20, compiled by g++ with optimisation, and linked with libm and threads.",
    ),
    Toolchain(
        name="python",
        suffixes=(".py",),
        build=_packed,
        packs=True,
        start=_started_by(_PYTHON),
        needs=("python3",),
        entries=("main.py", "__main__.py", "app.py"),
        doc="Python. The build checks and byte-compiles the source.",
    ),
    Toolchain(
        name="shell",
        suffixes=(".sh", ".bash"),
        build=lambda source: _packed(source, *_shell_check(source)),
        packs=True,
        start=lambda source: [*_shell(source), f"{PROGRAM_FOLDER}/{source.name}"],
        needs=("bash",),
        entries=("main.sh", "run.sh", "main.bash"),
        doc="Shell, run by the shell in its first line, else by bash. The build checks the source.",
    ),
    Toolchain(
        name="javascript",
        suffixes=(".js", ".mjs", ".cjs"),
        beside=("package.json",),
        build=_checked_by("/usr/bin/node", "--check"),
        packs=True,
        start=_started_by("/usr/bin/node"),
        needs=("nodejs",),
        entries=("main.js", "main.mjs", "main.cjs", "index.js", "index.mjs", "index.cjs"),
        doc="JavaScript, run by node as a script or a module. The build checks the source.",
    ),
    Toolchain(
        name="perl",
        suffixes=(".pl",),
        beside=(".pm",),
        build=_checked_by("/usr/bin/perl", "-I.", "-Ilib", "-c"),
        packs=True,
        start=_started_by("/usr/bin/perl", f"-I{PROGRAM_FOLDER}", f"-I{PROGRAM_FOLDER}/lib"),
        needs=("perl-base",),
        entries=("main.pl",),
        doc="Perl. The build checks the source and its modules.",
    ),
    Toolchain(
        name="lua",
        suffixes=(".lua",),
        build=_checked_by("/usr/bin/luac5.4", "-p"),
        packs=True,
        start=_started_by("/usr/bin/lua5.4", "-e", f"package.path = '{_LUA_PATH};' .. package.path"),
        needs=("lua5.4",),
        entries=("main.lua",),
        doc="Lua 5.4. The build checks the source.",
    ),
    Toolchain(
        name="make",
        suffixes=(),
        beside=(*MAKEFILES, *_C, *_CPP, *_HEADERS, ".s", ".mk"),  # `x07 init` adds all other sources
        build=lambda source: [*_MAKE, source.folder, source.artifact, OUTPUT, f"{OUT}/tree", *source.args],
        needs=("make",),
        artifact=True,
        doc="A project with a Makefile. make builds the artifact that the manifest specifies.",
    ),
    Toolchain(
        name="executable",
        suffixes=(),
        build=None,
        entries=(),
        doc="A Linux executable, or a script with a #! line. It is not built.",
    ),
)
BY_NAME: Final = {toolchain.name: toolchain for toolchain in TOOLCHAINS}


def toolchain_named(name: str) -> Toolchain:
    """Return the toolchain called *name*. Raises UsageError."""
    if name not in BY_NAME:
        raise UsageError(f"cannot use the toolchain {name!r}", "it does not exist", f"Use one of {', '.join(BY_NAME)}")
    return BY_NAME[name]


def toolchain_for(path: str, head: bytes = b"") -> Toolchain:
    """Return the toolchain for a source file, by its suffix or else by its first bytes. Raises UsageError."""
    suffix = PurePosixPath(path).suffix.lower()
    for toolchain in TOOLCHAINS:
        if suffix in toolchain.suffixes:
            return toolchain
    if head.startswith((_ELF, b"#!")):
        return BY_NAME["executable"]
    from shlex import quote  # only for this error

    known = ", ".join(suffix for toolchain in TOOLCHAINS for suffix in toolchain.suffixes)
    raise UsageError(
        f"cannot run {path}",
        f"no toolchain handles {f'{suffix} files' if suffix else 'files without a suffix'}, and the file is neither "
        "an ELF executable nor a script with a #! line",
        (
            f"Rename the file (known suffixes: {known}), add a #! line, or choose a toolchain: ",
            Command(f"x07 run --toolchain T {quote(path)}"),
        ),
    )


def require_packages(toolchain: Toolchain, installed: Collection[str], get_image: Callable[[], ImageInUse]) -> None:
    """Raise RefusedError if the image, which has *installed* packages, lacks packages that *toolchain* needs."""
    missing = [name for name in toolchain.needs if name not in installed]
    if not missing:
        return
    image = get_image()
    if missing == ["x07"]:
        fix = f"Run x07 image build --name {image.name} --x07-toolchain DIR, where DIR contains X07's Linux build"
        why = f"the image {image.name} has no X07 toolchain"
        raise RefusedError("cannot run an X07 program", why, fix, code="no-toolchain")
    what, why = f"the image {image.name} cannot run {toolchain.name} programs", f"it lacks {', '.join(missing)}"
    raise RefusedError(what, why, ("Run: ", Command(image.adding("--include", missing).text)), code="no-toolchain")


def check_executable(path: str, head: bytes, machine: str, elf_machine: int) -> None:
    """Raise UsageError if a file is no executable for the guest's *machine*. elf_machine: its e_machine (elf(5))."""
    if not head.startswith(_ELF):
        if head.startswith(b"#!"):
            return
        why = "it is neither an ELF file nor a script"
        raise UsageError(f"cannot run {path}", why, ("Add ", Flag("--toolchain"), " with its language"))
    # 64 bits, little endian; e_machine is at offset 18 (elf(5)).
    if head[4:6] != b"\x02\x01" or head[18:20] != elf_machine.to_bytes(2, "little"):
        raise UsageError(
            f"cannot run {path}", f"it is not an executable for {machine}", f"Build it for Linux on {machine}"
        )


def source_name(path: str) -> str:
    """Return the name of a source file in the guest, which is its own name. Raises UsageError for an unsafe name."""
    what, fix, name = f"cannot run {path!r}", "Rename the file", PurePosixPath(path).name
    if any("\udc80" <= char <= "\udcff" for char in name):
        raise UsageError(what, "its name is not UTF-8", fix)
    too_long = len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX
    if not name or name.startswith((".", "-")) or not name.isprintable() or too_long:
        raise UsageError(what, "its name begins with '.' or '-', is too long or has control characters", fix)
    return name


def describe() -> str:
    """Return one line of text for each toolchain."""
    suffixes = {row.name: f" ({', '.join(row.suffixes)})" if row.suffixes else "" for row in TOOLCHAINS}
    return "\n".join(f"  {row.name}{suffixes[row.name]}: {row.doc}" for row in TOOLCHAINS)
