"""The image manifest: one encoding, one digest, nothing unknown accepted."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.errors import ImageError
from x07_sandbox.images import store
from x07_sandbox.policy.decode import canonical_json

HEX = "0123456789abcdef" * 4


def _part(name: str, size: int = 4096) -> store.Part:
    return store.Part(file=name, sha256=HEX, bytes=size)


MANIFEST = store.sealed(
    store.Manifest(
        schema_version=store.SCHEMA,
        digest=store.NO_DIGEST,
        recipe=1,
        arch="x86_64",
        suite="trixie",
        include=["jq"],
        base=HEX,
        guest_code=HEX,
        kernel_release="6.12",
        parts=store.Parts(
            kernel=_part("vmlinux"),
            initrd=_part("initrd.cpio"),
            root=_part("root.erofs"),
            scratch=_part("scratch.head"),
        ),
        scratch_disk=store.ScratchDisk(bytes=1 << 33, pieces=[store.Piece(offset=0, bytes=4096)]),
        packages=[store.Package(name="gcc", version="4:14.2", arch="amd64")],
        filters={},
    )
)


def _resealed(**changes: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """The manifest as JSON with changed fields and a matching digest."""
    fields = json.loads(store.encode_manifest(MANIFEST)) | changes
    del fields["digest"]
    fields["digest"] = "sha256:" + hashlib.sha256(canonical_json(fields)).hexdigest()
    return json.dumps(fields).encode()


def test_manifest_reads_back() -> None:
    """A manifest survives encoding and decoding byte for byte."""
    data = store.encode_manifest(MANIFEST)
    assert store.decode_manifest(data, "x") == MANIFEST
    assert store.encode_manifest(store.decode_manifest(data, "x")) == data


@pytest.mark.parametrize(
    "name", ["../root", "/etc/passwd", "a/b", "", ".hidden", "A", "a\n", "manifest.json", "vmlinux"]
)
def test_file_names_lead_nowhere_else(name: str) -> None:
    """A part must be a plain file in the image's folder."""
    parts = json.loads(store.encode_manifest(MANIFEST))["parts"]
    parts["root"]["file"] = name
    with pytest.raises(ImageError):
        store.decode_manifest(_resealed(parts=parts), "x")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"schema_version": "\xff"}', "image"),
        (b'{"schema_version": "1", "a": ' + b"[" * 100_000, "image"),
        (b" " * (store.MAX_BYTES + 1), "more than"),
        (_resealed(extra=1), "unknown field `extra`"),
        (_resealed(scratch_disk={"bytes": 1, "pieces": [], "more": 1}), "unknown field"),
        (_resealed(schema_version="x07.sandbox.image@0.2.0", extra=1), r"its format is 'x07.sandbox.image@0.2.0'"),
        (_resealed(scratch_disk={"bytes": 1 << 33, "pieces": [{"offset": 0, "bytes": 8192}]}), "do not add up"),
        (store.encode_manifest(MANIFEST).replace(b"trixie", b"forky1"), "its digest does not match its content"),
    ],
    ids=["no-utf-8", "nested", "large", "field", "inner-field", "newer", "pieces", "digest"],
)
def test_malformed_manifest_is_refused(data: bytes, why: str) -> None:
    """A manifest that is malformed, too large, newer, of another digest or with unknown fields is rejected."""
    with pytest.raises(ImageError, match=why):
        store.decode_manifest(data, "x")


@given(st.one_of(st.binary(max_size=200), st.integers(0, 3000).map(lambda cut: store.encode_manifest(MANIFEST)[:cut])))
def test_any_bytes_give_a_manifest_or_an_error(data: bytes) -> None:
    """Any bytes give a manifest or ImageError."""
    with contextlib.suppress(ImageError):
        store.decode_manifest(data, "x")
