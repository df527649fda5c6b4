"""The memory sizes of VMs."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.policy import guest
from x07_sandbox.policy.guest import RAM_CLASSES, ram_class_bytes, used_ram_bytes

MIB = 1 << 20
LARGEST = 17_179_869_184  # that a policy may ask for


@given(st.integers(1_048_576, LARGEST))
def test_every_valid_limit_has_a_machine_with_room_beside_it(mem_bytes: int) -> None:
    """Every memory limit gets the smallest VM with the required overhead."""
    found = ram_class_bytes(mem_bytes)
    assert found - mem_bytes >= 160 * MIB + mem_bytes / 32
    smaller = [size for size in RAM_CLASSES if size < found]
    assert all(size - mem_bytes < 160 * MIB + mem_bytes / 32 for size in smaller)


@pytest.mark.parametrize(
    ("mem_bytes", "ram_mib"),
    [(1_048_576, 2048), (256 * MIB, 2048), (1536 * MIB, 2048), (4096 * MIB, 8192), (LARGEST, 17_408)],
)
def test_sizes_by_example(mem_bytes: int, ram_mib: int) -> None:
    """Programs up to 1.5 GiB get VMs of one size, and the largest limit fits the largest VM."""
    assert ram_class_bytes(mem_bytes) == ram_mib * MIB


def test_the_documented_table_is_true() -> None:
    """The documented memory limits are the largest that fit."""
    named = [
        int(number) for number in re.findall(r"^\| \d+ [MG]iB \| (\d+) MiB \|$", guest.__doc__ or "", re.MULTILINE)
    ]
    assert len(named) == len(RAM_CLASSES) - 1
    for mebibytes, ram in zip(named, RAM_CLASSES, strict=False):
        assert ram_class_bytes(mebibytes * MIB) == ram
        assert ram_class_bytes((mebibytes + 1) * MIB) > ram


def test_an_oversized_limit_is_an_error() -> None:
    """A memory limit that fits no VM is an error."""
    with pytest.raises(ValueError, match="no VM is large enough"):
        ram_class_bytes(18 << 30)


@given(st.integers(1_048_576, LARGEST), st.integers(0, LARGEST))
def test_a_job_may_use_its_memory_the_overhead_and_its_files(mem_bytes: int, cached_bytes: int) -> None:
    """A VM may use the program's memory, the overhead and its cached files, no more."""
    ram = ram_class_bytes(mem_bytes)
    used = used_ram_bytes(ram, mem_bytes, cached_bytes)
    assert mem_bytes + 160 * MIB <= used <= ram
    assert used == ram or used - cached_bytes <= mem_bytes + 160 * MIB + mem_bytes / 32 + 1
