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
    """The ELF kernel is extracted from a bzImage."""
    assert kernel.vmlinux(_bzimage(ELF, sectors=sectors), lambda data: data) == ELF


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "not a bzImage"),
        (b"MZ" * 5000, "not a bzImage"),
        (b"MZ\0\0zimg" + bytes(9000), "EFI zboot"),
        (_bzimage(b"text"), "not an ELF file"),
    ],
)
def test_damaged_image_is_refused(image: bytes, why: str) -> None:
    """A file that is no kernel image is rejected with the reason."""
    with pytest.raises(ImageError, match=why):
        kernel.vmlinux(image, lambda data: data)


@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes_give_a_kernel_or_an_error(data: bytes, header: bool) -> None:  # noqa: FBT001 - hypothesis names it
    """Any bytes give a kernel or ImageError."""
    image = data[:0x202] + b"HdrS" + data[0x206:] if header else data
    with contextlib.suppress(ImageError):
        kernel.vmlinux(image, lambda data: data)


def test_the_dependencies_of_a_module_are_read() -> None:
    """A module's dependencies are read from the module, and a file without them is an error."""
    module = b"\x7fELF..license=GPL\0depends=libcrc32c,nf-netlink\0\0name=x\0"
    assert kernel.needed_modules(module) == ["libcrc32c", "nf_netlink"]
    assert kernel.needed_modules(b"\0depends=\0") == []
    with pytest.raises(ImageError, match="on which modules it depends"):
        kernel.needed_modules(b"\x7fELF")


def test_modules_come_after_what_they_need() -> None:
    """Modules are loaded after their dependencies, in a fixed order."""
    depends = {"erofs": ["libcrc32c"], "libcrc32c": [], "overlay": [], "nft": ["nf", "libcrc32c"], "nf": ["libcrc32c"]}
    assert kernel.load_order(["nft", "erofs", "overlay"], depends) == ["libcrc32c", "nf", "nft", "erofs", "overlay"]


def test_built_in_modules_are_left_out() -> None:
    """Built-in modules are left out of the load order."""
    assert kernel.load_order(["ext4", "a"], {"a": ["virtio"]}, frozenset({"ext4", "virtio"})) == ["a"]


def test_a_missing_module_is_an_error() -> None:
    """A missing module fails the build."""
    with pytest.raises(ImageError, match="there is no module erofs"):
        kernel.load_order(["erofs"], {})


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sets(st.sampled_from("abcdefgh"), max_size=3), max_size=8))
def test_any_order_holds_each_module_once_and_after_its_needs(graph: dict[str, set[str]]) -> None:
    """Any dependency graph gives a valid load order or an error."""
    graph = {name: {needed for needed in needs if needed < name} for name, needs in graph.items()}  # without cycles
    try:
        order = kernel.load_order(sorted(graph), graph)
    except ImageError:
        return
    assert len(order) == len(set(order))
    assert all(order.index(needed) < order.index(name) for name in order for needed in graph[name])


def test_file_names_give_the_kernels_names() -> None:
    """Module file names are mapped to kernel module names."""
    assert kernel.module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz") == "virtio_rng"
