"""Tar archives of images: reproducible entries to write, and a strict reader of hostile archives.

Written entries are owned by root, with one fixed date, in a fixed order. The reader (`members`) knows the formats v7,
ustar and pax, and GNU's long names. It refuses what it does not know: a type, a record of an extended header, a sparse
file. So every file's content is a range of bytes of the archive, and no two ranges overlap. tarfile reads what it does
not know as a file, takes sizes from records of sparse files, and follows extended headers by recursion.
"""

import io
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarInfo
from typing import IO, Final, NamedTuple, NoReturn

from x07_sandbox.errors import ImageError
from x07_sandbox.images import commands

BLOCK: Final = 512
ENCODING: Final = ("utf-8", "surrogateescape")  # of names, so that any bytes stay what they are
_PIECE: Final = 1 << 16
_EXTENDED_MAX: Final = 1 << 20  # bytes in an extended header, as in Go's reader
_EXTENDED: Final = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_FILES: Final = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
# No content follows these, whatever their size says.
_BARE: Final = {
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
}
_OCTAL: Final = re.compile(rb"[ \0]*([0-7]*)[ \0]*")  # int() would also accept signs and underscores
_DECIMAL: Final = re.compile(rb"[0-9]{1,19}")
_RECORD: Final = re.compile(rb"([1-9][0-9]{0,6}) ([^=\0\n]+)=")
_KEYS: Final = {b"path", b"linkpath", b"size", b"uid", b"gid"}
# Records that change neither a name nor the content.
_IGNORED: Final = re.compile(
    rb"[acm]time|[ug]name|comment|(hdr)?charset|(SCHILY\.)?dev(major|minor)|SCHILY\.(dev|ino|nlink|fflags)"
    rb"|(SCHILY\.(xattr|acl)|LIBARCHIVE|RHT\.security|APK-TOOLS|MSWINDOWS)\..+"
)


class Part(NamedTuple):
    """A range of bytes of an open file."""

    source: IO[bytes]
    at: int
    size: int

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes. Raises ImageError if the file has become shorter."""
        at, end = self.at, self.at + self.size
        while at < end:
            data = os.pread(self.source.fileno(), min(end - at, _PIECE), at)
            if not data:
                raise bad_image("one of its files is truncated")
            yield data
            at += len(data)


class Member(NamedTuple):
    """An entry of an archive. kind: as in tarfile. extended: the number of bytes in its extended headers."""

    name: str
    kind: bytes
    mode: int
    uid: int
    gid: int
    link: str
    content: Part
    extended: int


def members(file: IO[bytes], subject: str) -> Iterator[Member]:
    """Yield the entries of an archive. subject: what messages call it. Raises ImageError."""
    try:
        yield from _members(file)
    except ValueError as exc:
        raise bad_image(f"{subject} {exc}") from exc


def bad_image(why: str) -> ImageError:
    """Return the error for an image that cannot be imported."""
    return ImageError(
        "cannot import the image", why, "Use an image that was made by an image builder", code="bad-oci-image"
    )


def _members(file: IO[bytes]) -> Iterator[Member]:
    at, end = 0, os.fstat(file.fileno()).st_size
    extended: dict[bytes, bytes] = {}
    while at < end:
        header = os.pread(file.fileno(), BLOCK, at)
        if not any(header) and len(header) == BLOCK:
            break
        kind = _checked(header, at)
        at += BLOCK
        if kind in _EXTENDED:
            if not 0 <= (size := _number(header[124:136])) <= _EXTENDED_MAX:
                raise ValueError(f"has a header of {size} bytes, and {_EXTENDED_MAX} are allowed")
            if kind in extended:
                raise ValueError("has two extended headers of one type before an entry")
            extended[kind] = os.pread(file.fileno(), size, at)
            member = None
        else:
            member = _member(header, kind, extended, file, at)
            size, extended = member.content.size, {}
        at += size + -size % BLOCK
        if at > end:
            raise ValueError("ends inside an entry")
        if member is not None:
            yield member
    if extended:
        raise ValueError("ends inside an entry")


def _checked(header: bytes, at: int) -> bytes:
    """Return the type in a header. Raises ValueError if the header is damaged, or of an unknown type."""
    if len(header) < BLOCK or _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError(f"is damaged or truncated at byte {at}" if at else "is no tar archive")
    kind = header[156:157]
    if kind not in _EXTENDED | _FILES | _BARE:
        raise ValueError(f"has an entry of type {kind.decode('latin-1')!a}, which x07 does not support")
    return kind


def _member(header: bytes, kind: bytes, extended: dict[bytes, bytes], file: IO[bytes], at: int) -> Member:
    if _records(extended.get(tarfile.XGLTYPE, b"")):
        raise ValueError("has a name, size or owner for all entries")
    records = _records(extended.get(tarfile.XHDTYPE, b""))
    for long, key in ((tarfile.GNUTYPE_LONGNAME, b"path"), (tarfile.GNUTYPE_LONGLINK, b"linkpath")):
        if records.setdefault(key, text := _text(extended.get(long, b""))) != text and text:
            raise ValueError("has two long names for one entry")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        name = prefix + b"/" + name
    name = records[b"path"] or name
    if kind in _FILES:
        kind = tarfile.DIRTYPE if kind == tarfile.AREGTYPE and name.endswith(b"/") else tarfile.REGTYPE
    mode, uid, gid, size = (
        int(records[key]) if key in records else _number(header[first:last])
        for key, first, last in ((b"mode", 100, 108), (b"uid", 108, 116), (b"gid", 116, 124), (b"size", 124, 136))
    )
    if min(mode, uid, gid, size) < 0 or max(uid, gid) >= 1 << 32:
        raise ValueError("has an entry whose mode, owner or size is out of range")
    content = Part(file, at, 0 if kind in _BARE else size)
    link = records[b"linkpath"] or _text(header[157:257])
    texts = (name.decode(*ENCODING), link.decode(*ENCODING))
    return Member(texts[0], kind, mode & 0o7777, uid, gid, texts[1], content, sum(map(len, extended.values())))


def _records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of an extended header that x07 uses. An empty value counts as none."""
    found, at = {}, 0
    while at < len(data):
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match is not None else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("has a malformed extended header")
        key, value = match[2], data[match.end() : end - 1]
        if key in _KEYS:
            if value and key not in {b"path", b"linkpath"} and not _DECIMAL.fullmatch(value):
                raise ValueError(f"has the {key.decode()} {value[:30]!a}")
            found[key] = value
        elif not _IGNORED.fullmatch(key):
            raise ValueError(f"has the record {key[:60].decode(*ENCODING)!a}, which x07 does not support")
        at = end
    return {key: value for key, value in found.items() if value}


