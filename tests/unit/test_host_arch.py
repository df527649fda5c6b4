"""The architecture table and the guest's own constants agree."""

from __future__ import annotations

import pytest

from x07_sandbox import kernel
from x07_sandbox.guest import confine
from x07_sandbox.host.arch import ARCHES


@pytest.mark.parametrize("name", ARCHES)
def test_the_guest_has_the_numbers_and_paths_of_the_table(name: str) -> None:
    """The guest's system call numbers and loader paths match the host's architecture table."""
    row = ARCHES[name]
    assert kernel.NUMBERS[name] == (row.syscalls["seccomp"], row.syscalls["execve"])
    assert row.loader in confine._LOADERS  # noqa: SLF001 - held to the table here
    assert len(ARCHES) == len(confine._LOADERS) == len(kernel.NUMBERS)  # noqa: SLF001 - as above
