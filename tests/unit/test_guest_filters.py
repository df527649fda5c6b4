"""Promises of the guest's seccomp filters: what each forbids and lets pass, told from their bytes and by a kernel."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import need
from x07_sandbox.guest import filters as guest_filters
from x07_sandbox.guest.boot import filters
from x07_sandbox.guest.restrict import TOKEN_BYTES
from x07_sandbox.host.arch import host_arch
from x07_sandbox.plan.confinement import Confinement

SOURCES: Final = Path(filters.__file__).parents[3]
LINE: Final = struct.Struct("=HBBI")
TOKEN: Final = bytes(range(1, TOKEN_BYTES + 1))
WORDS: Final = struct.unpack("=3Q", TOKEN)
THREAD: Final = 0x00010000
ALLOWED: Final = 0
NEWUSER: Final = 0x10000000


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The library that the image has too."""
    try:
        return ctypes.CDLL("libseccomp.so.2")
    except OSError:
        need(condition=False, reason="libseccomp.so.2 is not installed", installable=True)
        raise


@pytest.fixture(scope="module")
def codes(library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every filter's bytes, compiled here as in an image."""
    assert library is not None
    folder = tmp_path_factory.mktemp("filters")
    filters.main(str(folder))
    return {path.stem: path.read_bytes() for path in folder.glob("*.bpf")}


def number(library: ctypes.CDLL, name: str) -> int:
    """A call's number here; negative where there is no such call."""
    return int(library.seccomp_syscall_resolve_name(name.encode()))


def answer(code: bytes, call: int, *args: int, audit: int | None = None) -> int:
    """The errno with which the filter answers a call; ALLOWED, or an AssertionError for anything else."""
    words = [call, audit or host_arch().audit, 0, 0]
    for value in (*args, *[0] * (6 - len(args))):
        words += [value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF]
    lines = list(LINE.iter_unpack(code))
    held = at = 0
    while True:
        kind, if_true, if_false, value = lines[at]
        at += 1
        if kind == 0x20:
            held = words[value // 4]
        elif kind == 0x54:
            held &= value
        elif kind == 0x05:
            at += value
        elif kind == 0x15:
            at += if_true if held == value else if_false
        elif kind == 0x25:
            at += if_true if held > value else if_false
        elif kind == 0x35:
            at += if_true if held >= value else if_false
        elif kind == 0x06:
            assert value == 0x7FFF0000 or value >> 16 == 5, hex(value)
            return ALLOWED if value == 0x7FFF0000 else value & 0xFFFF
        else:
            raise AssertionError(hex(kind))


def test_every_combination_has_its_filter(codes: dict[str, bytes]) -> None:
    """For whatever a policy forbids there is a filter of the name that plan and guest ask for, and no other."""
    asked = set()
    for threads, spawn, execute in itertools.product((False, True), repeat=3):
        names = Confinement(threads=threads, spawn=spawn, execute=execute).filters
        asked |= set(names)
        name = guest_filters.filter_name(threads=threads, spawn=spawn, execute=execute)
        assert names[2:3] == ((name,) if name else ())
    assert asked == set(codes)


def test_the_base_filter_refuses_what_it_lists(codes: dict[str, bytes], library: ctypes.CDLL) -> None:
    """Each listed call is EPERM whatever its arguments; calls that programs live from pass."""
    for name in filters.DENIED:
        if (call := number(library, name)) >= 0:
            assert answer(codes["base"], call) == errno.EPERM, name
            assert answer(codes["base"], call, *[2**64 - 1] * 6) == errno.EPERM, name
    usual = ("read", "openat", "mmap", "mprotect", "clone", "execve", "futex", "wait4", "kill", "seccomp", "unshare")
    for name in (*usual, "execveat", "ioctl", "prctl", "inotify_init1", "shmget", "landlock_create_ruleset", "connect"):
        assert answer(codes["base"], number(library, name)) == ALLOWED, name
    assert answer(codes["quiet"], number(library, "clone3")) == errno.ENOSYS
    assert answer(codes["quiet"], number(library, "io_uring_setup")) == errno.EPERM


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("clone", (17,), ALLOWED),
        ("clone", (THREAD | 0x3D0F00,), ALLOWED),
        *[("clone", (17 | flag,), errno.EPERM) for flag in filters.CLONE_NEW],
        *[("unshare", (flag,), errno.EPERM) for flag in (*filters.CLONE_NEW, 0x80)],
        ("unshare", (NEWUSER | 1 << 63,), errno.EPERM),
        ("unshare", (0x400,), ALLOWED),
        ("execveat", (3, 4096, 0, 0, 0x1000), errno.EPERM),
        ("execveat", (3, 4096, 0, 0, 0x1100 | 1 << 33), errno.EPERM),
        ("execveat", (3, 4096, 0, 0, 0x100), ALLOWED),
        ("ioctl", (0, 0x5412), errno.EPERM),
        ("ioctl", (0, 0x5412 | 1 << 32), errno.EPERM),
        ("ioctl", (0, 0x541C), errno.EPERM),
        ("ioctl", (0, 0x5413), ALLOWED),
        ("personality", (0,), ALLOWED),
        ("personality", (8,), ALLOWED),
        ("personality", (0x20008,), ALLOWED),
        ("personality", (0xFFFFFFFF,), ALLOWED),
        *[("personality", (1 << bit,), errno.EPERM) for bit in range(31) if not 0x20008 >> bit & 1],
        *[("personality", (0xFFFFFFFF ^ 1 << bit,), errno.EPERM) for bit in range(32)],
        ("personality", (0x400000 | 1 << 40,), errno.EPERM),
        *[("socket", (family, 1, 0), ALLOWED) for family in (0, 1, 2, 10, 16)],
        *[("socket", (family, 1, 0), errno.EAFNOSUPPORT) for family in range(46) if family not in {0, 1, 2, 10, 16}],
        ("socket", (40 | 1 << 32, 1, 0), errno.EAFNOSUPPORT),
        ("socket", (16, 3, 12), errno.EPROTONOSUPPORT),
        ("socket", (2, 3, 12), ALLOWED),
        ("socketpair", (1, 1, 0), ALLOWED),
        ("socketpair", (30, 1, 0), errno.EAFNOSUPPORT),
    ],
)
def test_the_base_filter_looks_at_arguments_as_the_kernel_does(
    codes: dict[str, bytes], library: ctypes.CDLL, name: str, args: tuple[int, ...], expected: int
) -> None:
    """Flags, families and requests decide, and high bits that the kernel drops change nothing."""
    assert answer(codes["base"], number(library, name), *args) == expected


