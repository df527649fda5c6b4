"""Reading tar archives: all forms that real images have, and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.hostile_images import END, binary, extended, file, header, padded, record
from x07_sandbox.errors import ImageError
from x07_sandbox.images.tar import Member, members

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def read(data: bytes) -> list[Member]:
    """The entries of an archive."""
    with tempfile.TemporaryFile() as out:
        out.write(data)
        out.flush()
        return list(members(out, "it"))


def contents(data: bytes) -> dict[str, bytes]:
    """The names in an archive, and the content of each."""
    return {one.name: data[one.content.at :][: one.content.size] for one in read(data)}


def as_tarfile_reads(data: bytes) -> list[tuple[object, ...]]:
    """The same entries as read by Python."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [
            (
                one.name,
                tarfile.REGTYPE if one.type == tarfile.AREGTYPE else one.type,
                one.mode,
                one.uid,
                one.gid,
                one.linkname,
                one.offset_data,
                one.size if one.isreg() else 0,
            )
            for one in archive
        ]


def comparable(one: Member) -> tuple[object, ...]:
    """An entry in the same form."""
    name = one.name.rstrip("/")
    return (name, one.kind, one.mode, one.uid, one.gid, one.link, one.content.at, one.content.size)


@pytest.mark.parametrize("made_by", ["posix", "gnu", "oldgnu", "ustar", "v7", *FORMATS])
def test_all_formats_of_real_archives_are_read(made_by: str, tmp_path: Path) -> None:
    """Archives of GNU tar and Python are read in every format: long names, links, pipes, large owners, other bytes."""
    long = made_by not in {"v7", "ustar"}
    (tmp_path / "in/folder").mkdir(parents=True)
    (tmp_path / "in/folder/file").write_bytes(b"content")
    (tmp_path / os.fsdecode(b"in/\xff\xfe")).write_bytes(b"1" * 513)
    (tmp_path / "in" / ("\u00e9" * (90 if long else 20))).write_bytes(b"")
    (tmp_path / "in/link").symlink_to("t" * (200 if long else 50))
    (tmp_path / "in/hard").hardlink_to(tmp_path / "in/folder/file")
    if made_by != "v7":
        os.mkfifo(tmp_path / "in/pipe")
    if made_by in FORMATS:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=FORMATS[made_by]) as archive:
            archive.add(tmp_path / "in", "in")
        data = out.getvalue()
    else:
        owner = "4000000" if long else "7"
        command = ["/usr/bin/tar", f"--format={made_by}", f"--owner=:{owner}", "--group=:9", "-c", "in"]
        data = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert list(map(comparable, read(data))) == as_tarfile_reads(data)
    assert len(read(data)) == (7 if made_by == "v7" else 8)


def test_records_that_change_nothing_are_ignored() -> None:
    """Times, names of owners, comments and extended attributes may have any value, also for all entries."""
    keys = ["mtime", "atime", "uname", "hdrcharset", "SCHILY.xattr.user.overlay.origin", "LIBARCHIVE.creationtime"]
    ignored = [record(key, value) for key in keys for value in (b"", b"1.5", b"\xff=\n\0")]
    data = extended(record("comment", "a" * 40), kind=b"g") + extended(*ignored) + file(b"1") + file(b"2", "b") + END
    assert contents(data) == {"a": b"1", "b": b"2"}


def test_records_and_long_names_replace_the_header() -> None:
    """The name, target, size and owner in extended headers count, unless they are empty."""
    size = extended(record("size", "3"), record("path", "p"), record("uid", "5"), record("linkpath", ""))
    named = header("L", 3, b"L") + padded(b"l/\0") + header("K", 2, b"K") + padded(b"k\0")
    data = (
        size + header() + padded(b"abc") + named + header(kind=b"2", link="x") + header(size=binary(1)) + padded(b"1")
    )
    found = read(data)
    assert [(one.name, one.link, one.uid, one.content.size) for one in found] == [
        ("p", "", 5, 3),
        ("l/", "k", 0, 0),
        ("a", "", 0, 1),
    ]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (extended(record("GNU.sparse.realsize", "99999")) + file(b"1"), "the record 'GNU.sparse.realsize', which x07"),
        (extended(record("SCHILY.realsize", "99999")) + file(b"1"), "the record 'SCHILY.realsize'"),
        (header(kind=b"S"), "an entry of type 'S'"),
        (extended(record("path", "b"), kind=b"g") + file(), "for all entries"),
        (extended(record("path", "b")) + header("L", 2, b"L") + padded(b"c\0") + file(), "two long names"),
        (extended(record("size", "-1")) + file(), "the size b'-1'"),
        (extended(record("uid", "1_0")) + file(), "the uid b'1_0'"),
        (extended(record("uid", str(1 << 32))) + file(), "is out of range"),
        (extended(b"9999 path=b\n") + file(), "malformed extended header"),
        (extended(b"7 path=\n") + file(), "malformed extended header"),
        (header(size=b"+0000000001\0") + padded(b"1"), "is out of range"),
        (extended(record("mtime", "1")), "ends inside an entry"),
        (file() + bytes(100), "damaged or truncated at byte 512"),
        (file() + b"x" * 512, "damaged or truncated at byte 512"),
        (b"text", "no tar archive"),
    ],
)
def test_what_is_not_known_is_refused(data: bytes, why: str) -> None:
    """A type or record that x07 does not know could change the content, so it is refused and named."""
    with pytest.raises(ImageError, match=why):
        read(data)
