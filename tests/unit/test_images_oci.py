"""Reading container images and merging their layers: archives, digests and settings, also of hostile images."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile_images import END, HOSTILE, file, header
from tests.oci_images import Entry, archived, docker_archive, layer, layout
from x07_sandbox.errors import ImageError, SandboxError, UsageError
from x07_sandbox.images import commands, oci
from x07_sandbox.images.oci import Merged
from x07_sandbox.images.store import ProgramRoot

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


@pytest.mark.parametrize("form", ["zstd", "several streams", "padded"])
def test_compressed_layers_are_read(form: str, tmp_path: Path) -> None:
    """A layer compressed by zstd is read, and one by gzip also if it has several streams, or zeros after them."""
    import subprocess

    source = layout(tmp_path / "image", HELLO, zipped=False)
    index = json.loads((source / "index.json").read_text())
    blobs = source / "blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_text())
    packed = gzip.compress(HELLO[:700]) + gzip.compress(b"") + gzip.compress(HELLO[700:])
    packed += bytes(200_000 if form == "padded" else 0)
    if form == "zstd":
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
    """Of several platforms, also one index deeper, that of this host is taken; the configuration decides in the end."""
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
    with pytest.raises(ImageError, match="arm64"):  # an index need not name a platform
        names(layout(tmp_path / "other", HELLO, arch="arm64"), tmp_path)


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
    ("name", "text"),
    [
        ("index.json", "{"),
        ("index.json", '{"manifests": [{"digest": "sha256:../../etc/passwd", "size": 1}]}'),
        ("index.json", '{"manifests": [{"digest": "md5:1", "size": 1}]}'),
        ("index.json", "[" * 100_000),
        ("index.json", '{"manifests": ["\udcff"]}'),
    ],
)
def test_malformed_documents_are_refused(name: str, text: str, tmp_path: Path) -> None:
    """A document of another form, or a digest that is a path, is refused."""
    source = layout(tmp_path / "image", HELLO)
    (source / name).write_bytes(os.fsencode(text))
    with pytest.raises(ImageError):
        names(source, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"WorkingDir": "a/b"},
        {"WorkingDir": "/a\0"},
        {"Cmd": ["a\0b"]},
        {"Cmd": ["a"] * 2000},
        {"Cmd": ["a" * 300_000]},
        {"Env": 5},
    ],
)
def test_malformed_settings_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Settings that no program could be started with are refused."""
    with pytest.raises(ImageError):
        names(layout(tmp_path / "image", HELLO, **settings), tmp_path)


def test_layers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompressed size of all layers and their number are bounded, so that a small file cannot fill the disk."""
    big = layer(Entry("zeros", bytes(2_000_000)))
    monkeypatch.setattr(oci, "BYTES_MAX", 3_000_000)
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


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_end_in_an_error(name: str, tmp_path: Path) -> None:
    """A hostile layer, or a hostile archive around an image, ends in an error that says why, and nothing is written."""
    (tmp_path / "image.tar").write_bytes(HOSTILE[name])
    for source in (layout(tmp_path / "image", HOSTILE[name]), tmp_path / "image.tar"):
        with pytest.raises(ImageError, match=r"(layer 1|it) (has|ends|is damaged)"):
            names(source, tmp_path)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("data", [file() * 10_001, (header("L", 1 << 20, b"L") + bytes(1 << 20) + file()) * 5])
def test_an_archive_with_too_many_files_is_refused(data: bytes, tmp_path: Path) -> None:
    """The archive around an image is limited to 10,000 files and 4 MiB of extended headers."""
    (tmp_path / "image.tar").write_bytes(data + END)
    with pytest.raises(ImageError, match="more than 10000 files"):
        names(tmp_path / "image.tar", tmp_path)


@pytest.mark.parametrize("kind", ["up", "absolute", "through a link", "a NUL byte"])
@pytest.mark.parametrize("which", ["Config", "Layers"])
def test_names_in_an_unpacked_archive_stay_beneath_it(kind: str, which: str, tmp_path: Path) -> None:
    """No name in the manifest.json of an unpacked archive leads out of its folder, not even through a link."""
    source, outside = tmp_path / "image", tmp_path / "outside"
    with tarfile.open(docker_archive(tmp_path / "image.tar", HELLO)) as archive:
        archive.extractall(source, filter="data")
    assert names(source, tmp_path)[1] == {"hello"}
    saved = json.loads((source / "manifest.json").read_text())
    named = saved[0]["Config"] if which == "Config" else saved[0]["Layers"][0]
    outside.mkdir()
    (source / named).rename(outside / "file")
    (source / "link").symlink_to(outside)
    hostile = {"up": "../outside/file", "absolute": str(outside / "file"), "through a link": "link/file"}
    name = hostile.get(kind, f"{named}\0")
    saved[0][which] = name if which == "Config" else [name]
    (source / "manifest.json").write_text(json.dumps(saved))
    with pytest.raises(ImageError, match="is missing"):
        names(source, tmp_path)


def test_blobs_of_a_layout_stay_beneath_it(tmp_path: Path) -> None:
    """The folder of a layout's blobs is no link to another place."""
    source = layout(tmp_path / "image", HELLO)
    (source / "blobs").rename(tmp_path / "blobs")
    (source / "blobs").symlink_to(tmp_path / "blobs")
    with pytest.raises(ImageError, match="is missing or damaged"):
        names(source, tmp_path)