def test_calls_of_another_architecture_do_not_exist(codes: dict[str, bytes], library: ctypes.CDLL) -> None:
    """A call with another numbering (32 bits, or x32's) is ENOSYS in every filter."""
    for code in codes.values():
        assert answer(code, number(library, "getpid"), audit=0x40000003) == errno.ENOSYS
        if host_arch().name == "x86_64":
            assert answer(code, number(library, "getpid") | 0x40000000) == errno.ENOSYS


@pytest.mark.parametrize(
    ("threads", "spawn", "execute"), [made for made in itertools.product((False, True), repeat=3) if not all(made)]
)
def test_a_filter_forbids_what_its_name_says(
    codes: dict[str, bytes], library: ctypes.CDLL, *, threads: bool, spawn: bool, execute: bool
) -> None:
    """Threads, children and executing are EPERM where forbidden, and pass where not, independently of each other."""
    code = codes[guest_filters.filter_name(threads=threads, spawn=spawn, execute=execute)]
    expected = {True: ALLOWED, False: errno.EPERM}
    assert answer(code, number(library, "clone"), THREAD | 0x3D0F00) == expected[threads]
    for flags in (17, 0x4000 | 0x100 | 17, 0x8000 | 17, 0):
        assert answer(code, number(library, "clone"), flags) == expected[spawn]
        assert answer(code, number(library, "clone"), flags | 1 << 48) == expected[spawn]
    for name in ("fork", "vfork"):
        if (call := number(library, name)) >= 0:
            assert answer(code, call) == expected[spawn]
    for name in ("execve", "execveat"):
        assert answer(code, number(library, name), 1, 2, 3, *WORDS) == expected[execute]
    assert answer(code, number(library, "mount")) == ALLOWED  # that is the base filter's


