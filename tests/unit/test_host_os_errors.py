"""Advice for errors of the host and for shell limits."""

from __future__ import annotations

import errno

import pytest

from x07_sandbox.host.paths import fix_for, out_of_cpu_time


@pytest.mark.parametrize(
    ("status", "named"), [(152, True), (-24, True), (137, False), (1, False), (0, False), (None, False)]
)
def test_a_limit_on_cpu_time_is_named(status: int | None, *, named: bool) -> None:
    """A VMM killed by the shell's CPU time limit is reported with that limit."""
    assert ("(ulimit -H -t)" in out_of_cpu_time(status)) == named
    assert bool(out_of_cpu_time(status)) == named


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_has_its_own_advice(number: int) -> None:
    """A full or read-only disk is reported with advice of its own."""
    assert "X07_VM_STATE_DIR and X07_VM_CACHE_DIR" in fix_for(OSError(number, ""), "another")
    assert fix_for(OSError(errno.EOPNOTSUPP, ""), "another") == "another"
