"""The seccomp filter's table and program."""

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
    """libseccomp, which QEMU's package depends on and which has every architecture's system call numbers."""
    try:
        return ctypes.CDLL(LIBSECCOMP)
    except OSError:
        need(condition=False, reason=f"{LIBSECCOMP} is not installed", installable=True)
        raise


@pytest.mark.parametrize("arch", ARCHES.values(), ids=lambda arch: arch.name)
def test_system_call_numbers_match_libseccomp(arch: Arch, libseccomp: ctypes.CDLL) -> None:
    """Each system call number in the table matches libseccomp's, and a call without a number does not exist there."""
    for name in {*DENIED, *arch.syscalls}:
        known = libseccomp.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(arch.audit), name.encode())
        assert arch.syscalls.get(name, -1) == max(known, -1), name


@pytest.mark.parametrize("arch", ARCHES.values(), ids=lambda arch: arch.name)
def test_the_filter_is_well_formed(arch: Arch) -> None:
    """Every jump stays inside the filter, its last instruction allows, and the filter fits one atomic pipe write."""
    program = vmm_filter(arch)
    lines = list(LINE.iter_unpack(program))
    for at, (code, if_true, if_false, _value) in enumerate(lines):
        if code in JUMPS:
            assert at + 1 + max(if_true, if_false) < len(lines)
    assert lines[-1] == (RETURN, 0, 0, 0x7FFF0000)
    assert len(program) <= 4096  # PIPE_BUF: written whole or not at all
