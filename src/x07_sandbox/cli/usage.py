"""The parser of all commands."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from x07_sandbox.errors import UsageError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, so that --json holds for them too; options are written out in full."""

    def __init__(self, *args: Any, **words: Any) -> None:  # noqa: ANN401 - as argparse has them
        super().__init__(*args, **(words | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError("wrong usage", message, f"See {self.prog} --help")
