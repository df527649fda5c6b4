"""A context in which one more backend is registered."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.backends.registry import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.backends.base import Backend
    from x07_sandbox.backends.registry import BackendRow


@contextlib.contextmanager
def registered(row: BackendRow, factory: Callable[[], Backend]) -> Iterator[None]:
    """Register *row* with this factory for the duration of the context."""
    BY_NAME[row.name] = replace(row, factory=lambda _name: factory())
    try:
        yield
    finally:
        del BY_NAME[row.name]
