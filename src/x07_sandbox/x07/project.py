"""The project file of the X07 language, the protocol of its programs, and the command line of its compiler.

A program reads one frame and writes one. A frame is a length of four bytes, little-endian, then the data. The compiler
(x07-os-runner --compile-only) reads the policy and the input from files. docs/reference/x07.md describes these formats.
"""

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, NoReturn

import msgspec
from msgspec.structs import replace

from x07_sandbox.channel.messages import IN
from x07_sandbox.errors import Flag, UsageError
from x07_sandbox.host.documents import prepared, why_invalid
from x07_sandbox.programs.toolchains import OUTPUT, BuildExtras, Protocol, Toolchain

PROJECT_FILE: Final = "x07.json"
SOURCE_SUFFIX: Final = ".x07.json"
LOCK_FILE: Final = "x07.lock.json"
MAX_BYTES: Final = 1 << 20
RUNNER: Final = "/usr/local/bin/x07-os-runner"
PROGRAM: Final = "program/main.x07.json"
WORLD: Final = "run-os-sandboxed"
_VERSION: Final = "x07.project@0.5.0"  # of new projects
_ENTRIES: Final = ("src/main.x07.json", "main.x07.json")
_PROFILE: Final = "sandbox"
_VERSIONS: Final = re.compile(r"x07\.project@0\.[2-5]\.0")
_CHOICES: Final = ("dev", "os")
_MOST: Final = 1 << 48

Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of X07's compiler and runtime, named after flags; None if not given. module_roots: host folders."""

    solve_fuel: int | None = None
    max_memory_bytes: int | None = None
    cpu_time_limit_seconds: int | None = None
    max_output_bytes: int | None = None
    cc_profile: Literal["default", "size"] | None = None
    max_c_bytes: int | None = None
    compat: str | None = None
    debug_borrow_checks: bool | None = None
    auto_ffi: bool | None = None
    module_roots: tuple[str, ...] = ()


DEFAULTS: Final[dict[str, Any]] = {
    "cc_profile": "default",
    "solve_fuel": 50_000_000,
    "max_memory_bytes": 64 << 20,
    "cpu_time_limit_seconds": 30,
    "max_output_bytes": 1 << 20,
}


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One profile of a project. policy: a path relative to the project. Other keys of a profile are ignored."""

    world: str
    policy: str | None = None
    input: str | None = None
    auto_ffi: bool = True
    solve_fuel: Count | None = None
    cpu_time_limit_seconds: Count | None = None
    max_memory_bytes: Count | None = None
    max_output_bytes: Count | None = None
    cc_profile: Literal["default", "size"] | None = None


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a project file that a run needs. The compiler reads the other parts."""

    schema_version: str
    profiles: dict[str, Profile] = {}
    default_profile: str | None = None
    lockfile: str | None = None


def decode_project(data: bytes, *, source: str) -> Project:
    """Decode a project file. Raises UsageError."""
    try:
        project = msgspec.json.decode(data, type=prepared(Project))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        _wrong(source, why_invalid(exc))
    if not _VERSIONS.fullmatch(project.schema_version):
        _wrong(source, f"its version is {project.schema_version[:80]!r}, not x07.project@0.2.0 to 0.5.0")
    paths = [("lockfile", project.lockfile or None)]
    for name, profile in project.profiles.items():
        paths += [(f"profiles.{name}.policy", profile.policy), (f"profiles.{name}.input", profile.input)]
    for key, path in paths:
        if path is None:
            continue
        if not path.strip() or path.startswith("/") or "\0" in path or ".." in PurePosixPath(path).parts:
            _wrong(source, f"{key[:80]}: {path[:80]!r} is not a path inside the project")
    return project


def choose_profile(project: Project, name: str | None, *, source: str) -> Profile | None:
    """Return the profile *name*. Without a name, return the default profile, or else `dev`, or else `os`.

    Return None if no name is given and the project has no profiles. Raises UsageError.
    """
    if not project.profiles and name is None:
        return None
    wanted = [name] if name is not None else [*filter(None, [project.default_profile]), *_CHOICES]
    for candidate in wanted:
        if candidate in project.profiles:
            return project.profiles[candidate]
        if candidate in {name, project.default_profile}:
            break
    known = ", ".join(project.profiles)[:200] or "none"
    why = f"there is no profile {name!r}" if name is not None else "no profile is the default"
    raise UsageError(f"cannot run the project {source}", f"{why}; it has {known}", "Choose one with --profile")


def merged(options: Options, profile: Profile | None) -> Options:
    """Return the options to use: *options* (flags) override the profile, which overrides X07's defaults."""
    values = DEFAULTS | {"auto_ffi": True}
    for given in (profile, options):
        found = {name: getattr(given, name, None) for name in Options.__struct_fields__}
        values |= {name: value for name, value in found.items() if value is not None}
    return Options(**values)


