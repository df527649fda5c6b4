"""Python packages for an image: validating requirements, downloading wheels with the host's pip, unpacking.

pip uses the user's settings (configuration files, PIP_* variables), and so the user's package index. It downloads only
wheels, so no code of a package runs on the host.

Wheels are unpacked on the host, and compiled to byte code by the image's own Python. They go below /usr/local, where
Debian's Python expects locally installed packages. If two contain the same file, the last one by name wins.
"""

import collections
import contextlib
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import Distribution
from pathlib import Path
from typing import IO, Final

import msgspec

from x07_sandbox.errors import Command, HostError, ImageError, UsageError
from x07_sandbox.host.paths import find_program, read_bounded
from x07_sandbox.host.processes import output_of
from x07_sandbox.host.variables import inherited_environment
from x07_sandbox.images import boot, commands, sources, store, tar

FILE_PREFIX: Final = "file:"
FILE_MAX_BYTES: Final = 1024 * 1024
REQUIREMENTS_MAX: Final = 1000
_OLDEST_GLIBC: Final = 5  # manylinux1
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION: Final = r"(?:===?|~=|!=|<=?|>=?)\s*[A-Za-z0-9.!+*_-]+"
_REQUIREMENT: Final = re.compile(
    rf"(?P<name>{_NAME})\s*(?:\[\s*{_NAME}(?:\s*,\s*{_NAME})*\s*\])?\s*"
    rf"(?:\(?\s*{_VERSION}(?:\s*,\s*{_VERSION})*\s*\)?)?\s*(?:;[A-Za-z0-9_.'\"<>=!~() +-]+)?"
)
_HASH: Final = re.compile(r"\s+--hash[= ]\s*(sha(?:256|384|512):[0-9a-f]{64,128})(?=\s|$)")
_NOT_FOUND: Final = re.compile(rf"No matching distribution found for ({_NAME})")
# Runs pip in a process that cannot start others. Despite --only-binary, pip builds a dependency from source if a wheel
# names it by URL; it runs code of packages only in child processes.
_NO_BUILDS: Final = "x07-sandbox builds no package from source"
_PIP: Final = f"""
import runpy, sys
STARTS = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system")
def refuse(event, args):
    if event in STARTS:
        raise PermissionError("{_NO_BUILDS}")
sys.addaudithook(refuse)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_FORM: Final = "Use a name with optional extras and versions, such as pandas[excel]>=2,<3"


class GuestPython(msgspec.Struct, frozen=True, kw_only=True):
    """The Python and C library that wheels must fit."""

    version: str  # such as "3.13"
    glibc: int  # minor version of the C library
    machine: str

    @property
    def tag(self) -> str:
        """The wheel tag, such as "cp313"."""
        return "cp" + self.version.replace(".", "")

    def options(self) -> list[str]:
        """Return the pip options that select wheels for this Python."""
        options = ["--python-version", self.version, "--implementation", "cp"]
        for abi in (self.tag, "abi3", "none"):
            options += ["--abi", abi]
        newest_first = [f"manylinux_2_{minor}" for minor in range(self.glibc, _OLDEST_GLIBC - 1, -1)]
        for platform in (*newest_first, "manylinux2014", "manylinux2010", "manylinux1", "linux"):
            options += ["--platform", f"{platform}_{self.machine}"]
        return options


def guest_python(versions: Mapping[str, str], machine: str) -> GuestPython:
    """Return the Python of an image that has these package versions (python3, libc6). Raises HostError."""
    python = re.match(r"(3\.\d+)[.-]", versions.get("python3", ""))
    glibc = re.match(r"2\.(\d+)", versions.get("libc6", ""))
    if python is None or glibc is None:
        why = "this host has no package lists, which x07 needs to find the image's Python version"
        raise HostError("cannot choose wheels for the image", why, "As root, run apt-get update")
    return GuestPython(version=python[1], glibc=int(glibc[1]), machine=machine)


def split_list(text: str) -> list[str]:
    """Split *text* at the commas between requirements, but not at those in versions and extras."""
    found: list[str] = []
    for piece in text.split(","):
        continued = found and (re.match(r"\s*[<>=!~]", piece) or found[-1].count("[") > found[-1].count("]"))
        if continued:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return [piece.strip() for piece in found if piece.strip()]


def check_requirements(asked: Sequence[str]) -> tuple[str, ...]:
    """Return requirement lines for pip. Raises UsageError unless each is a name with optional extras and versions.

    asked: requirements, or "file:PATH" for the requirements in a file.
    """
    lines: list[str] = []
    for each in asked:
        if each.startswith(FILE_PREFIX):
            lines += _read_file(Path(each.removeprefix(FILE_PREFIX)))
        else:
            lines.append(_check_one(each, "--pip"))
    if len(lines) > REQUIREMENTS_MAX:
        raise UsageError("cannot add Python packages", f"there are more than {REQUIREMENTS_MAX}", "Request fewer")
    return tuple(sorted(set(lines)))


def _read_file(path: Path) -> list[str]:
    data = read_bounded(path, "requirements", FILE_MAX_BYTES)
    lines: list[str] = []
    joined, begin = "", 0
    for number, raw in enumerate([*data.decode(errors="replace").splitlines(), ""], start=1):
        begin = begin or number
        if raw.rstrip().endswith("\\") and not raw.lstrip().startswith("#"):
            joined += raw.rstrip()[:-1] + " "
            continue
        line = re.sub(r"(^|\s)#.*", "", joined + raw).strip()
        if line:
            lines.append(_check_one(line, f"{path}, line {begin}", hashes=True))
        joined, begin = "", 0
    return lines


def _check_one(text: str, where: str, *, hashes: bool = False) -> str:
    digests = _HASH.findall(text) if hashes else []
    line = _HASH.sub("", text).strip() if hashes else text
    if not _REQUIREMENT.fullmatch(line):
        if line.startswith("-") or " --" in line:
            why = "options are not supported"
        elif re.search(r"[@/\\:]", line):
            why = "only packages from a package index are supported, not URLs or paths"
        else:
            why = "it is not a Python requirement"
        raise UsageError(f"cannot add {text[:80]!r} ({where})", why, _FORM)
    return " ".join([line, *(f"--hash={digest}" for digest in digests)])


def pinned(wheels: Sequence[store.Wheel]) -> tuple[str, ...]:
    """Return requirement lines for pip that only these exact wheels satisfy."""
    return tuple(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in wheels)


def download(
    folder: Path,
    lines: Sequence[str],
    python: GuestPython,
    progress: Callable[[str], None],
    *,
    sources_file: Path,
    deps: bool = True,
) -> tuple[store.Wheel, ...]:
    """Download the wheels that satisfy *lines* into the new *folder*. Raises UsageError, ImageError, HostError.

    sources_file: from sources.write_sources, for advice in errors. deps: whether to download dependencies too.
    """
    pip = find_pip_interpreter()
    folder.mkdir(mode=0o700)
    file = folder.with_name("requirements.txt")
    file.write_text("".join(f"{line}\n" for line in lines))
    argv = [pip, "-I", "-c", _PIP, "download", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    argv += ["--only-binary", ":all:", *python.options(), *([] if deps else ["--no-deps"])]
    argv += ["--dest", str(folder), "--requirement", str(file)]
    output: collections.deque[str] = collections.deque(maxlen=400)

    def on_line(line: str) -> None:
        output.append(line)
        if match := re.match(r"Collecting (\S+)", line):
            progress(f"downloading {match[1][:100]}")

    progress("downloading Python packages")
    try:
        env = inherited_environment() | {"LC_ALL": "C.UTF-8"}
        commands.run(argv, cwd=folder, timeout_s=1800, extra_env=env, on_line=on_line)
    except ImageError as exc:
        raise failure(list(output), python, sources_file) or exc from exc
    return tuple(sorted(map(wheel_of, sorted(folder.iterdir())), key=lambda wheel: (wheel.name, wheel.sha256)))


def failure(output: list[str], python: GuestPython, sources_file: Path) -> UsageError | ImageError | None:
    """Return the error that pip's output describes, or None if there is no known reason."""
    what = "pip cannot download the wheels"
    if any(_NO_BUILDS in line for line in output):
        collected = (found[1] for line in reversed(output) if (found := re.match(r"\s*Collecting (\S+)", line)))
        why = f"{next(collected, 'a package')[:100]} has no wheel, and source packages are not built on this host"
        return ImageError(what, why, "Remove it, or request a version with wheels")
    errors = [line.strip().removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")]
    if not errors:
        return None
    text = " ".join(error[:300] for error in errors[:4]).rstrip(".")
    match = next((found for line in errors if (found := _NOT_FOUND.search(line))), None)
    if match is None or "hash" in text.lower():
        fix = "Change the --pip argument, then try again"
        if "DO NOT MATCH THE HASHES" in text:
            wrong = next((found[1] for line in output if (found := re.match(rf"\s+({_NAME}\S*) from ", line))), "one")
            text = f"the file of {wrong[:100]} in the package index does not match its hash"
            fix = "Check the origin of the file before you change the hash"
        return ImageError(what, text, fix)
    name = match[1]
    if any("Retrying" in line for line in output):
        advice = ("Check the network and pip's settings: ", Command("pip config list"))
        return ImageError(f"pip cannot download {name!r}", f"the package index does not answer ({text})", advice)
    what = f"cannot add {name!r} to an image"
    if versions := re.search(r"\(from versions: (?!none\))([^)]*)\)", " ".join(errors)):
        newest = versions[1].split(", ")[-1][:80]
        why = f"pip finds no such version for Python {python.version}; the newest is {newest}"
        return UsageError(what, why, "Request an available version")
    why = f"pip finds no wheel with this name for Python {python.version} on Linux ({python.machine})"
    return UsageError(what, why, _alternative(name, sources.package_names(sources_file)))


def _alternative(name: str, known: frozenset[str]) -> str:
    if f"python3-{name.lower()}" in known:
        return f"Use Debian's package: --include python3-{name.lower()}"
    if near := sources.near_projects(name, known):
        return f"Use one of these: {', '.join(near)}. Or use Debian's package: --include python3-{near[0]}"
    return "Check its name; packages without wheels cannot be added"


def wheel_of(path: Path) -> store.Wheel:
    """Return name, version and digest of a wheel file. Raises ImageError."""
    parts = path.name.removesuffix(".whl").split("-")
    if not path.name.endswith(".whl") or len(parts) not in {5, 6} or not path.is_file():
        raise ImageError(f"cannot use {path.name[:100]!r}", "pip downloaded it, but it is not a wheel", "Remove it")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return store.Wheel(name=re.sub(r"[-_.]+", "-", parts[0]).lower(), version=parts[1], sha256=digest)


def find_pip_interpreter() -> str:
    """Return the path of a Python that has pip: the current one, or else python3. Raises HostError."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pip') is None)"
    for program in filter(None, (sys.executable, find_program("python3"))):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if not output_of([program, "-I", "-c", code], timeout_s=60).returncode:
                return program
    raise HostError("cannot fetch Python packages", "this host has no pip", "Run apt install python3-pip")


MAX_BYTES: Final = 8 * 1024**3  # total, unpacked
ENTRIES_MAX: Final = 400_000
_TEXT_MAX: Final = 1024**2  # of entry_points.txt
_NAME_MAX: Final = 255
_BIN: Final = "usr/local/bin"
_PYTHON: Final = b"#!/usr/bin/python3"
_ENTRY_POINT: Final = re.compile(r"([A-Za-z_][\w.]*)\s*:\s*([A-Za-z_][\w.]*)\s*(?:\[.*\])?", re.ASCII)
_PROGRAM_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def site_packages(python: str) -> str:
    """Return the folder for packages in an image with that Python ("3.13")."""
    return f"usr/local/lib/python{python}/dist-packages"


class Unpacker:
    """Unpacks wheels into a tree laid out like the image's root."""

    def __init__(self, root: Path, python: str) -> None:
        self._root = root
        self._site = site_packages(python)
        self._bytes = self._entries = 0
        (root / self._site).mkdir(parents=True)

    def unpack(self, wheel: Path) -> None:
        """Unpack a wheel into the tree. Raises ImageError."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                self._unpack(archive, wheel.name)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, TypeError) as exc:
            raise _bad(wheel.name, f"the archive is damaged ({exc})") from exc
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as exc:
            raise _bad(wheel.name, "one of its files is a folder in another wheel, or vice versa") from exc

    def _unpack(self, archive: zipfile.ZipFile, wheel: str) -> None:
        files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        self._entries += len(files)
        self._bytes += sum(info.file_size for info in files.values())  # zipfile reads no more than this
        if self._bytes > MAX_BYTES or self._entries > ENTRIES_MAX:
            raise _bad(wheel, f"the wheels have more than {MAX_BYTES >> 30} GiB or {ENTRIES_MAX} files in total")
        info_folders = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
        if len(info_folders) != 1:
            raise _bad(wheel, "it does not have exactly one .dist-info folder")
        about = info_folders.pop()
        for name, info in sorted(files.items()):
            place = self._place(name, about.removesuffix(".dist-info") + ".data", wheel)
            if place is not None:
                with archive.open(info) as source:
                    self._write(source, self._root / place, executable=bool((info.external_attr >> 16) & 0o111))
        points = f"{about}/entry_points.txt"
        if points in files and files[points].file_size > _TEXT_MAX:
            raise _bad(wheel, f"{points[:100]!r} is too long")
        self._launchers(self._root / self._site / about, wheel)

    def _place(self, name: str, data: str, wheel: str) -> str | None:
        """Return the path below the image's root for the file *name* of a wheel, or None to skip the file."""
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts) or max(map(len, parts)) > _NAME_MAX:
            raise _bad(wheel, f"its file {name[:100]!r} has an invalid path")
        if parts[0] != data or len(parts) == 1:
            return f"{self._site}/{name}"
        scheme, rest = parts[1], "/".join(parts[2:])
        if scheme in {"purelib", "platlib"} and rest:
            return f"{self._site}/{rest}"
        if scheme == "scripts" and len(parts) == 3:  # noqa: PLR2004
            return f"{_BIN}/{rest}"
        if scheme == "data" and rest:
            return f"usr/local/{rest}"
        if scheme == "headers":
            return None
        raise _bad(wheel, f"its file {name[:100]!r} has an unknown type")

    def _write(self, source: IO[bytes], target: Path, *, executable: bool) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        is_script = target.parent == self._root / _BIN
        with target.open("xb") as file:
            if is_script:
                file.write(re.sub(rb"\A#!pythonw?", _PYTHON, source.read(len(_PYTHON))))
            shutil.copyfileobj(source, file)
        target.chmod(0o700 if executable or is_script else 0o600)

    def _launchers(self, about: Path, wheel: str) -> None:
        """Write a program to /usr/local/bin for each console script of the unpacked .dist-info folder *about*."""
        for point in Distribution.at(about).entry_points.select(group="console_scripts"):
            match = _ENTRY_POINT.fullmatch(point.value)
            if match is None or not _PROGRAM_NAME.fullmatch(point.name):
                raise _bad(wheel, f"its entry_points.txt has an invalid entry for {point.name[:100]!r}")
            module, function = match.groups()
            first = function.partition(".")[0]
            body = f"import sys\n\nfrom {module} import {first}\n\nsys.exit({function}())\n"
            self._write(io.BytesIO(_PYTHON + b"\n" + body.encode()), self._root / _BIN / point.name, executable=True)


