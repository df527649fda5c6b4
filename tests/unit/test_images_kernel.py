"""Kernel packages: bzImage header, module information and load order."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.errors import ImageError
from x07_sandbox.images import kernel

ELF = b"\x7fELF" + b"kernel" * 10


def _bzimage(body: bytes, *, sectors: int = 4, size: int = len(ELF), length: int | None = None) -> bytes:
    """A bzImage with *body* and the unpacked size as payload; sectors 0 means 4, as in the boot protocol."""
    payload = body + struct.pack("<I", size)
    head = bytearray(((sectors or 4) + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 16, len(payload) if length is None else length)
    return bytes(head) + b"c" * 16 + payload + b"trailing"


def _zstd(data: bytes) -> bytes:
    return kernel.ZSTD_MAGIC + data


def _unzstd(data: bytes) -> bytes:
    return data.removeprefix(kernel.ZSTD_MAGIC)


@pytest.mark.parametrize("sectors", [0, 4, 27])
def test_elf_is_found_behind_the_header(sectors: int) -> None:
    """The ELF kernel is extracted from a bzImage."""
    assert kernel.vmlinux(_bzimage(_zstd(ELF), sectors=sectors), _unzstd) == ELF


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "not a bzImage"),
        (b"MZ" * 5000, "not a bzImage"),
        (b"MZ\0\0zimg" + bytes(9000), "EFI zboot"),
        (_bzimage(_zstd(ELF), length=0xFFFFFFFF), "outside the file"),
        (_bzimage(_zstd(ELF), length=0), "outside the file"),
        (_bzimage(b"\x1f\x8b" + ELF), "not zstd"),
        (_bzimage(_zstd(ELF), size=0xFFFFFFFF), "unpacked size of 4294967295"),
        (_bzimage(_zstd(ELF), size=3), "not an ELF file of the expected size"),
        (_bzimage(_zstd(b"text"), size=4), "not an ELF file of the expected size"),
    ],
)
def test_damaged_image_is_refused(image: bytes, why: str) -> None:
    """A kernel image that contradicts its header is rejected with the reason."""
    with pytest.raises(ImageError, match=why):
        kernel.vmlinux(image, _unzstd)


@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes_give_a_payload_or_an_error(data: bytes, header: bool) -> None:  # noqa: FBT001 - hypothesis names it
    """Any bytes give a payload or ImageError."""
    image = data[:0x202] + b"HdrS" + data[0x206:] if header else data
    with contextlib.suppress(ImageError):
        kernel.payload(image)


def _module(info: bytes) -> bytes:
    """A 64-bit ELF file with sections: none, .modinfo, .shstrtab."""
    names = b"\0.modinfo\0.shstrtab\0"
    at_info, at_names = 64, 64 + len(info)
    table = at_names + len(names)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    rows = [(0, 0, 0, 0, 0, 0), (1, 1, 0, 0, at_info, len(info)), (10, 3, 0, 0, at_names, len(names))]
    sections = b"".join(struct.pack("<IIQQQQ", *row).ljust(64, b"\0") for row in rows)
    return bytes(header) + info + names + sections


def test_modinfo_is_read() -> None:
    """A module's dependencies are read from the module."""
    module = _module(b"license=GPL\0depends=libcrc32c,nfnetlink\0\0name=x\0")
    assert kernel.modinfo(module) == {"license": "GPL", "depends": "libcrc32c,nfnetlink", "name": "x"}


@given(st.binary(max_size=300), st.integers(0, 400))
def test_damaged_module_gives_an_error(junk: bytes, cut: int) -> None:
    """A damaged module raises ImageError and nothing else."""
    for data in (junk, b"\x7fELF\x02\x01" + junk, _module(b"depends=\0")[:cut]):
        with contextlib.suppress(ImageError):
            kernel.modinfo(data)


def test_modules_come_after_what_they_need() -> None:
    """Modules are loaded after their dependencies, in a fixed order."""
    depends = {"erofs": ["libcrc32c"], "libcrc32c": [], "overlay": [], "nft": ["nf", "libcrc32c"], "nf": ["libcrc32c"]}
    assert kernel.load_order(["nft", "erofs", "overlay"], depends) == ["libcrc32c", "nf", "nft", "erofs", "overlay"]


def test_built_in_modules_are_left_out() -> None:
    """Built-in modules are left out of the load order."""
    assert kernel.load_order(["ext4", "a"], {"a": ["virtio"]}, frozenset({"ext4", "virtio"})) == ["a"]


def test_missing_module_and_circle_are_errors() -> None:
    """A missing module or a dependency cycle fails the build."""
    with pytest.raises(ImageError, match="there is no module erofs"):
        kernel.load_order(["erofs"], {})
    with pytest.raises(ImageError, match="depend on each other: a b a"):
        kernel.load_order(["a"], {"a": ["b"], "b": ["a"]})


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sets(st.sampled_from("abcdefgh"), max_size=3), max_size=8))
def test_any_order_holds_each_module_once_and_after_its_needs(graph: dict[str, set[str]]) -> None:
    """Any dependency graph gives a valid load order or an error."""
    try:
        order = kernel.load_order(sorted(graph), graph)
    except ImageError:
        return
    assert len(order) == len(set(order))
    assert all(order.index(needed) < order.index(name) for name in order for needed in graph[name])


def test_file_names_give_the_kernels_names() -> None:
    """Module file names are mapped to kernel module names."""
    assert kernel.module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz") == "virtio_rng"