@pytest.mark.parametrize("name", ["no-exec", "no-spawn-no-exec", "no-threads-no-exec", "no-threads-no-spawn-no-exec"])
def test_only_the_secret_lets_one_program_start(codes: dict[str, bytes], library: ctypes.CDLL, name: str) -> None:
    """With the secret in its arguments execve passes; with any bit of it wrong, or as the file stands, it does not."""
    call = number(library, "execve")
    code = with_token(codes[f"{name}-once"])
    assert answer(code, call, 1, 2, 3, *WORDS) == ALLOWED
    assert answer(code, call, 1, 2, 3) == errno.EPERM
    for at, bit in itertools.product(range(3), range(64)):
        wrong = [word ^ (1 << bit) if at == place else word for place, word in enumerate(WORDS)]
        assert answer(code, call, 1, 2, 3, *wrong) == errno.EPERM
    assert answer(code, number(library, "execveat"), 1, 2, 3, *WORDS) == errno.EPERM
    assert answer(code, call, 1, 2, 3, *filters.MARKERS) == errno.EPERM


def test_a_filter_without_its_markers_takes_no_secret(codes: dict[str, bytes]) -> None:
    """A filter without each marker once is not used: it would let everything pass, or nothing."""
    once = codes["no-exec-once"]
    for code in (codes["no-exec"], b"", once + LINE.pack(6, 0, 0, 0x5AFE7011)):
        with pytest.raises(ValueError, match="marker"):
            guest_filters.split_at_token(code)


def with_token(code: bytes) -> bytes:
    """A filter with the tests' secret in it."""
    return guest_filters.with_token(*guest_filters.split_at_token(code), TOKEN)


def run_under(code: bytes, token: bytes, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Have a Python process put itself under the filter and execute a command."""
    program = (
        "from x07_sandbox.guest import restrict, system; system.prctl(38, 1)\n"
        "restrict_self, execute = restrict.exec_functions()\n"
        f"restrict_self({code!r}, -1); execute({words!r}, {{'A': 'b'}}, {token!r})"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCES)}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)


SHELL: Final = ["/bin/sh", "-c", 'echo "$0 $A"; /bin/true || echo refused', "started"]


def test_a_kernel_lets_the_program_start_and_nothing_after_it(codes: dict[str, bytes]) -> None:
    """Under a kernel the program starts with its arguments and variables, and cannot execute another."""
    ended = run_under(with_token(codes["no-exec-once"]), TOKEN, SHELL)
    assert ended.stdout == "started b\nrefused\n", ended.stderr
    assert "Operation not permitted" in ended.stderr


@pytest.mark.parametrize("words", [["", "b c", "\N{SNOWMAN}", "\udcff"], ["x" * 50_000], ["y"] * 5_000])
def test_arguments_of_such_a_start_arrive_whole(codes: dict[str, bytes], words: list[str]) -> None:
    """Empty, odd, long and many arguments of a program that may execute no other arrive as they were given."""
    told = [sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *words]
    ended = run_under(with_token(codes["no-exec-once"]), TOKEN, told)
    assert ended.stdout == f"{words!a}\n", ended.stderr


def test_a_kernel_refuses_a_program_with_another_secret(codes: dict[str, bytes]) -> None:
    """With a secret that is not the filter's even the first execution is EPERM."""
    ended = run_under(with_token(codes["no-exec-once"]), TOKEN[::-1], SHELL)
    assert ended.stdout == ""
    assert "PermissionError: [Errno 1]" in ended.stderr


def test_a_kernel_takes_every_filter(codes: dict[str, bytes]) -> None:
    """Each of them is a program that the kernel accepts, the base filter below each."""
    for name, code in codes.items():
        program = (
            "from x07_sandbox.guest import restrict, system; system.prctl(38, 1)\n"
            "restrict_self, execute = restrict.exec_functions()\n"
            f"restrict_self({codes['base']!r}, -1); restrict_self({code!r}, -1); print('under it')"
        )
        env = {**os.environ, "PYTHONPATH": str(SOURCES)}
        ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
        assert ended.stdout == "under it\n", (name, ended.stderr)
