"""A project: its folder, which may be hostile, and its manifest, x07-sandbox.toml.

The manifest lists the files of a project, and says how to build and run it. The first one is written from the names of
its files. File names are opened only inside the folder, and opening never blocks. Documents are written into it
atomically, without following links.
"""

import contextlib
import difflib
import errno
import glob
import json
import os
import stat
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, NoReturn

import msgspec

from x07_sandbox.errors import Command, Text, UsageError
from x07_sandbox.host.documents import prepared, why_invalid
from x07_sandbox.host.linux import fd_path, path_flag
from x07_sandbox.host.paths import closing_fd, is_file, is_folder, real_path
from x07_sandbox.programs.toolchains import MAKEFILES, TOOLCHAINS, Toolchain, toolchain_named

FILE: Final = "x07-sandbox.toml"
SCHEMA: Final = "x07.sandbox.project@0.1.0"
MAX_BYTES: Final = 16 * 1024  # tomllib needs up to 3 s for dotted keys, and its time grows with the square
FILES_MAX: Final = 1024  # of the entries of `files`
RelativePath = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Word = Annotated[str, msgspec.Meta(max_length=131_072)]
ROWS: Final = tuple(row for row in TOOLCHAINS if row.project_files)
# Files that a build leaves beside the sources. They may contain paths of another machine.
_LEFT_BY_BUILDS: Final = frozenset({".d", ".gch", ".la", ".lo", ".pyc"})
X07_JSON: Final = "x07.json"  # the manifest of a project in the X07 language
Status = Literal["created", "unchanged", "overwritten", "exists_different"]


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
    if manifest.build.args and (toolchain.packs or toolchain.build is None):
        _wrong(source, f"{toolchain.name} projects cannot have [build] args")


def _wrong(source: str, why: str) -> NoReturn:
    raise UsageError(f"the manifest {source} is invalid", why, "See docs/reference/programs.md")


def sandbox_manifest(
    toolchain: str, files: Sequence[str], *, entry: str | None = None, artifact: str | None = None
) -> bytes:
    """Return a x07-sandbox.toml for *files* (relative names). Raises UsageError."""
    row = toolchain_named(toolchain)
    lines = [f"schema_version = {_text(SCHEMA)}", f"toolchain = {_text(toolchain)}"]
    lines.append(f"files = [{', '.join(map(_text, _patterns(row, files)))}]")
    if row.entries:
        lines.append(f"entry = {_text(entry or _entry(row, files))}")
    if row.artifact:
        lines.append(f"artifact = {_text(artifact or _no_artifact(files))}")
    data = ("# The files of this project. Reference: docs/reference/programs.md\n" + "\n".join(lines) + "\n").encode()
    decode_manifest(data, source=FILE)
    return data


