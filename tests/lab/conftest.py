"""The laboratory, one for all tests of a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conftest import need
from tests.lab.laboratory import Laboratory

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def lab() -> Iterator[Laboratory]:
    """The fake internet; a test that changes names calls lab.reset_names() first."""
    reason = Laboratory.why_not()
    need(reason is None, str(reason), installable=False)
    with Laboratory() as made:
        yield made
