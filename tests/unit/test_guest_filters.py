"""The guest's seccomp filters: allowed and denied calls, by interpretation and on a real kernel."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import need
from tests.unit.test_jail_own_limits import answer as verdict
from x07_sandbox.channel.messages import FREE
from x07_sandbox.guest import environment, execution
from x07_sandbox.guest.boot import filters, places
from x07_sandbox.host.arch import host_arch
from x07_sandbox.kernel import TOKEN_BYTES
from x07_sandbox.policy.guest import filters_of

SOURCES: Final = Path(filters.__file__).parents[3]
LINE: Final = struct.Struct("=HBBI")
TOKEN: Final = bytes(range(1, TOKEN_BYTES + 1))
WORDS: Final = struct.unpack("=3Q", TOKEN)
THREAD: Final = 0x00010000
ALLOWED: Final = 0
NEWUSER: Final = 0x10000000


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The libseccomp that the image has too."""
    try:
        return ctypes.CDLL("libseccomp.so.2")
    except OSError:
        need(condition=False, reason="libseccomp.so.2 is not installed", installable=True)
        raise


@pytest.fixture(scope="module")
def codes(library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of every filter, compiled as for an image."""
    assert library is not None
    folder = tmp_path_factory.mktemp("filters")
    filters.main(str(folder))
    return {path.stem: path.read_bytes() for path in folder.glob("*.bpf")}


def number(library: ctypes.CDLL, name: str) -> int:
    """The number of a call; negative if it does not exist."""
    return int(library.seccomp_syscall_resolve_name(name.encode()))


def answer(code: bytes, call: int, *args: int, audit: int | None = None) -> int:
    """The errno of the filter's verdict on a call, or ALLOWED."""
    found = verdict(code, call, audit or host_arch().audit, args)
    assert found == 0x7FFF0000 or found >> 16 == 5, hex(found)
    return ALLOWED if found == 0x7FFF0000 else found & 0xFFFF


def test_every_combination_has_its_filter(codes: dict[str, bytes]) -> None:
    """Every combination of policy restrictions has exactly one filter."""
    asked = set()
    for threads, spawn, execute in itertools.product((False, True), repeat=3):
        names = filters_of(FREE._replace(threads=threads, spawn=spawn, execute=execute))
        asked |= set(names)
        name = execution.filter_name(threads=threads, spawn=spawn, execute=execute)
        assert names[2:3] == ((name,) if name else ())
    assert asked == set(codes)


def test_the_base_filter_refuses_what_it_lists(codes: dict[str, bytes], library: ctypes.CDLL) -> None:
    """The base filter denies every listed call and allows the calls that programs need."""
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
    """The base filter checks arguments as the kernel does, ignoring high bits that the kernel drops."""
    assert answer(codes["base"], number(library, name), *args) == expected


def test_calls_of_another_architecture_do_not_exist(codes: dict[str, bytes], library: ctypes.CDLL) -> None:
    """Calls of another architecture or ABI get ENOSYS."""
    for code in codes.values():
        assert answer(code, number(library, "getpid"), audit=0x40000003) == errno.ENOSYS
        if host_arch().name == "x86_64":
            assert answer(code, number(library, "getpid") | 0x40000000) == errno.ENOSYS


@pytest.mark.parametrize(
    ("threads", "spawn", "execute"), [made for made in itertools.product((False, True), repeat=3) if not all(made)]
)
def test_filters_match_their_names(
    codes: dict[str, bytes], library: ctypes.CDLL, *, threads: bool, spawn: bool, execute: bool
) -> None:
    """Filters restrict threads, child processes and execve independently."""
    code = codes[execution.filter_name(threads=threads, spawn=spawn, execute=execute)]
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
def test_only_the_secret_allows_one_start(codes: dict[str, bytes], library: ctypes.CDLL, name: str) -> None:
    """Only an execve with the secret in its arguments passes the one-start filter."""
    call = number(library, "execve")
    code = with_token(codes[f"{name}-once"])
    assert answer(code, call, 1, 2, 3, *WORDS) == ALLOWED
    assert answer(code, call, 1, 2, 3) == errno.EPERM
    for at, bit in itertools.product(range(3), range(64)):
        wrong = [word ^ (1 << bit) if at == place else word for place, word in enumerate(WORDS)]
        assert answer(code, call, 1, 2, 3, *wrong) == errno.EPERM
    assert answer(code, number(library, "execveat"), 1, 2, 3, *WORDS) == errno.EPERM
    assert answer(code, call, 1, 2, 3, *filters.MARKERS) == errno.EPERM


def test_a_filter_without_markers_is_rejected(codes: dict[str, bytes]) -> None:
    """A filter without its markers is not used."""
    once = codes["no-exec-once"]
    for code in (codes["no-exec"], b"", once + LINE.pack(6, 0, 0, 0x5AFE7011)):
        with pytest.raises(ValueError, match="marker"):
            execution.split_at_token(code)


def with_token(code: bytes) -> bytes:
    """A filter with the tests' secret."""
    return execution.with_token(*execution.split_at_token(code), TOKEN)


def run_python(*lines: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process that gains no privileges, and then does these things with x07_sandbox's `kernel`."""
    program = "; ".join(("from x07_sandbox import kernel", "kernel.prctl(38, 1)", *lines))
    env = {**os.environ, "PYTHONPATH": str(SOURCES)}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)


def run_under(code: bytes, token: bytes, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python process that loads the filter and executes a command."""
    return run_python(f"kernel.load_filter({code!r})", f"kernel.execute({words!r}, {{'A': 'b'}}, {token!r})")


SHELL: Final = ["/bin/sh", "-c", 'echo "$0 $A"; /bin/true || echo refused', "started"]


def test_a_kernel_allows_exactly_one_start(codes: dict[str, bytes]) -> None:
    """On a real kernel the program starts with its arguments and variables but cannot execute another."""
    ended = run_under(with_token(codes["no-exec-once"]), TOKEN, SHELL)
    assert ended.stdout == "started b\nrefused\n", ended.stderr
    assert "Operation not permitted" in ended.stderr


@pytest.mark.parametrize("words", [["", "b c", "\N{SNOWMAN}", "\udcff"], ["x" * 50_000], ["y"] * 5_000])
def test_arguments_of_such_a_start_arrive_whole(codes: dict[str, bytes], words: list[str]) -> None:
    """Empty, odd, long and many arguments reach a program that may execute no other."""
    argv = [sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *words]
    ended = run_under(with_token(codes["no-exec-once"]), TOKEN, argv)
    assert ended.stdout == f"{words!a}\n", ended.stderr


def test_a_kernel_refuses_a_program_with_another_secret(codes: dict[str, bytes]) -> None:
    """With a wrong secret the first execve fails with EPERM."""
    ended = run_under(with_token(codes["no-exec-once"]), TOKEN[::-1], SHELL)
    assert ended.stdout == ""
    assert "PermissionError: [Errno 1]" in ended.stderr


def test_a_kernel_accepts_every_filter(codes: dict[str, bytes]) -> None:
    """The kernel accepts every filter on top of the base filter."""
    for name, code in codes.items():
        loads = [f"kernel.load_filter({one!r})" for one in (codes["base"], code)]
        ended = run_python(*loads, "print('under it')")
        assert ended.stdout == "under it\n", (name, ended.stderr)


@pytest.mark.root
def test_unreadable_folders_are_left_out_of_the_readable_paths() -> None:
    """A folder that an ordinary user cannot read is left out of the readable paths; the others stay."""
    need(os.geteuid() == 0, "root, to become another user", installable=False)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name, mode in (("closed", 0o700), ("open", 0o755)):
            (Path(folder) / name).mkdir()
            (Path(folder) / name).chmod(mode)
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(write, json.dumps(places.readable(folder, programs=False)).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert json.loads(pipe.read()) == [False, [f"{folder}/open"]]


def test_a_slow_preload_names_the_module_and_the_times_of_the_others() -> None:
    """If preloading times out, the error names the slow module and how long each other module took."""
    assert environment.preload_timeout(["numpy", "scipy"], ["numpy 3.2"]) == (
        f"scipy was not imported within {environment.PRELOAD_S:.0f} s for all; numpy took 3.2 s"
    )