def _number(field: bytes) -> int:
    """Return the number in a header's field, or -1 if it is negative or no number."""
    if field.startswith(b"\x80"):  # base 256, GNU's form of large numbers
        return int.from_bytes(field[1:])
    match = _OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match is not None else -1


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o444, *, size: int = 0, link: str = ""
) -> tarfile.TarInfo:
    """Return an entry, owned by root and with the fixed date."""
    made = TarInfo(name)
    made.type, made.mode, made.size, made.linkname, made.mtime = kind, mode, size, link, commands.EPOCH
    return made


def add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a read-only file to *archive*."""
    archive.addfile(entry(name, size=len(data)), io.BytesIO(data))


def add_tree(archive: tarfile.TarFile, folder: Path, prefix: str = "", *, exact_modes: bool = False) -> None:
    """Add everything below *folder* except devices, sockets and pipes, with *prefix* before each name. Raises OSError.

    exact_modes: keep modes (without setuid and setgid) and hard links; otherwise files become 0755 or 0644.
    """
    seen: dict[tuple[int, int], str] = {}
    for path in paths_below(folder):
        info, name = path.lstat(), f"{prefix}{path.relative_to(folder)}"
        mode = info.st_mode & 0o1777 if exact_modes else 0o755
        if stat.S_ISLNK(info.st_mode):
            archive.addfile(entry(name, tarfile.SYMTYPE, 0o777, link=str(path.readlink())))
        elif stat.S_ISDIR(info.st_mode):
            archive.addfile(entry(name, tarfile.DIRTYPE, mode))
        elif stat.S_ISREG(info.st_mode):
            first = seen.setdefault((info.st_dev, info.st_ino), name) if exact_modes else name
            if first != name:
                archive.addfile(entry(name, tarfile.LNKTYPE, mode, link=first))
                continue
            mode = mode if exact_modes or info.st_mode & 0o100 else 0o644
            with path.open("rb") as file:
                archive.addfile(entry(name, tarfile.REGTYPE, mode, size=info.st_size), file)


def paths_below(folder: Path) -> Iterator[Path]:
    """Yield every path below *folder* in a fixed order, folders before their entries. Raises OSError."""
    for here, folders, names in os.walk(folder, onerror=_fail):
        folders.sort()
        yield from (Path(here) / name for name in sorted([*folders, *names]))


def _fail(exc: OSError) -> NoReturn:
    raise exc
