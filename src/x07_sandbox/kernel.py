"""Kernel calls that confine a process: Landlock, seccomp and capabilities. Host and guest use them.

A waiting interpreter in the guest executes the code of this module too (`guest/interpreter`). There it may leave no
module behind, so it imports few.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

TYPE_CHECKING = False  # the module typing imports many others
if TYPE_CHECKING:
    from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION = 0x20080522  # of capset's structures (capabilities(7)): two times three words

# Rights on files (landlock(7)), and what each version of Landlock can restrict.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REFER, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 13, 1 << 14
LANDLOCK_LATEST = 6  # the latest version that we know; later kernels keep its rights
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP, _TCP_SINCE = 1 << 0 | 1 << 1, 4  # bind, connect
SCOPES, _SCOPES_SINCE = 1 << 0 | 1 << 1, 6  # abstract Unix sockets, and signals to processes outside
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION, _PATH_BENEATH = 1, 1

NUMBERS = {"x86_64": (317, 59), "aarch64": (277, 221)}  # of seccomp and execve
_SECCOMP, _EXECVE = NUMBERS.get(os.uname().machine, (-1, -1))
_SET_FILTER, _ALL_THREADS, _AUDITED = 1, 1, 2
SIGNAL_BYTES = 128  # of one signal in a descriptor of `signal_fd`
_SIGSET_BYTES = 128  # sigset_t of the C library
TOKEN_BYTES = 24  # three arguments of 64 bits

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def check(result: int, subject: str) -> int:
    """Return the result of a call in *libc*. Raises OSError, with *subject* as its file name, if the call failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), subject)
    return result


def prctl(option: int, *values: int) -> int:
    """Read or change a property of this process (prctl(2)). Raises OSError."""
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return check(libc.prctl(option, *padded), f"prctl {option}")


def signal_fd(number: int) -> int:
    """Return a descriptor that is readable while a blocked signal is pending (signalfd(2)). Raises OSError."""
    mask = (1 << number - 1).to_bytes(_SIGSET_BYTES, sys.byteorder)
    return check(libc.signalfd(-1, mask, os.O_CLOEXEC), "signalfd")


def drop_bounding_set(kept: int = 0) -> None:
    """Reduce the bounding set to the mask *kept*, so that nothing executed gains other capabilities. Raises OSError."""
    held = status_mask("CapBnd") & ~kept
    for capability in range(held.bit_length()):
        if held >> capability & 1:
            prctl(_CAPBSET_DROP, capability)


def limit_capabilities(kept: int) -> None:
    """Keep only the capabilities in the mask *kept*, also for what this process executes. Raises OSError."""
    drop_bounding_set(kept)
    low, high = kept & 0xFFFFFFFF, kept >> 32  # effective, permitted and inheritable words: first the lower ones
    sets = struct.pack("=6I", low, low, 0, high, high, 0)
    check(libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), sets), "capset")


def status_mask(name: str) -> int:
    """Return a mask in this process's status (proc(5)), such as CapBnd. Raises OSError."""
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123 - pathlib would be one more module
        text = file.read()
    return int(text.partition(b"\n%s:" % name.encode())[2].split(None, 1)[0], 16)


def drop_capabilities() -> None:
    """Clear the permitted, effective and inheritable capabilities of this process. Raises OSError."""
    check(libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24)), "capset")


def landlock_version() -> int:
    """Return the kernel's Landlock version, or 0 if it has no Landlock (landlock_create_ruleset(2))."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, 0, _VERSION)))


def landlock_restrictions(version: int) -> tuple[int, int, int]:
    """Return everything that a Landlock version can restrict, for `landlock_ruleset`: files, tcp, scopes."""
    files = max(rights for since, rights in _FILE_RIGHTS.items() if since <= version)
    return files, _TCP if version >= _TCP_SINCE else 0, SCOPES if version >= _SCOPES_SINCE else 0


def landlock_ruleset(files: int, tcp: int = 0, scopes: int = 0) -> int:
    """Return the descriptor of a new ruleset: *files* and *tcp* need a rule, *scopes* are forbidden. Raises OSError."""
    attributes = struct.pack("=QQQ", files, tcp, scopes)
    return check(libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0), "landlock_create_ruleset")


def landlock_allow(ruleset_fd: int, file: str | int, rights: int) -> None:
    """Allow *rights* on a file, or on all below a folder. file: a path or a descriptor. Raises OSError."""
    fd = os.open(file, os.O_PATH | os.O_CLOEXEC) if isinstance(file, str) else file
    try:
        rule = struct.pack("=Qi", rights, fd)
        check(libc.syscall(_ADD_RULE, ruleset_fd, _PATH_BENEATH, rule, 0), str(file))
    finally:
        if fd != file:
            os.close(fd)


def landlock_restrict(ruleset_fd: int) -> None:
    """Restrict the calling thread by a ruleset. Raises OSError."""
    check(libc.syscall(_RESTRICT_SELF, ruleset_fd, 0), "landlock_restrict_self")


_Words = ctypes.c_char_p * 2


def load_filter(code: bytes, *, audited: bool = False) -> None:
    """Apply a seccomp filter to all threads of this process. audited: whether refusals are audited. Raises OSError."""
    program = _Words(
        ctypes.c_char_p(len(code) // 8), code
    )  # struct sock_fprog: number of instructions, and their address
    flags = _ALL_THREADS | (_AUDITED if audited else 0)
    try:
        other = check(libc.syscall(_SECCOMP, _SET_FILTER, flags, program), "seccomp")
    except OSError as exc:
        if exc.errno != errno.EINVAL or not audited:
            raise
        other = check(libc.syscall(_SECCOMP, _SET_FILTER, _ALL_THREADS, program), "seccomp")  # gVisor has no audit
    if other:
        raise OSError(0, "a thread has another seccomp filter", "seccomp")


def execute(argv: list[str], env: dict[str, str], token: bytes) -> NoReturn:
    """Execute a program. Raises OSError.

    token: the secret that the "-once" filters require (`guest/boot/filters`), in arguments that the kernel ignores;
    empty for none.
    """
    if not token:
        # Not os.execvpe: it imports a module, which needs a descriptor.
        os.execve(argv[0], argv, env)  # noqa: S606 - no shell
    words = [os.fsencode(word) for word in argv]
    pairs = [os.fsencode(f"{name}={value}") for name, value in env.items()]
    arrays = [(ctypes.c_char_p * (len(texts) + 1))(*texts) for texts in (words, pairs)]
    secret = [ctypes.c_ulong(word) for word in struct.unpack("=3Q", token)]
    libc.syscall(_EXECVE, words[0], *arrays, *secret)
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), argv[0])
