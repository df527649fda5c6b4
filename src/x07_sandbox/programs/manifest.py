"""The manifest x07-sandbox.toml: the files of a project, and how to build and run it."""

import difflib
import os
import tomllib
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, NoReturn

import msgspec

from x07_sandbox.errors import Command, UsageError
from x07_sandbox.host.decoding import prepared, why_invalid
from x07_sandbox.host.paths import is_folder
from x07_sandbox.programs.toolchains import Toolchain, toolchain_named

FILE: Final = "x07-sandbox.toml"
SCHEMA: Final = "x07.sandbox.project@0.1.0"
MAX_BYTES: Final = 16 * 1024  # tomllib needs up to 3 s for dotted keys, and its time grows with the square
FILES_MAX: Final = 1024  # of the entries of `files`
RelativePath = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Word = Annotated[str, msgspec.Meta(max_length=131_072)]


class BuildTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[build]`. args: arguments for make, or for the compiler before the sources."""

    args: Annotated[tuple[Word, ...], msgspec.Meta(max_length=256)] = ()


class RunTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[run]`: defaults for a run. input: a file of the project."""

    args: Annotated[tuple[Word, ...], msgspec.Meta(max_length=1024)] = ()
    input: RelativePath | None = None
    env: Annotated[dict[str, Word], msgspec.Meta(max_length=256)] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A project's manifest. Paths are relative to its folder."""

    schema_version: str
    toolchain: str
    # Names of files, or patterns with *, ?, [] and **.
    files: Annotated[tuple[RelativePath, ...], msgspec.Meta(min_length=1, max_length=FILES_MAX)]
    entry: RelativePath | None = None  # the file to start, for scripts and executables
    artifact: RelativePath | None = None  # the file that make builds
    policy: RelativePath | None = None
    image: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    build: BuildTable = BuildTable()
    run: RunTable = RunTable()


def decode_manifest(data: bytes, *, source: str) -> tuple[Manifest, Toolchain]:
    """Return the manifest in *data*, and its toolchain. Raises UsageError. source: its name in errors."""
    if len(data) > MAX_BYTES:
        _wrong(source, f"it is larger than {MAX_BYTES} bytes")
    try:
        value = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as exc:
        _wrong(source, f"it is not UTF-8 text (byte {exc.start})")
    except RecursionError:
        _wrong(source, "it is nested too deep")
    except ValueError as exc:  # tomllib's own error, or int()'s about too many digits
        _wrong(source, f"it is not valid TOML ({exc})")
    found = value.get("schema_version")
    if found != SCHEMA:
        shown = repr(found[:64]) if isinstance(found, str) else "missing" if found is None else type(found).__name__
        _wrong(source, f'schema_version is {shown}; this version of x07 requires schema_version = "{SCHEMA}"')
    _check_keys(value, source)
    try:
        manifest = msgspec.convert(value, prepared(Manifest))
    except msgspec.ValidationError as exc:
        _wrong(source, why_invalid(exc))
    toolchain = toolchain_named(manifest.toolchain)
    _check(manifest, toolchain, source)
    # Normalized like the names of files: without `./` and `//`.
    paths = {"entry": manifest.entry, "artifact": manifest.artifact}
    normal = {key: str(PurePosixPath(path)) for key, path in paths.items() if path is not None}
    return msgspec.structs.replace(manifest, **normal), toolchain


def _check_keys(value: dict[str, object], source: str) -> None:
    tables = (("", value, Manifest), ("build.", value.get("build"), BuildTable), ("run.", value.get("run"), RunTable))
    for prefix, table, model in tables:
        known = [field.encode_name for field in msgspec.structs.fields(model)]
        for key in table if isinstance(table, dict) else ():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {prefix}{near[0]}?" if near else ""
                _wrong(source, f"there is no key {prefix}{key[:64]}{hint}")


def _check(manifest: Manifest, toolchain: Toolchain, source: str) -> None:
    for key, path in (
        ("entry", manifest.entry),
        ("artifact", manifest.artifact),
        ("policy", manifest.policy),
        ("run.input", manifest.run.input),
        *(("files", pattern) for pattern in manifest.files),
    ):
        if path is None:
            continue
        parts = PurePosixPath(path).parts  # of `.` there are none
        if path.startswith("/") or "\0" in path or ".." in parts or not parts:
            _wrong(source, f"{key}: {path!r} is not a path inside the project")
    if toolchain.entries is not None and manifest.entry is None:
        _wrong(source, f"{toolchain.name} projects need `entry`: the file that is started")
    if toolchain.entries is None and manifest.entry is not None:
        _wrong(source, f"{toolchain.name} projects compile their `files` and cannot have `entry`")
    if toolchain.artifact != (manifest.artifact is not None):
        needs = "need `artifact`: the file that the build creates" if toolchain.artifact else "cannot have `artifact`"
        _wrong(source, f"{toolchain.name} projects {needs}")
    if manifest.build.args and (toolchain.archive or toolchain.build is None):
        _wrong(source, f"{toolchain.name} projects cannot have [build] args")


def find_manifest(program: Path) -> Path | None:
    """Return the manifest that *program* is or contains, or None for any other file.

    Raises UsageError for a folder that contains no manifest.
    """
    if program.name == FILE:
        return program
    if not is_folder(program):
        return None
    manifest = program / FILE
    if os.path.lexists(manifest):
        return manifest
    fix = ("Create one (x07 init --toolchain T), or run a source file: ", Command(f"x07 run {program}/FILE"))
    raise UsageError(f"cannot run the folder {program}", f"it has no {FILE}", fix)


def _wrong(source: str, why: str) -> NoReturn:
    raise UsageError(f"the manifest {source} is invalid", why, "See docs/reference/programs.md")
