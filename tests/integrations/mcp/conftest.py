"""Fixtures of the tests of `x07 mcp`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder for this test's job records."""
    place = tmp_path / "home" / "jobs"
    place.parent.mkdir(mode=0o700)
    monkeypatch.setenv("X07_VM_STATE_DIR", str(place))
    return place
