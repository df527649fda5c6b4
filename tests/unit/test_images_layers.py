"""Merging the layers of a container image, also of hostile ones."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oci_images import Entry, layer
from x07_sandbox.errors import ImageError
from x07_sandbox.images import layers
from x07_sandbox.images.layers import Merged

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
    monkeypatch.setitem(layers.LIMITS, limit, most)
    with pytest.raises(ImageError, match=f"more than {most:,} {limit}"):
        merged(data)
    monkeypatch.setitem(layers.LIMITS, limit, most * 3 // 2)
    with pytest.raises(ImageError, match=limit):
        merged(data, data)


def test_the_merged_archive_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte over the limit is written, also if short names in the layers stand for long paths."""
    monkeypatch.setattr(layers, "BYTES_MAX", 64 << 10)
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


@given(st.binary(max_size=2048))
def test_any_bytes_end_in_an_image_or_an_error(data: bytes) -> None:
    """Arbitrary bytes as a layer raise nothing but ImageError."""
    with contextlib.suppress(ImageError):
        merged(data)


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
