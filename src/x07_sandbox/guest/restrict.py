"""Restricting a process as the policy requires, and executing the program in it.

The code of `exec_functions` also runs in the waiting interpreter (`guest/interpreter`), which has none of x07's
modules. So it imports what it needs and uses no global of this module. It allocates memory in advance, since that is
slow in a fresh clone of a saved VM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

TOKEN_BYTES = 24  # three arguments of 64 bits


def exec_functions() -> tuple[Callable[..., None], Callable[[list[str], dict[str, str], bytes], NoReturn]]:
    """Return two functions.

    restrict_self(filter_code, rules_fd, recorded=True) applies a seccomp filter to all threads of this process, and a
        Landlock ruleset to the calling thread. filter_code: BPF, empty for none. rules_fd: -1 for none. recorded:
        whether refusals are audited. Raises OSError.
    execute(argv, env, token) executes a program. token: the secret that the "-once" filters require, empty for none.
        Raises OSError.
    """
    import ctypes
    import os

    machine = os.uname().machine
    seccomp = {"x86_64": 317, "aarch64": 277}[machine]
    execve = {"x86_64": 59, "aarch64": 221}[machine]
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype, syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 7
    syscall(446, -1, 0, 0, 0, 0, 0)  # a first, failing call, so that its code has run before a clone needs it

    def memory(size: int) -> tuple[int, memoryview, memoryview]:
        """Allocate a buffer. Return its address, and two views of it: as bytes and as 64-bit numbers."""
        room = ctypes.create_string_buffer(size)
        data = memoryview(room).cast("B")
        return ctypes.addressof(room), data, data.cast("Q")

    usual = memory(16384)

    def restrict_self(filter_code: bytes, rules_fd: int, recorded: bool = True) -> None:  # noqa: FBT001, FBT002
        if rules_fd >= 0 and syscall(446, rules_fd, 0, 0, 0, 0, 0):  # landlock_restrict_self
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        if filter_code:
            start, data, numbers = usual
            # struct sock_fprog: number of 8-byte instructions, and their address.
            numbers[0], numbers[1] = len(filter_code) // 8, start + 16
            data[16 : 16 + len(filter_code)] = filter_code
            # SECCOMP_SET_MODE_FILTER with FLAG_TSYNC and FLAG_LOG; a positive result is a thread that could not sync.
            if syscall(seccomp, 1, 3 if recorded else 1, start, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "seccomp")

    def execute(argv: list[str], env: dict[str, str], token: bytes) -> NoReturn:
        if not token:
            # Not os.execvpe: it imports a module, which needs a descriptor.
            os.execve(argv[0], argv, env)
        _, data, numbers = usual
        data[:24] = token
        secret = numbers[0], numbers[1], numbers[2]
        words = [f"{word}\0".encode("utf-8", "surrogateescape") for word in argv]
        pairs = [f"{name}={value}\0".encode("utf-8", "surrogateescape") for name, value in env.items()]
        texts = [*words, b"", *pairs, b""]
        joined = b"".join(texts)
        at = 8 * len(texts)  # the strings follow the pointers; an empty string stands for NULL
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