def _patterns(row: Toolchain, files: Sequence[str]) -> list[str]:
    """Return one pattern for each folder and suffix, so that files that are added later match too.

    A make project gets all its files, because make may need sub-Makefiles, inputs of configure and test data.
    """
    found = []
    for name in files:
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if row.artifact and (suffix in _LEFT_BY_BUILDS or name == FILE):
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
    if row.artifact and (len(patterns) > FILES_MAX or len(str(patterns)) > MAX_BYTES // 2):
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


class ProjectFolder:
    """The project at *root*. File names are relative to *root*. A link is followed only if its target is inside *root*.

    base: the real path of *root*. what: the first part of errors. The methods' argument *shown* is the name in errors.
    """

    def __init__(self, root: Path, what: str = "") -> None:
        self.root = root
        self.base = os.path.realpath(root)
        self._below = f"{self.base.rstrip('/')}/"
        self._what = what or f"cannot use the project {root}"

    @contextlib.contextmanager
    def look(self, name: str, shown: str = "") -> Iterator[tuple[int, os.stat_result]]:
        """Yield an O_PATH descriptor of *name*, and its stat. Raises UsageError if it is missing or outside *root*."""
        shown = shown or name
        with self._readable(shown):
            fd = os.open(f"{self.base}/{name}", path_flag() | os.O_CLOEXEC)
        with closing_fd(fd):
            with self._readable(shown):
                # The path of the descriptor, since the name may change meanwhile.
                place = os.readlink(fd_path(fd))  # noqa: PTH115 - called very often
                info = os.fstat(fd)
            if place != self.base and not place.startswith(self._below):
                raise self.refused(f"{shown} leads out of the project, to {place}", "Copy it into the project")
            yield fd, info

    def open(self, name: str, shown: str = "") -> int:
        """Return an owned descriptor of a regular file, open for reading. Raises UsageError if it cannot be opened."""
        with self.look(name, shown) as (fd, info):
            if not stat.S_ISREG(info.st_mode):
                raise self.refused(f"{shown or name} is not a regular file", "Replace it by a file, or remove it")
            with self._readable(shown or name):
                # O_NONBLOCK: another process may hold a lease on the file.
                return os.open(fd_path(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def has_file(self, name: str) -> bool:
        """Return whether *name* is a regular file of the project."""
        try:
            with self.look(name) as (_, info):
                return stat.S_ISREG(info.st_mode)
        except UsageError:
            return False

    def content(self, name: str, most: int, shown: str = "") -> tuple[bytes, os.stat_result]:
        """Return the first *most* + 1 bytes of a regular file, and its stat. Raises UsageError if it cannot be read."""
        fd = self.open(name, shown)
        with self._readable(shown or name), os.fdopen(fd, "rb") as file:
            return file.read(most + 1), os.fstat(fd)

    def read(self, name: str, shown: str, most: int) -> bytes:
        """Return the content of a regular file. Raises UsageError if it is unreadable or has more than *most* bytes."""
        data, _ = self.content(name, most, shown)
        if len(data) > most:
            raise self.refused(f"{shown} has more than {most} bytes", "Use a smaller file")
        return data

    def refused(self, why: str, fix: str) -> UsageError:
        """Return the error that rejects this project."""
        return UsageError(self._what, why, fix)

    @contextlib.contextmanager
    def _readable(self, shown: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as exc:  # ValueError: NUL or a surrogate in the name
            why = f"{shown} cannot be read ({getattr(exc, 'strerror', None) or exc})"
            raise self.refused(why, "Make it readable, or remove it") from exc


def project_root(project: Path | None) -> Path:
    """Return the folder of the file *project*, else the nearest parent with x07.json, else the current folder.

    Raises UsageError if *project* is not a file or the current folder does not exist.
    """
    if project is not None:
        if not is_file(project):
            raise UsageError(
                f"cannot use the project {project}",
                "it is not a readable file",
                f"Give the path of the project's {X07_JSON}",
            )
        return real_path(project.parent)
    here = real_path(Path())
    return next((folder for folder in (here, *here.parents) if is_file(folder / X07_JSON)), here)


def write_document(
    root: Path, parts: tuple[str, ...], data: bytes, *, overwrite: bool, fix: str = "Choose another place"
) -> Status:
    """Write *data* atomically to the file *parts* below *root*, and create missing folders.

    A link below *root* is an error, because a hostile project could use it to redirect the write outside *root*. An
    existing file with other content is kept unless *overwrite* is true. Raises UsageError with the advice *fix* if the
    file cannot be written.
    """
    path = root.joinpath(*parts)
    *folders, name = parts
    try:
        with _folder(root, folders) as folder:
            return _put(folder, name, data, overwrite=overwrite)
    except OSError as exc:
        why = exc.strerror or str(exc)
        if exc.errno in {errno.ELOOP, errno.ENOTDIR}:
            why = f"it or a parent is a link or not a folder ({why})"
        raise UsageError(f"cannot write {path}", why, fix) from exc


@contextlib.contextmanager
def _folder(root: Path, folders: list[str]) -> Iterator[int]:
    """Yield a descriptor of the folder *folders* (parts of a path) below *root*, created if missing. Raises OSError."""
    fd = os.open(root, path_flag() | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in folders:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=fd)
            child = os.open(name, path_flag() | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = child
        yield fd
    finally:
        os.close(fd)


def _put(folder: int, name: str, data: bytes, *, overwrite: bool) -> Status:
    found = _present(folder, name, len(data) + 1)
    if found is not None and found[0] == data:
        return "unchanged"
    if found is not None and not overwrite:
        return "exists_different"
    temporary = f".x07-{os.urandom(8).hex()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with os.fdopen(fd, "wb") as file:
            if found is not None:
                os.fchmod(fd, found[1])
            file.write(data)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    return "created" if found is None else "overwritten"


def _present(folder: int, name: str, most: int) -> tuple[bytes, int] | None:
    """Return the first *most* bytes and the mode of a file, or None if the file is missing. Raises OSError."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    with closing_fd(fd):
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(most), stat.S_IMODE(mode)
