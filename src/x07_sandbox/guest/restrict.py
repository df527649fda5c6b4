"""The last steps of a process before it is the program: what the policy forbids is taken away from it.

`last_steps` also runs in the interpreter that waits, which has none of our modules: its code is put into the hook
(`x07_sandbox.guest.interpreter`). So it imports what it needs, and uses nothing of this module. What it makes, it makes
beforehand: in a fresh clone each instruction that is met first costs ten times as much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

TOKEN_BYTES = 24  # six arguments of 32 bits, as the filter compares them


def last_steps() -> tuple[Callable[..., None], Callable[[list[str], dict[str, str], bytes], NoReturn]]:
    """Two functions, ready to be called.

    take_away(filter_code, rules_fd, recorded=True) puts this process, all threads of it, under a filter, and under
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
    syscall.restype = ctypes.c_long
    syscall(446, -1, 0)  # refused: there is no such ruleset
    code = ctypes.create_string_buffer(8192)
    room = memoryview(code).cast("B")
    address = ctypes.addressof(code).to_bytes(8, "little")
    usual = 128
    pointers = ctypes.c_char_p * usual
    secret = [ctypes.c_uint64() for _ in range(3)]

    def take_away(filter_code: bytes, rules_fd: int, recorded: bool = True) -> None:  # noqa: FBT001, FBT002
        if rules_fd >= 0 and syscall(446, rules_fd, 0):  # landlock_restrict_self
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        if filter_code:
            room[: len(filter_code)] = filter_code
            # SECCOMP_SET_MODE_FILTER, with SECCOMP_FILTER_FLAG_TSYNC, and _LOG where it is recorded: a number above 0
            # names a thread that would not.
            # struct sock_fprog: how many instructions of 8 bytes, and where.
            if syscall(seccomp, 1, 3 if recorded else 1, (len(filter_code) // 8).to_bytes(8, "little") + address):
                raise OSError(ctypes.get_errno(), "seccomp")

    def execute(argv: list[str], env: dict[str, str], token: bytes) -> NoReturn:
        if not token:
            # Not os.execvpe: it imports a module on its way, which a policy that allows no descriptor forbids.
            os.execve(argv[0], argv, env)
        words = [os.fsencode(word) for word in argv]
        pairs = [os.fsencode(name) + b"=" + os.fsencode(value) for name, value in env.items()]
        for number, part in enumerate(secret):
            part.value = int.from_bytes(token[8 * number : 8 * number + 8], "little")
        most = max(len(words), len(pairs)) + 1
        kind = pointers if most <= usual else ctypes.c_char_p * most
        syscall(execve, words[0], kind(*words), kind(*pairs), *secret)
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), argv[0])

    return take_away, execute
