"""Promises about the sizes of machines."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.plan import sizes
from x07_sandbox.plan.sizes import RAM_CLASSES, ram_class_bytes, used_ram_bytes

MIB = 1 << 20
LARGEST = 17_179_869_184  # that a policy may ask for


@given(st.integers(1_048_576, LARGEST))
def test_every_valid_limit_has_a_machine_with_room_beside_it(mem_bytes: int) -> None:
    """The machine holds the program's memory, 160 MiB and a thirty-second more, and no smaller one does."""
    found = ram_class_bytes(mem_bytes)
    assert found - mem_bytes >= 160 * MIB + mem_bytes / 32
    smaller = [size for size in RAM_CLASSES if size < found]
    assert all(size - mem_bytes < 160 * MIB + mem_bytes / 32 for size in smaller)


@pytest.mark.parametrize(
    ("mem_bytes", "ram_mib"),
    [(1_048_576, 2048), (256 * MIB, 2048), (1536 * MIB, 2048), (4096 * MIB, 8192), (LARGEST, 17_408)],
)
def test_sizes_by_example(mem_bytes: int, ram_mib: int) -> None:
    """All programs up to 1.5 GiB get machines of one size, and the largest limit fits into the largest machine."""
    assert ram_class_bytes(mem_bytes) == ram_mib * MIB


def test_the_documented_table_is_true() -> None:
    """The largest limits that the module's page names are the largest that fit."""
    named = [
        int(number) for number in re.findall(r"^\| \d+ [MG]iB \| (\d+) MiB \|$", sizes.__doc__ or "", re.MULTILINE)
    ]
    assert len(named) == len(RAM_CLASSES) - 1
    for mebibytes, ram in zip(named, RAM_CLASSES, strict=False):
        assert ram_class_bytes(mebibytes * MIB) == ram
        assert ram_class_bytes((mebibytes + 1) * MIB) > ram


def test_what_fits_nowhere_is_an_error() -> None:
    """No machine is made too small for what it promises."""
    with pytest.raises(ValueError, match="no machine is large enough"):
        ram_class_bytes(18 << 30)


@given(st.integers(1_048_576, LARGEST), st.integers(0, LARGEST))
def test_a_job_may_use_its_memory_the_overhead_and_its_files(mem_bytes: int, cached_bytes: int) -> None:
    """A small program cannot take all RAM of its machine from the host, and no job more than all of it."""
    ram = ram_class_bytes(mem_bytes)
    used = used_ram_bytes(ram, mem_bytes, cached_bytes)
    assert mem_bytes + 160 * MIB <= used <= ram
    assert used == ram or used - cached_bytes <= mem_bytes + 160 * MIB + mem_bytes / 32 + 1


def test_a_small_job_is_held_to_little() -> None:
    """With a policy of 48 MiB the machine is held to about a tenth of its RAM."""
    assert used_ram_bytes(2048 * MIB, 48 * MIB, 0) < 210 * MIB
