"""Kernel packages: bzImage header, module information and load order. The initramfs: valid for the kernel."""

from __future__ import annotations

import contextlib
import lzma
import stat
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.errors import ImageError
from x07_sandbox.images import boot
from x07_sandbox.images.boot import Entry, packed

if TYPE_CHECKING:
    from pathlib import Path

ELF = b"\x7fELF" + b"kernel" * 10


def _bzimage(elf: bytes, *, sectors: int = 4) -> bytes:
    """A bzImage with *elf* and its size as payload; sectors 0 means 4, as in the boot protocol."""
    payload = elf + struct.pack("<I", len(elf))
    head = bytearray(((sectors or 4) + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 16, len(payload))
    return bytes(head) + b"c" * 16 + payload + b"trailing"


@pytest.mark.parametrize("sectors", [0, 4, 27])
def test_elf_is_found_behind_the_header(sectors: int) -> None:
    """The ELF kernel is extracted from a bzImage, and the raw Image of an arm64 kernel is used as it is."""
    assert boot.vmlinux(_bzimage(ELF, sectors=sectors), lambda data: data) == ELF
    raw = b"MZ" + bytes(54) + b"ARMd" + bytes(500)
    assert boot.vmlinux(raw, lambda data: data) == raw


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "neither a bzImage nor a raw Image"),
        (b"MZ" * 5000, "neither a bzImage nor a raw Image"),
        (b"MZ\0\0zimg" + bytes(9000), "EFI zboot"),
        (_bzimage(b"text"), "not an ELF file"),
    ],
)
def test_damaged_image_is_refused(image: bytes, why: str) -> None:
    """A file that is no kernel image is rejected with the reason."""
    with pytest.raises(ImageError, match=why):
        boot.vmlinux(image, lambda data: data)


@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes_give_a_kernel_or_an_error(data: bytes, header: bool) -> None:  # noqa: FBT001 - hypothesis names it
    """Any bytes give a kernel or ImageError."""
    image = data[:0x202] + b"HdrS" + data[0x206:] if header else data
    with contextlib.suppress(ImageError):
        boot.vmlinux(image, lambda data: data)


def test_the_dependencies_of_a_module_are_read() -> None:
    """A module's dependencies are read from the module, and a file without them is an error."""
    module = b"\x7fELF..license=GPL\0depends=libcrc32c,nf-netlink\0\0name=x\0"
    assert boot.needed_modules(module) == ["libcrc32c", "nf_netlink"]
    assert boot.needed_modules(b"\0depends=\0") == []
    with pytest.raises(ImageError, match="on which modules it depends"):
        boot.needed_modules(b"\x7fELF")


def test_modules_come_after_what_they_need() -> None:
    """Modules are loaded after their dependencies, in a fixed order."""
    depends = {"erofs": ["libcrc32c"], "libcrc32c": [], "overlay": [], "nft": ["nf", "libcrc32c"], "nf": ["libcrc32c"]}
    order = boot.load_order(["nft", "erofs", "overlay"], depends.__getitem__)
    assert order == ["libcrc32c", "nf", "nft", "erofs", "overlay"]


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sets(st.sampled_from("abcdefgh"), max_size=3), max_size=8))
def test_any_order_holds_each_module_once_and_after_its_needs(graph: dict[str, set[str]]) -> None:
    """Any dependency graph without cycles gives a valid load order."""
    graph = {name: {needed for needed in needs if needed < name} for name, needs in graph.items()}
    order = boot.load_order(sorted(graph), graph.get)
    assert len(order) == len(set(order))
    assert all(order.index(needed) < order.index(name) for name in order for needed in graph[name] & graph.keys())


def test_a_package_gives_its_kernel_and_the_modules_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel package gives the kernel and its modules in order, without built-in ones; a missing one is an error."""
    monkeypatch.setattr(boot, "BOOT_MODULES", ("ext4", "virtio_blk"))
    monkeypatch.setattr(boot, "NET_MODULES", ("nft_ct", "jbd2"))
    modules = tmp_path / "lib/modules/6.1/kernel"
    modules.mkdir(parents=True)
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/vmlinuz-6.1").write_bytes(_bzimage(ELF))
    (modules.parent / "modules.builtin").write_text("kernel/drivers/virtio-blk.ko\n")
    (modules / "ext4.ko.xz").write_bytes(lzma.compress(b"\0depends=jbd2,virtio_blk\0"))
    (modules / "jbd2.ko").write_bytes(b"\0depends=\0")
    with pytest.raises(ImageError, match="there is no module nft_ct"):
        boot.read_package(tmp_path, lambda data: data)
    (modules / "nft-ct.ko").write_bytes(b"\0depends=jbd2\0")
    found = boot.read_package(tmp_path, lambda data: data)
    names = [[name for name, _ in each] for each in (found.boot, found.net)]
    assert (found.release, found.vmlinux, names) == ("6.1", ELF, [["jbd2", "ext4"], ["nft_ct"]])
    assert dict(found.boot)["ext4"] == b"\0depends=jbd2,virtio_blk\0"


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
    entries = [
        Entry("d", stat.S_IFDIR | 0o755),
        *(Entry(f"d/{name}", stat.S_IFREG | 0o400, data) for name, data in files.items()),
    ]
    assert _unpack(packed(entries)) == entries


@pytest.mark.parametrize("names", [[""], ["/init"], ["a\0b"], ["TRAILER!!!"], ["init", "init"]])
def test_bad_name_is_refused(names: list[str]) -> None:
    """A name that would end or corrupt the archive, or occurs twice, is rejected."""
    with pytest.raises(ValueError, match="bad name"):
        packed([Entry(name, stat.S_IFREG) for name in names])


def test_size_that_the_format_cannot_hold_is_refused() -> None:
    """A file of 4 GiB or more is an error."""
    assert boot.check_size("a", 0xFFFFFFFF) == 0xFFFFFFFF
    with pytest.raises(ValueError, match="4294967296"):
        boot.check_size("a", 0x1_0000_0000)
