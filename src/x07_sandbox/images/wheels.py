"""Installing wheels into an image: unpacked on the host, compiled to byte code by the image's own Python.

No code of a wheel is executed. Wheels go below /usr/local, where Debian's Python expects locally installed packages. If
two wheels contain the same file, the last one by name wins.
"""

import io
import re
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path
from typing import IO, Final

from x07_sandbox.errors import ImageError
from x07_sandbox.images import boot, commands, tar

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
