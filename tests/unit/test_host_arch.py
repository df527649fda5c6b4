"""The architecture table and the guest's own constants agree."""

from __future__ import annotations

import pytest

from x07_sandbox.guest import confine, restrict, system
from x07_sandbox.host.arch import ARCHES


@pytest.mark.parametrize("name", ARCHES)
def test_the_guest_has_the_numbers_and_paths_of_the_table(name: str) -> None:
    """The guest's system call numbers and loader paths match the host's architecture table."""
    row = ARCHES[name]
    assert system._PIVOT_ROOT[name] == row.syscalls["pivot_root"]  # noqa: SLF001 - held to the table here
    assert row.loader in confine._LOADERS  # noqa: SLF001 - as above
    # In one function, whose code goes into an interpreter that has none of our modules.
    constants = restrict.exec_functions.__code__.co_consts
    assert {row.syscalls["seccomp"], row.syscalls["execve"]} <= set(constants)
    assert len(ARCHES) == len(confine._LOADERS) == len(system._PIVOT_ROOT)  # noqa: SLF001 - as above
