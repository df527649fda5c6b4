"""The last steps of a process before it is the program: what the policy forbids is taken away from it.

The code of `exec_functions` also runs in the interpreter that waits, which has none of our modules (`guest/interpreter`):
so it imports what it needs, and uses nothing of this module. It makes all it can beforehand, for fresh clones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

TOKEN_BYTES = 24  # six arguments of 32 bits, as the filter compares them


def exec_functions() -> tuple[Callable[..., None], Callable[[list[str], dict[str, str], bytes], NoReturn]]:
    """Two functions, ready to be called.

    restrict_self(filter_code, rules_fd, recorded=True) puts this process, all threads of it, under a filter, and under
        Landlock's rules. filter_code: BPF, or nothing. rules_fd: a ruleset, or -1; it binds only the thread that calls.
        recorded: whether the kernel's audit hears of what the filter refuses. Raises OSError.
    execute(argv, env, token) executes a program, where only the call that carries the token may; without one as ever.
        Raises OSError.
    """
    import ctypes
    import os

    machine = os.uname().machine
    seccomp = {"x86_64": 317, "aarch64": 277}[machine]
    execve = {"x86_64": 59, "aarch64": 221}[machine]
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype, syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 7
    syscall(446, -1, 0, 0, 0, 0, 0)  # refused: there is no such ruleset

    def memory(size: int) -> tuple[int, memoryview, memoryview]:
        """Where it is, its bytes, and the same as numbers of 64 bits."""
        room = ctypes.create_string_buffer(size)
        data = memoryview(room).cast("B")
        return ctypes.addressof(room), data, data.cast("Q")

    usual = memory(16384)

    def restrict_self(filter_code: bytes, rules_fd: int, recorded: bool = True) -> None:  # noqa: FBT001, FBT002
        if rules_fd >= 0 and syscall(446, rules_fd, 0, 0, 0, 0, 0):  # landlock_restrict_self
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        if filter_code:
            start, data, numbers = usual
            # struct sock_fprog: how many instructions of 8 bytes, and where.
            numbers[0], numbers[1] = len(filter_code) // 8, start + 16
            data[16 : 16 + len(filter_code)] = filter_code
            # SECCOMP_SET_MODE_FILTER, with SECCOMP_FILTER_FLAG_TSYNC, and _LOG where it is recorded: a number above 0
            # names a thread that would not.
            if syscall(seccomp, 1, 3 if recorded else 1, start, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "seccomp")

    def execute(argv: list[str], env: dict[str, str], token: bytes) -> NoReturn:
        if not token:
            # Not os.execvpe: it imports a module on its way, which a policy that allows no descriptor forbids.
            os.execve(argv[0], argv, env)
        _, data, numbers = usual
        data[:24] = token
        secret = numbers[0], numbers[1], numbers[2]
        words = [f"{word}\0".encode("utf-8", "surrogateescape") for word in argv]
        pairs = [f"{name}={value}\0".encode("utf-8", "surrogateescape") for name, value in env.items()]
        texts = [*words, b"", *pairs, b""]
        joined = b"".join(texts)
        at = 8 * len(texts)  # behind the pointers, of which the empty text's is none
        size = at + len(joined)
        start, data, numbers = usual if size <= len(usual[1]) else memory(size + -size % 8)
        data[at:size] = joined
        for number, text in enumerate(texts):
            numbers[number] = start + at if text else 0
            at += len(text)
        syscall(execve, numbers[0], start, start + 8 * len(words) + 8, *secret)
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), argv[0])

    return restrict_self, execute