FOLDER, LINK, HARD = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
ADDED = {"dev", "etc", "opt", "proc", "run", "sys", "tmp", "x07", "opt/x07", "etc/machine-id", "etc/resolv.conf"}


def merged(*given: bytes, workdir: str = "") -> dict[str, tuple[bytes, str | bytes]]:
    """The type, and the content or target, of each entry of merged layers, without what x07 adds."""
    return {name: found for name, found in everything(*given, workdir=workdir).items() if name not in ADDED}


def everything(*given: bytes, workdir: str = "") -> dict[str, tuple[bytes, str | bytes]]:
    """The same with what x07 adds."""
    out = io.BytesIO()
    files = []
    try:
        found = Merged()
        for data in given:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
            files.append(file)
            file.write(data)
            file.seek(0)
            found.add(file)
        found.prepare(workdir)
        found.write(out)
    finally:
        for file in files:
            file.close()
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        entries = list(archive)
        return {one.name: (one.type, _content(archive, one)) for one in entries if one.name != "."}


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> str | bytes:
    if info.isreg():
        file = archive.extractfile(info)
        assert file is not None
        return file.read()
    return info.linkname


def test_later_layers_replace_entries_and_keep_others() -> None:
    """A file, link or folder of a later layer replaces what lower layers have; folders keep their entries."""
    low = layer(*(Entry(name, name[-1:].encode()) for name in ("a/one", "a/two", "b", "c")))
    high = layer(Entry("./a/one", b"new"), Entry("b/", kind=FOLDER), Entry("c", kind=LINK, link="a/two"))
    assert merged(low, high) == {
        "a": (FOLDER, ""),
        "a/one": (tarfile.REGTYPE, b"new"),
        "a/two": (tarfile.REGTYPE, b"o"),
        "b": (FOLDER, ""),
        "c": (LINK, "a/two"),
    }


def test_whiteouts_hide_what_is_below() -> None:
    """A whiteout hides an entry of lower layers, an opaque one a whole folder, and none hides its own layer."""
    low = layer(Entry("a/one", b"1"), Entry("a/two", b"2"), Entry("d/x/deep", b"3"), Entry("d/y", b"4"))
    high = layer(
        *(Entry(name) for name in ("a/.wh.one", "a/.wh.none", ".wh.nothing", "new/.wh.x")),
        Entry("d/x/", kind=FOLDER),
        Entry("d/x/own", b"5"),
        Entry("d/.wh..wh..opq"),
        Entry("d/z", b"6"),
    )
    assert merged(low, high) == {
        "a": (FOLDER, ""),
        "a/two": (tarfile.REGTYPE, b"2"),
        "d": (FOLDER, ""),
        "d/x": (FOLDER, ""),
        "d/x/own": (tarfile.REGTYPE, b"5"),
        "d/z": (tarfile.REGTYPE, b"6"),
        "new": (FOLDER, ""),
    }


