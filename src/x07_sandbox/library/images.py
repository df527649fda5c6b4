"""Guest images for programs that run on several computers: the same digest on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def image_digest(name: str | None = None) -> str:
    """Return the digest of an image of this computer, updated to this version of x07. Raises SandboxError.

    name: name or digest; None for the default.
    """
    from x07_sandbox.images.store import find_image
    from x07_sandbox.sessions.prepare import current_image

    return current_image(find_image(name)).digest


def image_pieces(digest: str) -> Iterator[tuple[str, bytes]]:
    """Yield the files of an image in pieces, for `prepare_image` on another computer. Raises SandboxError."""
    from x07_sandbox.images.build import pieces_of
    from x07_sandbox.images.store import find_image

    return pieces_of(find_image(digest))


def image_store(digest: str) -> tuple[str, bool]:
    """Return an id of this user's store of images, which several computers may share, and whether it has an image."""
    import os
    import socket

    from x07_sandbox.images.store import images_dir

    info = os.stat(images_dir())  # noqa: PTH116 - as below
    has = os.path.exists(images_dir() / digest.removeprefix("sha256:") / "manifest.json")  # noqa: PTH110
    return f"{socket.gethostname()}:{info.st_dev}:{info.st_ino}", has


def prepare_image(digest: str, pieces: Iterable[tuple[str, bytes]], progress: Callable[[str], None]) -> None:
    """Add an image to this computer unless it is there, and try to save a VM for pools with it. Raises SandboxError.

    pieces: those of `image_pieces`; may be empty if the image is there. progress: called with lines of text.
    """
    from x07_sandbox.images.build import add_image
    from x07_sandbox.sessions.saving import prepare_clones

    prepare_clones(add_image(digest, pieces, progress), progress, for_pools=True)
