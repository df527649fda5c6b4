"""The parser of all commands."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from x07_sandbox.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, so that --json holds for them too; options are written out in full."""

    def __init__(self, *args: Any, **words: Any) -> None:  # noqa: ANN401 - as argparse has them
        super().__init__(*args, **(words | {"allow_abbrev": False}))

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print help or version; unlike the base class, not past an error. Raises OSError."""
        (file or sys.stderr).write(message)
        sys.stdout.flush()

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError("wrong usage", message, f"See {self.prog} --help")
