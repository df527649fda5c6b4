"""Copying an image to the store of another computer: whole, by its digest, or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.unit.test_images_verify import write_image
from x07_sandbox.errors import ImageError
from x07_sandbox.images import build, store, verify
from x07_sandbox.images.transfer import add_image, pieces_of

if TYPE_CHECKING:
    from pathlib import Path

Pieces = list[tuple[str, bytes]]


def say(_text: str) -> None:
    """Ignore progress."""


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Pieces]:
    """The digest and the pieces of an image, and afterwards an empty store."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "there"))
    digest = write_image(store.images_dir() / "made")
    (store.images_dir() / "made").rename(store.images_dir() / digest)
    pieces = list(pieces_of(store.load(digest)))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "here"))
    return f"sha256:{digest}", pieces


def test_a_copy_has_the_digest_and_all_bytes(sent: tuple[str, Pieces]) -> None:
    """A copied image is found by its digest and intact, and copying it again changes nothing."""
    digest, pieces = sent
    halves = [(name, half) for name, data in pieces[1:] for half in (data[: len(data) // 2], data[len(data) // 2 :])]
    image = add_image(digest, [pieces[0], *halves], say)
    assert (image.digest, store.find_image(digest)) == (digest, image)
    assert verify.verify_image(image) == []
    assert add_image(digest, [], say) == image


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda pieces: pieces[1:], "is not the manifest"),
        (lambda _pieces: [], "is not the manifest"),
        (lambda pieces: pieces[:-1], "is incomplete"),
        (lambda pieces: [*pieces[:-1], (pieces[-1][0], pieces[-1][1][:-1] + b"?")], "is incomplete or damaged"),
        (lambda pieces: [*pieces, pieces[-1]], "too large"),
        (lambda pieces: [*pieces, ("../../escaped", b"")], "is not in the manifest"),
        (
            lambda pieces: [(pieces[0][0], pieces[0][1].replace(b"trixie", b"sid")), *pieces[1:]],
            "digest does not match",
        ),
    ],
)
def test_a_wrong_copy_is_refused(sent: tuple[str, Pieces], change: object, why: str) -> None:
    """If a piece is missing, changed, repeated or foreign, nothing is added and nothing is left."""
    digest, pieces = sent
    assert callable(change)
    with pytest.raises(ImageError, match=why):
        add_image(digest, change(pieces), say)
    assert [name for name in os.listdir(store.images_dir()) if not name.startswith(".")] == []  # noqa: PTH208 - names
    assert build.leftovers() == []


def test_another_image_is_refused(sent: tuple[str, Pieces]) -> None:
    """The pieces of an image cannot be added under another digest."""
    with pytest.raises(ImageError, match="belongs to another image"):
        add_image("sha256:" + "0" * 64, sent[1], say)