def make_layer(work: Path, wheels: Sequence[Path], root: Path, python: str) -> Path:
    """Return a tar file of *wheels*, unpacked and compiled. root: the base's unpacked root. Raises SandboxError."""
    tree, empty, target = work / "wheels-tree", work / "wheels-none", work / "wheels.tar"
    unpacker = Unpacker(tree, python)
    for wheel in wheels:
        unpacker.unpack(wheel)
    empty.mkdir()
    site = site_packages(python)
    # Ignore errors: packages contain files that do not compile (templates, old syntax).
    script = (
        f"python3 -I -S -m compileall -qq -f -j2 -s /opt/x07 -p /{site} --invalidation-mode unchecked-hash /opt/x07"
    )
    argv = boot.bwrap_argv(root, empty, tree / site, ("sh", "-c", f"{script} || :"))
    commands.run(argv, cwd=work, timeout_s=1800)
    pack(tree, target)
    shutil.rmtree(tree)
    return target


def pack(tree: Path, target: Path) -> None:
    """Write *tree* as an archive to be unpacked at the root of an image."""
    with tarfile.open(target, "x", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tar.entry(".", tarfile.DIRTYPE, 0o755))
        tar.add_tree(archive, tree)


def _bad(wheel: str, why: str) -> ImageError:
    return ImageError(f"cannot use the wheel {wheel[:120]}", why, "Remove it from --pip, or request another version")
