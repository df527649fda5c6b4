"""Fuzz target: unpacking a tree.

The first byte says where the rest is unpacked: as a program's files in the guest, or as a folder on the host, and how
it is cut. Invariants:

* it is unpacked, or our error or one of a few OSErrors says why not;
* nothing outside the target folder is created or changed, whatever the names are;
* inside are only files with one name each, folders, and on the host links; none has a set-id bit, and of a program's
  files none can be written by others;
* at most the allowed number of bytes is written.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

from tests.guest import lies
from x07_sandbox.channel.trees import Entry, Kind, file_record, segment
from x07_sandbox.errors import BackendError, PeerError
from x07_sandbox.files import incoming
from x07_sandbox.guest import trees as in_guest
from x07_sandbox.guest.system import JobError

if TYPE_CHECKING:
    from x07_sandbox.channel.trees import Unpacker

MOST_BYTES: Final = 8 * 1024
# What a name can run into in an empty folder: used twice, below a file, below a link, its folder missing, too long.
EXPECTED: Final = {errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENOENT, errno.ENAMETOOLONG}
# In memory, where there is a file system for it: the fuzzer makes thousands of folders a second.
PLACE: Final = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of our own is made in it
ON_HOST: Final = 0x80  # of the first byte; the rest of it is the size of the pieces


def check_inside(target: Path, *, host: bool) -> None:
    """Check the unpacked entries."""
    found = [(path, path.lstat()) for path in target.rglob("*")]
    assert sum(info.st_size for _, info in found if stat.S_ISREG(info.st_mode)) <= MOST_BYTES
    for path, info in found:
        link = host and stat.S_ISLNK(info.st_mode)
        assert link or stat.S_ISDIR(info.st_mode) or (stat.S_ISREG(info.st_mode) and info.st_nlink == 1), path
        assert link or not stat.S_IMODE(info.st_mode) & ~(0o777 if host else 0o755), path


def unpack(target: Path, data: bytes, step: int, *, host: bool) -> None:
    """Unpack a stream to a folder. Raises PeerError, BackendError, JobError, OSError."""
    unpacker: Unpacker
    if host:
        unpacker = incoming.Unpacker(target)
    else:
        target.mkdir()
        unpacker = in_guest.ProgramTree(str(target))
    try:
        for at in range(0, len(data), step):
            unpacker.write(data[at : at + step])
        if not host:
            unpacker.finish()
    finally:
        unpacker.close()


def seeds() -> dict[str, bytes]:
    """Return trees as a build makes them, and hostile ones. The first byte says where they are unpacked."""
    end, cut = Entry(Kind.END, b"").encoded(), b"\x07"
    small, folder = file_record(b"f", b"12345"), Entry(Kind.FOLDER, b"program", mode=0o755).encoded()
    large = Entry(Kind.FILE, b"f", mode=0o644, size=MOST_BYTES + 1).encoded()
    trees = {
        **{name: b"".join(made()) for name, made in lies.CHANGES.items() if name != "million"},
        "tree": folder + file_record(b"program/main.py", b"print(1)\n") + file_record(b"program/run", b"#!", 0o755),
        "large": file_record(b"zeros", bytes(MOST_BYTES)),
        "under-a-file": small + file_record(b"f/g", b"x"),
        "link-replaced": Entry(Kind.LINK, b"f", target=b"../../../outside").encoded() + small,
        "long-name": file_record(b"x" * 256, b""),
        "hole": large + segment(MOST_BYTES + 1, hole=True),
    }
    head = Entry(Kind.FILE, b"f", mode=0o644, size=5).encoded()
    return {
        **{name: cut + data + end for name, data in trees.items()},
        **{f"{name}-host": bytes([ON_HOST]) + data + end for name, data in trees.items()},
        # Of the format that was used before, where a signed number made room for files over the limit.
        "found-negative-folder": cut + Entry(Kind.FOLDER, b"d", mode=0xFFFF).encoded() + large + segment((1 << 63) - 1),
        "found-negative-file": cut + head + segment((1 << 63) - 1, hole=True) + small,
    }


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    first = data[0] if data else 0
    host, step = bool(first & ON_HOST), (first & ~ON_HOST) or len(data) or 1
    with (
        tempfile.TemporaryDirectory(prefix="x07-fuzz-", dir=PLACE) as name,
        patch.multiple(in_guest if not host else incoming, BYTES_MAX=MOST_BYTES),
    ):
        base = Path(name)
        (base / "outside").write_bytes(b"kept")
        (base / "a" / "b").mkdir(parents=True)
        target = base / "a" / "b" / "target"
        try:
            unpack(target, data[1:], step, host=host)
        except (PeerError, BackendError, JobError):
            pass
        except OSError as exc:
            if exc.errno not in EXPECTED:
                raise
        check_inside(target, host=host)
        around = sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if target not in path.parents)
        assert around == ["a", "a/b", "a/b/target", "outside"]
        assert (base / "outside").read_bytes() == b"kept"
