"""Fuzz target: importing a container image.

The first byte chooses where the rest is read: as a layer, as the archive that contains an image, or as the documents of
a layout. It also chooses whether the checksums of tar headers are made right first, so that mutations pass them.
Invariants:

* the import ends with an archive, or with ImageError or UsageError;
* no file has more bytes than the limit, and the archive has no more content than all layers together;
* nothing but the archive is created, and nothing else changes;
* the names in the archive are inside it, each has one entry, and a folder comes before its entries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import tarfile
import tempfile
from pathlib import Path
from typing import Final
from unittest import mock

from tests.hostile_images import BLOCK, END, HOSTILE, extended, file, header, padded, record, summed
from tests.oci_images import Entry, layer, layout
from x07_sandbox.errors import ImageError, UsageError
from x07_sandbox.images import oci

BYTES_MAX: Final = 256 << 10
LIMITS: Final = {"entries and folders": 100, "bytes in extended headers": 8 << 10, "steps from folder to folder": 5000}
SUMMED, TWICE, ZIPPED, DOCUMENTS, OUTER = 1, 2, 4, 8, 16  # bits of the first byte
PLACE: Final = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of our own is made in it
LOW: Final = layer(Entry("a/b", b"low"), Entry("d/c", b"low", mode=0o644), Entry("l", kind=tarfile.SYMTYPE, link="a"))


def with_checksums(data: bytes) -> bytes:
    """Return the archive with the right checksum in whatever looks like a header."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    return b"".join(summed(one) if one[257:262] == b"ustar" and len(one) == BLOCK else one for one in blocks)


def manifest(*names: str, config: str = "config.json") -> bytes:
    """Return the manifest.json of an archive as of `docker save`. names: of its layers."""
    return json.dumps([{"Config": config, "Layers": names}]).encode()


def archive(data: bytes, described: bytes) -> bytes:
    """Return an archive as of `docker save` with this layer and manifest.json."""
    config = {"rootfs": {"diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]}, "config": {"WorkingDir": "/w"}}
    files = {"config.json": json.dumps(config).encode(), "manifest.json": described, "0/layer.tar": data}
    return b"".join(file(content, path) for path, content in files.items()) + END


def made(folder: Path, first: int, data: bytes) -> Path:
    """Write the image that an input describes."""
    if first & OUTER:
        (folder / "image.tar").write_bytes(data)
        return folder / "image.tar"
    if first & DOCUMENTS:
        image = layout(folder / "image", LOW)
        for name, part in zip(("index.json", "manifest.json"), data.split(b"\0", 1), strict=False):
            (image / name).write_bytes(part)
            if not part:
                (image / name).unlink()
        return image
    return layout(folder / "image", LOW, data, *([data] if first & TWICE else []), zipped=bool(first & ZIPPED))


def check_archive(path: Path, most: int) -> None:
    """Check the merged archive. most: the number of bytes of content."""
    folders, names, total = {""}, set(), 0
    with tarfile.open(path) as archive:
        for info in archive:
            name = "" if info.name == "." else info.name
            assert name not in names, name
            assert ".." not in name.split("/"), name
            assert name.rpartition("/")[0] in folders, name
            names.add(name)
            folders.update([name] if info.isdir() else [])
            assert info.type in {tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE}
            total += info.size
    assert total <= most, f"{total} bytes of content from {most}"


def seeds() -> dict[str, bytes]:
    """Return layers, archives and documents of images; the first byte says which (see fuzz_images)."""
    low = file(b"1", "a/b") + header("d/", kind=b"5") + header("l", kind=b"2", link="a")
    whiteouts = file(b"", "a/.wh.b") + file(b"", "d/.wh..wh..opq") + header("h", kind=b"1", link="a/b")
    long = header("L", 200, b"L") + padded(b"n" * 200)
    keys = ("path", "linkpath", "size", "uid", "gid", "mtime", "SCHILY.xattr.user.a", "GNU.sparse.realsize")
    small = {re.sub(r"\W", "-", name): data for name, data in HOSTILE.items() if len(data) <= 1 << 13}
    return {
        **{name: bytes([SUMMED]) + data for name, data in small.items()},
        "layer": bytes([SUMMED]) + low + whiteouts + long + low + END,
        "twice": bytes([SUMMED | TWICE | ZIPPED]) + low + whiteouts + END,
        **{key: bytes([SUMMED]) + extended(record(key, "1")) + low + END for key in keys},
        "archive": bytes([SUMMED | OUTER]) + archive(low + END, manifest("0/layer.tar")),
        "archive-up": bytes([SUMMED | OUTER]) + archive(low + END, manifest("../kept")),
        "documents": bytes([DOCUMENTS]) + b'{"manifests": []}',
        "documents-up": bytes([DOCUMENTS]) + b"\0" + manifest("0/layer.tar", config="../kept"),
    }


def one_input(data: bytes) -> bool:
    """Check one input. Return whether it became an image. Raises AssertionError, or what the import must not raise."""
    first, data = data[0] if data else 0, data[1:]
    data = with_checksums(data) if first & SUMMED else data
    with tempfile.TemporaryDirectory(prefix="x07-fuzz-", dir=PLACE) as name:
        base = Path(name)
        (base / "kept").write_bytes(b"{}")
        source, work = made(base, first, data), base / "work"
        work.mkdir()
        before = {path: path.lstat() for path in base.rglob("*") if path != work}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES_MAX, limits[1]))  # any byte more is an OSError
        try:
            with (
                mock.patch.object(oci, "BYTES_MAX", BYTES_MAX),
                mock.patch.object(oci, "BYTES_MAX", BYTES_MAX),
                mock.patch.dict(oci.LIMITS, LIMITS),
            ):
                oci.make_root(str(source), work, work / "root.tar", lambda _text: None)
        except (ImageError, UsageError):
            return False
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            after = {path: path.lstat() for path in base.rglob("*") if path not in {work, work / "root.tar"}}
            assert [(path, info.st_size, info.st_mtime_ns) for path, info in before.items()] == [
                (path, info.st_size, info.st_mtime_ns) for path, info in after.items()
            ]
        check_archive(work / "root.tar", len(LOW) + len(data))
        return True
