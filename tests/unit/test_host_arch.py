"""The architecture table and the guest's own constants agree."""

from __future__ import annotations

import pytest

from x07_sandbox import kernel
from x07_sandbox.errors import UsageError
from x07_sandbox.guest import confine
from x07_sandbox.host.arch import ARCHES, arch_named, host_arch, is_foreign


@pytest.mark.parametrize("name", ARCHES)
def test_the_guest_has_the_numbers_and_paths_of_the_table(name: str) -> None:
    """The guest's system call numbers and loader paths match the host's architecture table."""
    row = ARCHES[name]
    assert kernel.NUMBERS[name] == (row.syscalls["seccomp"], row.syscalls["execve"])
    assert row.loader in confine._LOADERS  # noqa: SLF001 - held to the table here
    assert len(ARCHES) == len(confine._LOADERS) == len(kernel.NUMBERS)  # noqa: SLF001 - as above


@pytest.mark.parametrize("name", ARCHES)
def test_an_architecture_has_two_names(name: str) -> None:
    """An architecture is found by the name that uname prints and by Debian's."""
    assert arch_named(name) is arch_named(ARCHES[name].deb) is ARCHES[name]
    assert is_foreign(ARCHES[name]) == (ARCHES[name] is not host_arch())


def test_an_unknown_architecture_is_refused_with_those_that_exist() -> None:
    """An unknown architecture is a usage error that lists the supported ones."""
    with pytest.raises(UsageError, match="'riscv64'") as caught:
        arch_named("riscv64")
    assert caught.value.fix == "Use one of amd64 (x86_64) and arm64 (aarch64)"
