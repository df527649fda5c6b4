"""The filter of system calls: its table, and a real machine behind it."""

from __future__ import annotations

import ctypes
import ctypes.util
import struct

import pytest

from tests.conftest import need
from x07_sandbox.host.arch import ARCHES, Arch
from x07_sandbox.jail.seccomp import DENIED, vmm_filter

LIBSECCOMP = "libseccomp.so.2"
LINE = struct.Struct("=HBBI")
RETURN = 0x06
JUMPS = {0x15, 0x35, 0x45}


@pytest.fixture
def libseccomp() -> ctypes.CDLL:
    """The library that comes with QEMU and knows every machine's numbers."""
    try:
        return ctypes.CDLL(LIBSECCOMP)
    except OSError:
        need(condition=False, reason=f"{LIBSECCOMP} is not installed", installable=True)
        raise


@pytest.mark.parametrize("arch", ARCHES.values(), ids=lambda arch: arch.name)
def test_numbers_are_those_of_libseccomp(arch: Arch, libseccomp: ctypes.CDLL) -> None:
    """Each number in the table is the one that libseccomp knows, and a call that is missing there does not exist."""
    for name in {*DENIED, *arch.syscalls}:
        known = libseccomp.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(arch.audit), name.encode())
        assert arch.syscalls.get(name, -1) == max(known, -1), name


@pytest.mark.parametrize("arch", ARCHES.values(), ids=lambda arch: arch.name)
def test_the_filter_is_a_program_that_ends(arch: Arch) -> None:
    """Every jump stays inside the program, whose last line allows, and a pipe takes it at once."""
    program = vmm_filter(arch)
    lines = list(LINE.iter_unpack(program))
    for at, (code, if_true, if_false, _value) in enumerate(lines):
        if code in JUMPS:
            assert at + 1 + max(if_true, if_false) < len(lines)
    assert lines[-1] == (RETURN, 0, 0, 0x7FFF0000)
    assert len(program) <= 4096  # PIPE_BUF: written whole or not at all