def test_hard_links_share_their_file_over_layers() -> None:
    """A hard link stays one, also to a file of a lower layer whose own name is hidden later."""
    low = layer(Entry("a", b"1"), Entry("b", kind=HARD, link="a"))
    high = layer(Entry("c", kind=HARD, link="./a"), Entry(".wh.a"))
    assert merged(low, high) == {"b": (tarfile.REGTYPE, b"1"), "c": (HARD, "b")}


def test_links_to_folders_are_followed_inside_the_image() -> None:
    """A path through a link lands where the link leads, and absolute and outward links stay inside."""
    low = layer(
        Entry("usr/bin/", kind=FOLDER),
        Entry("bin", kind=LINK, link="usr/bin"),
        Entry("abs", kind=LINK, link="/usr"),
        Entry("out", kind=LINK, link="../../../usr/./bin"),
    )
    high = layer(Entry("bin/a", b"1"), Entry("abs/bin/b", b"2"), Entry("out/c", b"3"))
    found = merged(low, high)
    assert {name for name in found if name.startswith("usr/bin/")} == {"usr/bin/a", "usr/bin/b", "usr/bin/c"}


def test_special_files_are_left_out() -> None:
    """Devices are left out, and pipes stay."""
    data = layer(
        Entry("null", kind=tarfile.CHRTYPE), Entry("disk", kind=tarfile.BLKTYPE), Entry("pipe", kind=tarfile.FIFOTYPE)
    )
    assert merged(data) == {"pipe": (tarfile.FIFOTYPE, "")}


def test_the_guests_places_are_added() -> None:
    """The merged root has the mount points of the guest, empty files to mount over, and the working folder."""
    found = everything(layer(Entry("etc/resolv.conf", kind=LINK, link="/run/x")), workdir="/app/src")
    assert set(found) == ADDED | {"app", "app/src"}
    assert found["etc/resolv.conf"] == (tarfile.REGTYPE, b"")


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([Entry("../a", b"1")], "leads out of it"),
        ([Entry("a/../../b", b"1")], "leads out of it"),
        ([Entry("n" * 300, b"1")], "too long"),
        ([Entry("/".join(["d"] * 250) + "/f", b"1")], "deep"),
        ([Entry("a", kind=HARD, link="/etc/passwd")], "leads through 'etc'"),
        ([Entry("a", kind=HARD, link="none")], "no file of the image"),
        ([Entry("d/", kind=FOLDER), Entry("a", kind=HARD, link="d")], "no file of the image"),
        ([Entry("a", kind=LINK, link="b"), Entry("b", kind=LINK, link="a"), Entry("a/x", b"1")], "in a circle"),
        ([Entry("a", kind=LINK, link="")], "no valid target"),
        ([Entry("proc", kind=LINK, link="/etc")], "its /proc is no folder"),
        ([Entry("etc", b"")], "its /etc is no folder"),
        ([Entry("opt/", kind=FOLDER), Entry("opt/x07", kind=LINK, link="/")], "its /opt/x07 is no folder"),
        ([Entry("x07", b"")], "its /x07 is no folder"),
    ],
)
def test_hostile_entries_are_refused(entries: list[Entry], why: str) -> None:
    """An entry that leads out of the image, in a circle, or over a place of the guest is refused with the reason."""
    with pytest.raises(ImageError, match=why):
        merged(layer(*entries))


DEEP = "d" * 200


