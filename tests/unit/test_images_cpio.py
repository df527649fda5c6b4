"""The initramfs archive: valid for the kernel's unpacker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.images import cpio
from x07_sandbox.images.cpio import Entry, file, folder, pack

NAMES = st.text("abcdefghij-.é", min_size=1, max_size=20)


def _unpack(archive: bytes) -> list[Entry]:
    """Read a newc archive by the kernel's rules (usr/initramfs.c)."""
    entries: list[Entry] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at = (at + 110 + name_size + 3) & ~3
        data = archive[at : at + size]
        at = (at + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return entries
        entries.append(Entry(name[:-1].decode(), mode, data))


@given(st.dictionaries(NAMES, st.binary(max_size=50), max_size=6))
def test_archive_reads_back_as_it_was_packed(files: dict[str, bytes]) -> None:
    """Every file is read back with its name, mode and content."""
    entries = [folder("d"), *(file(f"d/{name}", data, 0o400) for name, data in files.items())]
    assert _unpack(pack(entries)) == entries


@pytest.mark.parametrize("name", ["", "/init", "a\0b", "TRAILER!!!"])
def test_bad_name_is_refused(name: str) -> None:
    """A name that would end or corrupt the archive is rejected."""
    with pytest.raises(ValueError, match="bad name"):
        pack([file(name, b"")])


def test_name_twice_is_refused() -> None:
    """A duplicate name is rejected."""
    with pytest.raises(ValueError, match="bad name"):
        pack([file("init", b"1"), file("init", b"2")])


def test_size_that_the_format_cannot_hold_is_refused() -> None:
    """A file of 4 GiB or more is an error."""
    assert cpio.check_size("a", 0xFFFFFFFF) == 0xFFFFFFFF
    with pytest.raises(ValueError, match="4294967296"):
        cpio.check_size("a", 0x1_0000_0000)
