"""Promises of the one table of numbers, and of switches in the environment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings

NAME = "X07_VM_REQUIRE_HARDWARE"


@given(st.integers(0, 10**9))
def test_grace_is_upstreams(wall_ms: int) -> None:
    """The time between asking and killing is a tenth of the wall time, from 1 to 1000 ms, as X07 has it."""
    assert settings.grace_ms(wall_ms) == min(1000, max(1, wall_ms // 10))
    assert isinstance(settings.grace_ms(wall_ms), int)


def test_the_allowance_covers_each_step_besides_the_program() -> None:
    """A job's deadline leaves room for queue, boot, copying in and bringing changes out, all to their own limits."""
    parts = settings.QUEUE_S + settings.BOOT_S + settings.COPY_IN_S + settings.CHANGES_OUT_S
    assert settings.allowance_ms() == parts * 1000 == 750_000


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "yes", "YES", " 1 "])
def test_yes_is_yes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every spelling of X07's turns a switch on."""
    monkeypatch.setenv(NAME, value)
    assert settings.flag_from_environment(NAME) is True


@pytest.mark.parametrize("value", [None, "", " ", "0", "false", "FALSE", "no", "NO"])
def test_no_is_no(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset, empty, and every spelling of no turn a switch off."""
    monkeypatch.delenv(NAME, raising=False)
    if value is not None:
        monkeypatch.setenv(NAME, value)
    assert settings.flag_from_environment(NAME) is False


@pytest.mark.parametrize("value", ["2", "on", "True", "tru", "yes please", "-1", "1\n1"])
def test_a_typing_error_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is neither yes nor no is never taken for either, and the error names the variable."""
    monkeypatch.setenv(NAME, value)
    with pytest.raises(UsageError, match=NAME):
        settings.flag_from_environment(NAME)
