"""Names and texts of the command line are UTF-8, whatever the locale says."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def start_in_utf8() -> NoReturn:
    """Begin this command anew, for where Python takes names to be something else, as in the locale en_US.ISO-8859-1.

    What was typed reaches a program as the same bytes then, and a name in a document leads to the file that has it.
    """
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - no shell is needed
