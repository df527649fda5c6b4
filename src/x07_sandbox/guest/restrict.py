"""The last steps of a process before it is the program: what the policy forbids is taken away from it.

Both functions also run in the interpreter that waits, which has none of our modules: their code is put into its hook
(`x07_sandbox.guest.interpreter`). So each imports what it needs, and uses nothing of this module.
"""

from __future__ import annotations

from typing import NoReturn

TOKEN_BYTES = 24  # six arguments of 32 bits, as the filter compares them


def take_away(filter_code: bytes, rules_fd: int) -> None:
    """Put this process, all threads of it, under a filter, and under Landlock's rules.

    filter_code: BPF, or nothing. rules_fd: a Landlock ruleset, or -1; it binds only the thread that calls.
    Raises OSError.
    """
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    seccomp = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
    if rules_fd >= 0 and libc.syscall(446, rules_fd, 0):  # landlock_restrict_self
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    if filter_code:
        # struct sock_fprog: how many instructions of 8 bytes, and where.
        code = ctypes.create_string_buffer(filter_code, len(filter_code))
        fields = (len(filter_code) // 8).to_bytes(8, "little") + ctypes.addressof(code).to_bytes(8, "little")
        # SECCOMP_SET_MODE_FILTER, with SECCOMP_FILTER_FLAG_TSYNC: a number above 0 names a thread that would not.
        if libc.syscall(seccomp, 1, 1, fields):
            raise OSError(ctypes.get_errno(), "seccomp")


def execute(argv: list[str], env: dict[str, str], token: bytes) -> NoReturn:
    """Execute a program, where only the call that carries *token* may; without a token as ever. Raises OSError."""
    import ctypes
    import os

    if not token:
        # Not os.execvpe: it imports a module on its way, which a policy that allows no descriptor forbids.
        os.execve(argv[0], argv, env)
    libc = ctypes.CDLL(None, use_errno=True)
    words = [os.fsencode(word) for word in argv]
    pairs = [os.fsencode(f"{name}={value}") for name, value in env.items()]
    secret = [ctypes.c_uint64(int.from_bytes(token[at : at + 8], "little")) for at in (0, 8, 16)]
    libc.syscall(
        {"x86_64": 59, "aarch64": 221}[os.uname().machine],
        words[0],
        (ctypes.c_char_p * (len(words) + 1))(*words),
        (ctypes.c_char_p * (len(pairs) + 1))(*pairs),
        *secret,
    )
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), argv[0])
