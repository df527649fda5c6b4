"""Troubles that are the host's, or limits of the shell."""

from __future__ import annotations

import resource

import pytest

from x07_sandbox.host.troubles import out_of_cpu_time


@pytest.mark.parametrize(
    ("status", "limit_s", "told"),
    [
        (137, 3, True),
        (-24, 3, True),
        (137, resource.RLIM_INFINITY, False),
        (1, 3, False),
        (None, 3, False),
    ],
)
def test_a_limit_on_cpu_time_is_named(
    monkeypatch: pytest.MonkeyPatch, status: int | None, limit_s: int, *, told: bool
) -> None:
    """Of a child that was killed it is told where the shell's limit on CPU time may have done that, and of no other."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (limit_s, limit_s))
    assert out_of_cpu_time(status) == ("ulimit -t gives a process 3 s of CPU time here" if told else "")
