"""Fuzz target: unpacking an archive.

An input is the archive. Invariants:

* it is unpacked, or ArchiveError or one of a few OSErrors says why not;
* nothing outside the target folder is created or changed, whatever the names are;
* inside are only plain files and folders with one name each, no set-id bits, nothing that others can write;
* at most the allowed number of bytes is written, and no read asks for more than a megabyte at once.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from x07_sandbox.guest.unpack import ArchiveError, unpack

MOST_BYTES: Final = 8 * 1024
READ_MAX: Final = 1024 * 1024
# What a name can run into in an empty folder: used twice, below a file, its folder missing, too long.
EXPECTED: Final = {errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG}
MODE_MOST: Final = 0o755
# In memory, where there is a file system for it: the fuzzer makes thousands of folders a second.
PLACE: Final = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of our own is made in it


class Watched(io.BytesIO):
    """An archive that refuses large and unbounded reads."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does, but only with a bounded size."""
        assert size is not None
        assert 0 <= size <= READ_MAX, f"a read of {size} bytes"
        return super().read(size)


def entries(target: Path) -> list[tuple[Path, os.stat_result]]:
    """Yield everything below a folder, without following links."""
    return [(path, path.lstat()) for path in target.rglob("*")]


def check_inside(target: Path, count: int | None) -> None:
    """Check the unpacked entries; count: the number of entries if unpacking succeeded."""
    found = entries(target)
    assert count is None or len(found) == count, f"{count} entries, and {len(found)} are there"
    assert sum(info.st_size for _, info in found if stat.S_ISREG(info.st_mode)) <= MOST_BYTES
    for path, info in found:
        assert stat.S_ISDIR(info.st_mode) or (stat.S_ISREG(info.st_mode) and info.st_nlink == 1), path
        assert not stat.S_IMODE(info.st_mode) & ~MODE_MOST, path


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    with tempfile.TemporaryDirectory(prefix="x07-fuzz-", dir=PLACE) as name:
        base = Path(name)
        (base / "outside").write_bytes(b"kept")
        target = base / "a" / "b" / "target"
        target.mkdir(parents=True)
        count = None
        try:
            count = unpack(Watched(data), str(target), most_bytes=MOST_BYTES)
        except ArchiveError:
            pass
        except OSError as exc:
            if exc.errno not in EXPECTED:
                raise
        check_inside(target, count)
        around = sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if target not in path.parents)
        assert around == ["a", "a/b", "a/b/target", "outside"]
        assert (base / "outside").read_bytes() == b"kept"
