"""Reading container images: layouts, archives, digests and settings, also of damaged and hostile ones."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.oci_images import Entry, archived, docker_archive, layer, layout
from x07_sandbox.errors import ImageError, SandboxError, UsageError
from x07_sandbox.images import commands, oci
from x07_sandbox.images.manifest import ProgramRoot

HELLO = layer(Entry("hello", b"hello"))
BYE = layer(Entry("bye", b"bye"))
SETTINGS: dict[str, Any] = {
    "Env": ["PATH=/bin", "A=b=c", "X07_A=1", "no equals", "bad name=1"],
    "WorkingDir": "/app/",
    "User": "0:0",
    "Entrypoint": ["/hello"],
    "Cmd": ["world"],
}


def names(source: Path | str, tmp_path: Path) -> tuple[ProgramRoot, set[str]]:
    """What an image says, and the names of its files."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    target = work / "root.tar"
    target.unlink(missing_ok=True)
    program, _ = oci.make_root(str(source), work, target, lambda _text: None)
    with tarfile.open(target) as archive:
        return program, {one.name for one in archive if one.isreg() and not one.name.startswith("etc/")}


@pytest.mark.parametrize("form", ["folder", "plain", "archive", "docker"])
def test_all_forms_of_an_image_are_read(form: str, tmp_path: Path) -> None:
    """A layout, its archive and an archive of docker save give the same files and settings."""
    source = tmp_path / "image"
    if form == "docker":
        docker_archive(source, HELLO, BYE, **SETTINGS)
    else:
        layout(source, HELLO, BYE, zipped=form != "plain", **SETTINGS)
        source = archived(source, tmp_path / "image.tar") if form == "archive" else source
    program, found = names(source, tmp_path)
    assert found == {"hello", "bye"}
    assert program.env == {"PATH": "/bin", "A": "b=c"}
    assert (program.workdir, program.user) == ("/app", "0:0")
    assert (program.entrypoint, program.cmd) == (["/hello"], ["world"])
    assert program.oci.startswith("sha256:")


def test_a_layer_with_zstd_is_read(tmp_path: Path) -> None:
    """A layer that zstd has compressed is read by Debian's zstd."""
    import subprocess

    source = layout(tmp_path / "image", HELLO, zipped=False)
    index = json.loads((source / "index.json").read_text())
    blobs = source / "blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_text())
    packed = subprocess.run(["/usr/bin/zstd", "-c"], input=HELLO, capture_output=True, check=True).stdout
    manifest["layers"] = [_put(blobs, packed)]
    index["manifests"] = [_put(blobs, json.dumps(manifest).encode())]
    (source / "index.json").write_text(json.dumps(index))
    assert names(source, tmp_path)[1] == {"hello"}


def _put(blobs: Path, data: bytes) -> dict[str, Any]:
    import hashlib

    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": "", "digest": f"sha256:{digest}", "size": len(data)}


def test_the_image_for_this_platform_is_chosen(tmp_path: Path) -> None:
    """Of an index with several platforms, the one of this host is taken, also one index deeper."""
    source = layout(tmp_path / "image", HELLO)
    index = json.loads((source / "index.json").read_text())
    ours = {**index["manifests"][0], "platform": {"os": "linux", "architecture": "amd64"}}
    other = {**_put(source / "blobs/sha256", b"{}"), "platform": {"os": "linux", "architecture": "s390x"}}
    inner = _put(source / "blobs/sha256", json.dumps({"manifests": [other, ours]}).encode())
    for manifests in ([other, ours], [inner]):
        (source / "index.json").write_text(json.dumps({"manifests": manifests}))
        assert names(source, tmp_path)[1] == {"hello"}
    for manifests in ([other], [ours, ours], []):
        (source / "index.json").write_text(json.dumps({"manifests": manifests}))
        with pytest.raises(ImageError, match="images for Linux on amd64"):
            names(source, tmp_path)