@pytest.mark.parametrize(
    ("limit", "most", "entries"),
    [
        ("entries and folders", 10, [Entry(str(number)) for number in range(11)]),
        ("entries and folders", 10, [Entry("same")] * 11),
        ("entries and folders", 10, [Entry("a/" * 6 + "b"), *[Entry("c")] * 4]),
        ("bytes in extended headers", 1000, [Entry("p" * 101 + "/" + "q" * 101)] * 8),
        ("steps from folder to folder", 100, [Entry("d/" * 20 + str(number)) for number in range(10)]),
        ("steps from folder to folder", 100, [Entry("l", kind=LINK, link="./" * 99), Entry("l/a")]),
        (
            "steps from folder to folder",
            100,
            [*(Entry(f"d/{number}") for number in range(20)), *[Entry("d/.wh..wh..opq")] * 5],
        ),
    ],
)
def test_work_and_memory_are_limited(
    limit: str, most: int, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries, the folders on their way, long names and the steps to find a folder are counted over all layers."""
    data = layer(*entries)
    monkeypatch.setitem(oci.LIMITS, limit, most)
    with pytest.raises(ImageError, match=f"more than {most:,} {limit}"):
        merged(data)
    monkeypatch.setitem(oci.LIMITS, limit, most * 3 // 2)
    with pytest.raises(ImageError, match=limit):
        merged(data, data)


def test_the_merged_archive_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte over the limit is written, also if short names in the layers stand for long paths."""
    monkeypatch.setattr(oci, "BYTES_MAX", 64 << 10)
    assert merged(
        layer(Entry("a", bytes(40 << 10)), *(Entry(f"h{number}", kind=HARD, link="a") for number in range(9)))
    )
    out = io.BytesIO()
    found = Merged()
    with tempfile.TemporaryFile() as file:
        file.write(layer(*(Entry(f"{number}", b"1" * 900) for number in range(60))))
        file.flush()
        found.add(file)
        with pytest.raises(ImageError, match="its files have more than"):
            found.write(out)
    assert len(out.getvalue()) <= 64 << 10


def test_a_path_through_links_is_no_longer_than_linux_allows() -> None:
    """A link can stand for a long path, but the whole path of an entry has at most 4096 bytes."""
    chain = []
    for depth in range(25):
        chain.append(Entry(f"l{depth}/{DEEP}/" if depth else f"{DEEP}/", kind=FOLDER))
        chain.append(Entry(f"l{depth + 1}", kind=LINK, link=f"l{depth}/{DEEP}" if depth else DEEP))
    assert merged(layer(*chain[:30]))
    with pytest.raises(ImageError, match="is too long"):
        merged(layer(*chain))


@pytest.mark.parametrize("damage", [b"", b"no archive" * 100, layer(Entry("a", b"1" * 5000))[:2000]])
def test_damaged_layers_are_refused_or_empty(damage: bytes) -> None:
    """What is no archive, or is cut off, never becomes a file with other content."""
    try:
        found = merged(damage)
    except ImageError:
        return
    assert found == {}


NAMES = st.sampled_from(["a", "b", "a/b", "a/b/c", "b/c", "a/.wh.b", ".wh.a", "a/.wh..wh..opq", "b/", "./a/", "a/../b"])
ENTRIES = st.builds(
    Entry,
    NAMES,
    st.binary(max_size=5),
    st.sampled_from([tarfile.REGTYPE, FOLDER, LINK, HARD, tarfile.CHRTYPE]),
    link=st.sampled_from(["", "a", "/b", "../a", "a/b", "."]),
)


@given(st.lists(st.lists(ENTRIES, max_size=6), max_size=3))
def test_any_layers_end_in_an_image_or_an_error(given_layers: list[list[Entry]]) -> None:
    """Arbitrary entries give an archive whose names are inside the image, each once, folders first, or an error."""

    def plain(entry: Entry) -> Entry:
        return entry if entry.kind == tarfile.REGTYPE else entry._replace(content=b"")

    try:
        found = everything(*(layer(*map(plain, entries)) for entries in given_layers))
    except ImageError:
        return
    seen: set[str] = {""}
    for name, (kind, value) in found.items():
        assert ".." not in name.split("/")
        assert name.rpartition("/")[0] in seen
        assert not name.rpartition("/")[2].startswith(".wh.")
        if kind == FOLDER:
            seen.add(name)
        if kind == HARD:
            assert found[str(value)][0] != FOLDER