def compile_argv(options: Options, target: Sequence[str]) -> list[str]:
    """Return the compiler's command line. target: --program or --project with its path, and module roots."""
    words = [RUNNER, "--cc-profile", str(options.cc_profile), "--world", WORLD]
    words += ["--sandbox-backend", "os", "--i-accept-weaker-isolation"]
    if options.max_c_bytes is not None:
        words += ["--max-c-bytes", str(options.max_c_bytes)]
    words += ["--policy", _POLICY, "--input", _INPUT]
    for name in ("solve_fuel", "max_memory_bytes", "max_output_bytes", "cpu_time_limit_seconds"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.compat is not None:
        words += ["--compat", options.compat]
    words += ["--debug-borrow-checks"] if options.debug_borrow_checks else []
    words += ["--compiled-out", OUTPUT, "--compile-only"]
    return [*words, *(["--auto-ffi"] if options.auto_ffi else []), *target]


def arguments_as_input(args: Sequence[str]) -> bytes:
    """Return arguments as the input of an X07 program (argv_v1): their number, then each one after its length."""
    encoded = [arg.encode("utf-8", "surrogateescape") for arg in args]
    return struct.pack("<I", len(encoded)) + b"".join(struct.pack("<I", len(arg)) + arg for arg in encoded)


def is_x07(path: Path) -> bool:
    """Return whether *path* is a program or project in the X07 language."""
    if path.name == PROJECT_FILE or path.name.endswith(SOURCE_SUFFIX):
        return True
    # x07.json may be a file of any type. The code that reads it reports an error for a wrong type.
    return os.path.lexists(path / PROJECT_FILE) and not os.path.lexists(path / "x07-sandbox.toml")


def diagnostics_line(messages: Sequence[str]) -> str:
    """Return schema errors of a policy as one line of JSON, in the form of X07's tools."""
    kind = {"code": "X07-POLICY-SCHEMA-0001", "severity": "error", "stage": "parse"}
    rows = [kind | {"message": message} for message in messages]
    return json.dumps({"schema_version": "x07.x07diag@0.1.0", "ok": False, "diagnostics": rows})


def first_project(files: Sequence[str], policy: str) -> bytes:
    """Return a new x07.json with one profile for *policy*. Its entry is main.x07.json or the only X07 source."""
    sources = [name for name in files if name.endswith(SOURCE_SUFFIX)]
    usual = [name for name in _ENTRIES if name in sources]
    entry = usual[0] if usual else sources[0] if len(sources) == 1 else _ENTRIES[0]
    document = {
        "schema_version": _VERSION,
        "world": WORLD,
        "entry": entry,
        "module_roots": [str(PurePosixPath(entry).parent)],
        "dependencies": [],
        "lockfile": LOCK_FILE,
        "default_profile": _PROFILE,
        "profiles": {_PROFILE: {"world": WORLD, "policy": policy}},
    }
    data = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    decode_project(data, source=PROJECT_FILE)
    return data


def _wrong(source: str, why: str) -> NoReturn:
    raise UsageError(f"cannot read the project file {source}", why, "Correct the file; see X07's documentation")


WORKSPACE: Final = "/usr/local/lib/x07"
INPUT_MAX_BYTES: Final = 64 << 20
HEAD_BYTES: Final = 4  # of a frame: its length
STDERR_MAX_BYTES: Final = 256 << 10  # independent of the output limit
USAGE_EXIT: Final = 2
_POLICY: Final = f"{IN}/policy.json"
_INPUT: Final = f"{IN}/input.bin"


class X07Protocol:
    """The protocol of X07 programs, as an implementation of `Protocol` in programs/toolchains."""

    input_max_bytes: Final = INPUT_MAX_BYTES
    usage_exit: Final = USAGE_EXIT

    def require_policy(self, *, given: bool) -> None:
        """Raise UsageError unless a policy is given: X07 programs have no default policy."""
        if not given:
            why = f"X07 programs in {WORLD} require a policy"
            fix = ("Add ", Flag("--policy"), ", or set it in the project's profile")
            raise UsageError("no policy given", why, fix)

    def build_extras(self, policy: bytes) -> BuildExtras:
        """Return the files that the compiler reads: the policy, and an input that does not affect the artifact."""
        env = {"X07_WORKSPACE_ROOT": WORKSPACE}
        return BuildExtras(files={_POLICY: policy, _INPUT: b""}, env=env, key=(policy,))

    def run_files(self, data: bytes) -> Mapping[str, bytes]:
        """Return the files, by path, that a program reads in the run VM: one file with the whole input *data*."""
        return {_INPUT: data}

    def frame_input(self, data: bytes) -> bytes:
        """Return the data as one frame."""
        return struct.pack("<I", len(data)) + data

    def output_caps(self, most: int) -> tuple[int, int]:
        """Return the limits for standard output (*most* bytes after the frame's header) and for standard error."""
        return most + HEAD_BYTES, STDERR_MAX_BYTES


PROTOCOL: Final[Protocol] = X07Protocol()
# Selected only by the kind of program, not by --toolchain.
X07: Final = Toolchain(
    name="x07",
    suffixes=(),
    build=lambda source: list(source.args),
    needs=("x07",),
    protocol=PROTOCOL,
    doc="The X07 language, compiled by the X07 toolchain in the image.",
)
# An executable that X07's compiler made earlier. There is nothing to build, but the program reads and writes frames.
X07_ARTIFACT: Final = replace(X07, build=None, needs=(), doc="An executable that X07's compiler made earlier.")
