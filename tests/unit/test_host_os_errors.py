"""Troubles that are the host's, or limits of the shell."""

from __future__ import annotations

import errno

import pytest

from x07_sandbox.host.os_errors import fix_for, out_of_cpu_time


@pytest.mark.parametrize(
    ("status", "told"), [(152, True), (-24, True), (137, False), (1, False), (0, False), (None, False)]
)
def test_a_limit_on_cpu_time_is_named(status: int | None, *, told: bool) -> None:
    """Of a machine that the kernel ended for its CPU time that limit is named, and of no other."""
    assert ("(ulimit -H -t)" in out_of_cpu_time(status)) == told
    assert bool(out_of_cpu_time(status)) == told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_more_is_not_called_another_kind_of_disk(number: int) -> None:
    """What a full or a read-only disk needs is told in place of the advice that a caller has for all else."""
    assert "X07_VM_STATE_DIR and X07_VM_CACHE_DIR" in fix_for(OSError(number, ""), "another")
    assert fix_for(OSError(errno.EOPNOTSUPP, ""), "another") == "another"