def test_an_image_for_another_processor_is_refused(tmp_path: Path) -> None:
    """The configuration decides, since an index need not name a platform."""
    with pytest.raises(ImageError, match="arm64"):
        names(layout(tmp_path / "image", HELLO, arch="arm64"), tmp_path)


@pytest.mark.parametrize("damage", ["layer", "config", "missing", "link", "diff"])
def test_damaged_images_are_refused(damage: str, tmp_path: Path) -> None:
    """Each file is compared with its digest, and each layer with that of its uncompressed content."""
    source = layout(tmp_path / "image", HELLO, BYE)
    blobs = {path.stat().st_size: path for path in (source / "blobs/sha256").iterdir()}
    packed = [path for path in blobs.values() if path.read_bytes()[:2] == b"\x1f\x8b"]
    config = next(path for path in blobs.values() if b"diff_ids" in path.read_bytes())
    if damage == "layer":
        packed[0].write_bytes(packed[0].read_bytes()[:-9] + b"123456789")
    elif damage == "config":
        config.write_bytes(config.read_bytes().replace(b"linux", b"linus"))
    elif damage == "missing":
        packed[0].unlink()
    elif damage == "link":
        other = tmp_path / "other"
        shutil.move(packed[0], other)
        packed[0].symlink_to(other)
    else:
        packed[0].write_bytes(packed[1].read_bytes())
    with pytest.raises(ImageError, match=r"damaged|missing"):
        names(source, tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("index.json", "{"),
        ("index.json", "[]"),
        ("index.json", '{"manifests": [{"digest": "sha256:../../etc/passwd", "size": 1}]}'),
        ("index.json", '{"manifests": [{"digest": "md5:1", "size": 1}]}'),
        ("index.json", '{"manifests": 5}'),
        ("index.json", "[" * 100_000),
    ],
)
def test_malformed_documents_are_refused(file: str, text: str, tmp_path: Path) -> None:
    """A document of another form, or a digest that is a path, is refused."""
    source = layout(tmp_path / "image", HELLO)
    (source / file).write_text(text)
    with pytest.raises(ImageError):
        names(source, tmp_path)


@pytest.mark.parametrize(
    "settings", [{"WorkingDir": "a/b"}, {"WorkingDir": "/a\0"}, {"Cmd": ["a\0b"]}, {"Cmd": ["a"] * 2000}, {"Env": 5}]
)
def test_malformed_settings_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Settings that no program could be started with are refused."""
    with pytest.raises(ImageError):
        names(layout(tmp_path / "image", HELLO, **settings), tmp_path)


def test_layers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompressed size of all layers and their number are bounded, so that a small file cannot fill the disk."""
    big = layer(Entry("zeros", bytes(2_000_000)))
    monkeypatch.setattr(oci, "_BYTES_MAX", 3_000_000)
    with pytest.raises(ImageError, match="more than"):
        names(layout(tmp_path / "image", big, HELLO, big.replace(b"zeros", b"zerot")), tmp_path)
    with pytest.raises(ImageError, match="129 layers"):
        names(layout(tmp_path / "many", *[HELLO] * 129), tmp_path)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    """A missing file, another file, and a folder without an image are errors that say so."""
    (tmp_path / "text").write_text("text")
    (tmp_path / "folder").mkdir()
    for source, why in (("none", "No such file"), ("text", "no tar archive"), ("folder", "neither an index.json")):
        with pytest.raises(SandboxError, match=why):
            names(tmp_path / source, tmp_path)


def test_a_reference_needs_skopeo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without skopeo, the error names its package; a name alone is a path."""
    monkeypatch.setattr(commands, "find_program", lambda _name: None)
    with pytest.raises(SandboxError, match="apt install skopeo"):
        names("docker://docker.io/library/alpine", tmp_path)
    with pytest.raises(UsageError, match="docker://NAME"):
        names("alpine:3.22", tmp_path)
