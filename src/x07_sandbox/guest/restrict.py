"""Restricting a process as the policy requires, and executing the program in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NoReturn

from x07_sandbox import kernel

TOKEN_BYTES: Final = kernel.TOKEN_BYTES


def exec_functions() -> tuple[Callable[[bytes, int], None], Callable[[list[str], dict[str, str], bytes], NoReturn]]:
    """Return two functions: `restrict_self`, and `kernel.execute`."""
    return restrict_self, kernel.execute


def restrict_self(filter_code: bytes, rules_fd: int) -> None:
    """Apply a seccomp filter, empty for none, and a Landlock ruleset, -1 for none. Raises OSError."""
    if rules_fd >= 0:
        kernel.landlock_restrict(rules_fd)
    if filter_code:
        kernel.load_filter(filter_code, audited=True)
