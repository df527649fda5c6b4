"""Runs a command on a host that forbids namespaces, as a container's seccomp profile does.

    without_namespaces.py [--nor-landlock | --only-host-name] COMMAND...

Run by path, with nothing but the standard library. Namespaces, mounts and setns answer EPERM then, also to root. With
--only-host-name only sethostname does, as in podman's containers without capabilities.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_X86_64, _AARCH64 = "x86_64", "aarch64"
# Of each architecture: unshare, setns, mount, clone, clone3.
_NUMBERS = {_X86_64: (272, 308, 165, 56, 435), _AARCH64: (97, 268, 40, 220, 435)}
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050000 | 38
_SETHOSTNAME = {_X86_64: 170, _AARCH64: 161}
_NEW = 0x7E020000  # every CLONE_NEW* of clone
_LANDLOCK_CREATE_RULESET = 444  # everywhere
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _filter(*, landlock: bool) -> bytes:
    unshare, setns, mount, clone, clone3 = _NUMBERS[os.uname().machine]
    lines = [_line(0x20, 0)]
    for number, answer in ((unshare, _EPERM), (setns, _EPERM), (mount, _EPERM), (clone3, _ENOSYS)):
        lines += [_line(0x15, number, 0, 1), _line(0x06, answer)]
    if not landlock:
        lines += [_line(0x15, _LANDLOCK_CREATE_RULESET, 0, 1), _line(0x06, _ENOSYS)]
    lines += [_line(0x15, clone, 0, 3), _line(0x20, 16), _line(0x45, _NEW, 0, 1), _line(0x06, _EPERM)]
    return b"".join([*lines, _line(0x06, _ALLOW)])


def _filter_of_host_name() -> bytes:
    lines = [_line(0x20, 0), _line(0x15, _SETHOSTNAME[os.uname().machine], 0, 1), _line(0x06, _EPERM)]
    return b"".join([*lines, _line(0x06, _ALLOW)])


def main() -> None:
    """Take namespaces away from this process and become the command."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    words = sys.argv[1:]
    option = words.pop(0) if words[0].startswith("--") else ""
    program = _filter_of_host_name() if option == "--only-host-name" else _filter(landlock=option != "--nor-landlock")
    code = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, ctypes.addressof(described), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")
    os.execvp(words[0], words)  # noqa: S606 - that is its purpose


if __name__ == "__main__":
    main()
