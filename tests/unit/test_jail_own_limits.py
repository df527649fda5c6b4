"""The seccomp filters of the gate and the resolver, by interpretation."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import struct
from collections.abc import Callable

import pytest

from x07_sandbox.host.arch import ARCHES, Arch
from x07_sandbox.jail.own_limits import (
    BOTH,
    GATE_RULES,
    RESOLVER_ONLY,
    RESOLVER_RULES,
    gate_filter,
    resolver_filter,
)
from x07_sandbox.jail.seccomp import VMM_CALLS, vmm_rules

LINE = struct.Struct("=HBBI")
DATA = struct.Struct("=IIQ6Q")
ALLOW = 0x7FFF0000
KILL = 0x80000000
REFUSED = 0x00050000 | errno.EPERM
LACKING = 0x00050000 | errno.ENOSYS
LINES_MOST = 4096  # BPF_MAXINSNS
X32_READ = 0x40000000
LEGACY = frozenset(
    {"access", "arch_prctl", "epoll_wait", "lstat", "open", "pause", "poll", "readlink", "select", "stat"}
)

each_arch = pytest.mark.parametrize("arch", ARCHES.values(), ids=lambda arch: arch.name)
each_filter = pytest.mark.parametrize("make", [gate_filter, resolver_filter])
Filter = Callable[[Arch], bytes]


def answer(program: bytes, number: int, audit: int, arguments: tuple[int, ...] = ()) -> int:
    """The filter's verdict on a call."""
    data = DATA.pack(number, audit, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    lines = list(LINE.iter_unpack(program))
    at = held = 0
    while True:
        code, if_true, if_false, value = lines[at]
        at += 1
        match code:
            case 0x20:
                (held,) = struct.unpack_from("=I", data, value)
            case 0x54:
                held &= value
            case 0x05:
                at += value
            case 0x25:
                at += if_true if held > value else if_false
            case 0x15:
                at += if_true if held == value else if_false
            case 0x35:
                at += if_true if held >= value else if_false
            case 0x06:
                return int(value)
            case _:
                pytest.fail(f"unknown instruction {code:#x}")


@functools.cache
def number(arch_name: str, name: str) -> int:
    """The number of a call, by libseccomp; negative if the architecture lacks the call."""
    audit = ctypes.c_uint32(ARCHES[arch_name].audit)
    return int(ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name_arch(audit, name.encode()))


def numbers(arch: Arch, *names: str) -> set[int]:
    """The numbers of the calls that the architecture has."""
    return {found for name in names if (found := number(arch.name, name)) >= 0}


@functools.cache
def compiled(make: Filter, arch_name: str) -> bytes:
    """A filter, compiled once."""
    return make(ARCHES[arch_name])


def ask(make: Filter, arch: Arch, name: str, *arguments: int) -> int:
    """The verdict on a call by name."""
    return answer(compiled(make, arch.name), number(arch.name, name), arch.audit, arguments)


@each_arch
@pytest.mark.parametrize(
    "names",
    [{*BOTH, *RESOLVER_ONLY, *GATE_RULES, *RESOLVER_RULES}, {*VMM_CALLS, *vmm_rules(1), "execve"}],
    ids=["helpers", "vmm"],
)
def test_every_allowed_call_has_a_number(arch: Arch, names: set[str]) -> None:
    """The filters allow the same calls on every architecture, apart from legacy ones."""
    missing = set() if arch.name == "x86_64" else LEGACY & names
    assert {name for name in names if number(arch.name, name) < 0} == missing


@each_arch
@each_filter
def test_the_filter_refuses_every_call_that_it_does_not_list(make: Filter, arch: Arch) -> None:
    """Unlisted calls are denied; a call of another architecture kills the process, and x32 calls get ENOSYS."""
    program = make(arch)
    names = {*BOTH, *RESOLVER_ONLY, *GATE_RULES, *RESOLVER_RULES, "clone3"}
    for call in set(range(1024)) - numbers(arch, *names):
        assert answer(program, call, arch.audit) == REFUSED, call
    assert answer(program, number(arch.name, "read"), 0x40000003) == KILL
    if arch.name == "x86_64":
        assert answer(program, X32_READ, arch.audit) == LACKING
    assert len(program) // LINE.size <= LINES_MOST


@each_arch
@each_filter
@pytest.mark.parametrize(
    "name",
    [
        *("execve", "ptrace", "bpf", "keyctl", "io_uring_setup", "io_setup", "userfaultfd", "memfd_create"),
        *("perf_event_open", "mount", "unshare", "setns", "process_vm_writev", "pidfd_getfd", "seccomp", "capset"),
        *("open_by_handle_at", "shmget", "flock", "fanotify_init"),
    ],
)
def test_no_helper_may_make_a_dangerous_call(make: Filter, arch: Arch, name: str) -> None:
    """Dangerous calls are denied to both helpers."""
    assert ask(make, arch, name) == REFUSED


@each_arch
def test_only_the_resolver_may_start_threads(arch: Arch) -> None:
    """The gate starts no threads; the resolver starts threads, but no processes or namespaces."""
    thread, new_user = 0x003D0F00, 0x10000000
    assert ask(gate_filter, arch, "clone", thread) == REFUSED
    assert ask(gate_filter, arch, "clone3") == REFUSED
    assert ask(resolver_filter, arch, "clone", thread) == ALLOW
    assert ask(resolver_filter, arch, "clone", thread | new_user) == REFUSED
    assert ask(resolver_filter, arch, "clone", 17) == REFUSED
    assert ask(resolver_filter, arch, "clone3") == LACKING


@each_arch
def test_only_the_resolver_may_open_files_and_only_to_read(arch: Arch) -> None:
    """The gate opens no files and maps no code; the resolver opens them only for reading, and maps libraries."""
    assert ask(gate_filter, arch, "mmap", 0, 0, 5) == REFUSED
    assert ask(resolver_filter, arch, "mmap", 0, 0, 5) == ALLOW
    # Numbers, not names: those that differ between architectures are not among them.
    writing = [os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, 0x400000 | os.O_RDWR, 0x400000, 3]
    assert ask(gate_filter, arch, "openat", 0, 0, 0) == REFUSED
    assert ask(resolver_filter, arch, "openat", 0, 0, os.O_CLOEXEC) == ALLOW
    for flags in writing:
        assert ask(resolver_filter, arch, "openat", 0, 0, flags | os.O_CLOEXEC) == REFUSED, flags


@each_arch
@pytest.mark.parametrize(
    ("words", "gate", "resolver"),
    [
        ((socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 6), ALLOW, ALLOW),
        ((socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 17), ALLOW, ALLOW),
        ((socket.AF_INET, socket.SOCK_DGRAM, 1), REFUSED, REFUSED),  # ping
        ((socket.AF_INET, socket.SOCK_RAW, 0), REFUSED, REFUSED),
        ((socket.AF_INET, socket.SOCK_STREAM, 262), REFUSED, REFUSED),  # MPTCP
        ((socket.AF_UNIX, socket.SOCK_STREAM, 0), REFUSED, REFUSED),
        ((socket.AF_UNIX, socket.SOCK_DGRAM, 0), REFUSED, REFUSED),
        ((socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0), REFUSED, ALLOW),
        ((socket.AF_NETLINK, socket.SOCK_RAW, 12), REFUSED, REFUSED),  # netfilter
        ((40, socket.SOCK_STREAM, 0), REFUSED, REFUSED),  # vsock
        ((17, socket.SOCK_RAW, 0), REFUSED, REFUSED),  # packets
    ],
)
def test_each_helper_has_its_families_of_sockets(
    arch: Arch, words: tuple[int, int, int], gate: int, resolver: int
) -> None:
    """The gate may create TCP and UDP sockets; the resolver also netlink sockets."""
    assert ask(gate_filter, arch, "socket", *words) == gate
    assert ask(resolver_filter, arch, "socket", *words) == resolver


@each_arch
@each_filter
@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("socketpair", (1, 1 | socket.SOCK_CLOEXEC, 0), ALLOW),
        ("socketpair", (1, 2, 0), REFUSED),
        ("setsockopt", (3, 6, socket.TCP_NODELAY), ALLOW),
        ("setsockopt", (3, 6, 31), REFUSED),  # TCP_ULP
        ("setsockopt", (3, socket.SOL_SOCKET, socket.SO_KEEPALIVE), ALLOW),
        ("setsockopt", (3, socket.SOL_SOCKET, 26), REFUSED),  # SO_ATTACH_FILTER
        ("setsockopt", (3, 0, 11), ALLOW),  # IP_RECVERR
        ("setsockopt", (3, 0, 64), REFUSED),  # netfilter
        ("setsockopt", (3, 263, 1), REFUSED),  # packets
        ("mprotect", (0, 0, 3), ALLOW),
        ("mprotect", (0, 0, 5), REFUSED),
        ("mmap", (0, 0, 3), ALLOW),
        ("mmap", (0, 0, 7), REFUSED),
        ("prlimit64", (0, 7, 0), ALLOW),
        ("prlimit64", (0, 7, 1), REFUSED),
        ("prlimit64", (0, 7, 1 << 32), REFUSED),
        ("prlimit64", (1, 7, 0), REFUSED),
        ("fcntl", (3, 4), ALLOW),
        ("fcntl", (3, 1024), REFUSED),  # a lease
        ("fcntl", (3, 8), REFUSED),  # F_SETOWN, by which a descriptor sends signals
        ("ioctl", (3, 0x5421), ALLOW),
        ("ioctl", (3, 0x5412), REFUSED),  # TIOCSTI
        ("prctl", (15,), ALLOW),
        ("prctl", (4, 1), REFUSED),  # PR_SET_DUMPABLE
    ],
)
def test_a_call_is_allowed_for_what_a_helper_needs_it_for(
    make: Filter, arch: Arch, name: str, words: tuple[int, ...], expected: int
) -> None:
    """Powerful calls are allowed only with the arguments that the helpers need."""
    assert ask(make, arch, name, *words) == expected
