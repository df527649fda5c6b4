"""The table of timing constants."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.host import settings


@given(st.integers(0, 10**9))
def test_grace_is_upstreams(wall_ms: int) -> None:
    """The grace time before a kill is a tenth of the wall time, 1 to 1000 ms, as in X07."""
    assert settings.grace_ms(wall_ms) == min(1000, max(1, wall_ms // 10))
    assert isinstance(settings.grace_ms(wall_ms), int)


def test_the_allowance_covers_each_step_besides_the_program() -> None:
    """A job's deadline covers queue, boot, copy-in and copy-out at their own limits."""
    parts = settings.QUEUE_S + settings.BOOT_S + settings.COPY_IN_S + settings.CHANGES_OUT_S
    assert settings.allowance_ms() == parts * 1000 == 750_000
