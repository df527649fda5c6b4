"""Restricting a process as the policy requires, and executing the program in it."""

from __future__ import annotations

from x07_sandbox import kernel


def restrict_self(filter_code: bytes, rules_fd: int) -> None:
    """Apply a seccomp filter, empty for none, and a Landlock ruleset, -1 for none. Raises OSError."""
    if rules_fd >= 0:
        kernel.landlock_restrict(rules_fd)
    if filter_code:
        kernel.load_filter(filter_code, audited=True)
