"""Troubles that are the host's, or limits of the shell."""

from __future__ import annotations

import pytest

from x07_sandbox.host.troubles import out_of_cpu_time


@pytest.mark.parametrize(
    ("status", "told"), [(152, True), (-24, True), (137, False), (1, False), (0, False), (None, False)]
)
def test_a_limit_on_cpu_time_is_named(status: int | None, *, told: bool) -> None:
    """Of a machine that the kernel ended for its CPU time that limit is named, and of no other."""
    assert ("(ulimit -H -t)" in out_of_cpu_time(status)) == told
    assert bool(out_of_cpu_time(status)) == told
