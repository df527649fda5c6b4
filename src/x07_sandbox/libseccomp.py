"""Seccomp filters, compiled with libseccomp: those of the host's processes, and those of a guest image."""

from __future__ import annotations

import ctypes
import errno
import os

# Actions and comparisons (seccomp.h).
ALLOW = 0x7FFF0000
ERRNO = 0x00050000  # with the errno in the lower half
NOT_EQUAL, EQUAL, GREATER, MASKED_EQUAL = 1, 4, 6, 7
_BAD_ARCHITECTURE, _OPTIMIZE, _BINARY_TREE = 2, 8, 2

# (call, action, comparisons that must all hold: (argument, comparison, value or mask, value under the mask))
Rule = tuple[str, int, tuple[tuple[int, int, int, int], ...]]


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def compile_filter(default: int, rules: list[Rule], audit: int | None = None) -> bytes:
    """Return a seccomp filter, an array of struct sock_filter, compiled with libseccomp. Raises OSError.

    default: the action for calls without a rule that holds. audit: the architecture, as AUDIT_ARCH_* of linux/audit.h;
    None for this one. Rules for calls that the architecture lacks are left out. Calls of another architecture, such as
    x32, fail with ENOSYS.
    """
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    types = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare))
    library.seccomp_rule_add_array.argtypes = types

    def done(result: int, what: str) -> None:
        if result < 0:
            raise OSError(-result, os.strerror(-result), what)

    native = ctypes.c_uint32(library.seccomp_arch_native())
    target = native if audit is None else ctypes.c_uint32(audit)
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if target.value != native.value:
        done(library.seccomp_arch_add(context, target), "architecture")
        done(library.seccomp_arch_remove(context, native), "architecture")
    done(
        library.seccomp_attr_set(context, _BAD_ARCHITECTURE, ctypes.c_uint32(ERRNO | errno.ENOSYS)),
        "other architectures",
    )
    done(library.seccomp_attr_set(context, _OPTIMIZE, ctypes.c_uint32(_BINARY_TREE)), "optimize")
    for name, action, comparisons in rules:
        number = library.seccomp_syscall_resolve_name_arch(target, name.encode())
        if number == -1:
            raise OSError(errno.ENOSYS, "unknown to libseccomp", name)
        if number >= 0:
            array = (_Compare * len(comparisons))(*[_Compare(*compare) for compare in comparisons])
            # libseccomp takes the number on this machine, and translates it.
            number = library.seccomp_syscall_resolve_name(name.encode())
            done(library.seccomp_rule_add_array(context, action, number, len(comparisons), array), name)
    fd = os.memfd_create("filter")
    try:
        done(library.seccomp_export_bpf(context, fd), "export")
        library.seccomp_release(context)
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)
