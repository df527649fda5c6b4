"""Copying an image into the store of another computer, as pieces of its files.

The digest of the image is enough to trust a copy: it covers the manifest, which has the digests of all other files.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.errors import ImageError
from x07_sandbox.host.locks import file_lock
from x07_sandbox.images import base as bases
from x07_sandbox.images import build, manifest, store, verify
from x07_sandbox.images.store import Image

_PIECE_BYTES: Final = 16 << 20
_MANIFEST: Final = "manifest.json"


def pieces_of(image: Image) -> Iterator[tuple[str, bytes]]:
    """Yield the names of the image's files with their content, in pieces; the manifest is first. Raises ImageError."""
    subject = verify.subject_of(image)
    with verify.opened_folder(image.folder, subject) as folder_fd:
        for name in (_MANIFEST, *_parts(image.manifest)):
            with verify.opened_file(folder_fd, name, subject) as fd, os.fdopen(fd, "rb", closefd=False) as file:
                while data := file.read(_PIECE_BYTES):
                    yield name, data


def add_image(digest: str, pieces: Iterable[tuple[str, bytes]], progress: Callable[[str], None]) -> Image:
    """Add the image with this digest to the store, unless it is there. Raises ImageError; nothing is then added.

    pieces: those of `pieces_of`. They are not trusted.
    """
    images = store.images_dir()
    hexes = digest.removeprefix("sha256:")
    with file_lock(images / ".lock", on_wait=lambda: progress("waiting for another image build")):
        if not (images / hexes).exists():
            for folder in build.leftovers():
                bases.remove_work(folder, progress)
            work = build.new_work()
            try:
                made = work / "image"
                made.mkdir(mode=0o700)
                _receive(made, digest, pieces)
                made.rename(images / hexes)
            finally:
                bases.remove_work(work, progress)
    return store.load(hexes)


def _receive(folder: Path, digest: str, pieces: Iterable[tuple[str, bytes]]) -> None:
    """Write the pieces into the folder, and compare the files with the digest. Raises ImageError."""
    left = iter(pieces)
    name, data = next(left, ("", b""))
    if name != _MANIFEST:
        raise _bad(digest, "its first file is not the manifest")
    described = manifest.decode(data, f"guest image {digest[:80]}")
    if described.digest != digest:
        raise _bad(digest, "its manifest belongs to another image")
    bases.put(folder, _MANIFEST, data)
    parts = _parts(described)
    sizes = dict.fromkeys(parts, 0)
    for name, data in left:
        if name not in parts or sizes[name] + len(data) > parts[name].bytes:
            raise _bad(digest, f"{name[:80]!r} is not in the manifest, or too large")
        sizes[name] += len(data)
        with (folder / name).open("ab") as file:
            file.write(data)
    for name, part in parts.items():
        if sizes[name] != part.bytes or bases.part_of(folder, name) != part:
            raise _bad(digest, f"{name} is incomplete or damaged")


def _parts(described: manifest.Manifest) -> dict[str, manifest.Part]:
    return {part.file: part for part in (*described.parts.all(), *described.filters.values())}


def _bad(digest: str, why: str) -> ImageError:
    return ImageError(f"cannot copy guest image {digest[:80]}", why, "Copy it again")
