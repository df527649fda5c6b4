"""The seccomp filter around a VMM, by interpretation, and the table of system call numbers."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from tests.unit.test_jail_own_limits import ALLOW, KILL, LACKING, REFUSED, answer, each_arch, number, numbers
from x07_sandbox.jail.seccomp import DENIED, vmm_filter

if TYPE_CHECKING:
    import pytest

    from x07_sandbox.host.arch import Arch


@each_arch
def test_system_call_numbers_match_libseccomp(arch: Arch) -> None:
    """Each system call number in the table matches libseccomp's."""
    assert arch.syscalls == {name: number(arch.name, name) for name in arch.syscalls}


@each_arch
def test_the_filter_refuses_what_it_lists(arch: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VMM's filter refuses the listed calls, checks arguments, allows the rest, and fits one atomic write."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path))
    program = vmm_filter(arch)

    def ask(name: str, *arguments: int) -> int:
        return answer(program, number(arch.name, name), arch.audit, arguments)

    assert {answer(program, call, arch.audit) for call in numbers(arch, *DENIED)} == {REFUSED}
    assert {ask(name) for name in ("read", "openat", "mmap", "futex", "execve", "sendmsg")} == {ALLOW}
    assert ask("clone3") == LACKING
    assert answer(program, number(arch.name, "read"), 0x40000003) == KILL
    assert (ask("clone", 0x003D0F00), ask("clone", 0x103D0F00), ask("clone", 17)) == (ALLOW, REFUSED, REFUSED)
    allowed = [command for command in range(2048) if ask("fcntl", 3, command) == ALLOW]
    assert allowed == [0, 1, 2, 3, 4, 1030]
    assert ask("fcntl", 3, 1 << 31) == REFUSED
    assert [family for family in range(64) if ask("socket", family) == ALLOW] == [1]
    assert ask("socket", 40) == 0x00050000 | errno.EAFNOSUPPORT
    assert vmm_filter(arch) == program
    assert len(program) <= 4096  # PIPE_BUF: written whole or not at all
