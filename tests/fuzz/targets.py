"""The fuzz targets, by name: the modules fuzz_NAME.py, each with `one_input` and `seeds`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final, Protocol, cast

NAMES: Final = sorted(path.stem.removeprefix("fuzz_") for path in Path(__file__).parent.glob("fuzz_*.py"))


class Target(Protocol):
    """A fuzz target."""

    def one_input(self, data: bytes) -> object:
        """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""

    def seeds(self) -> dict[str, bytes]:
        """Return the inputs that fuzzing starts with, by name. Those named found-... once broke an invariant."""


def target(name: str) -> Target:
    """Return the target of that name."""
    return cast("Target", importlib.import_module(f"tests.fuzz.fuzz_{name}"))
