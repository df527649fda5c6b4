"""Unfinished jobs, found by one listing of the state folder.

Every start of a job needs this module, so it has few imports.
"""

import os
import re
from pathlib import Path
from typing import Final, Literal

JOB_NAME: Final = re.compile(r"((\d{1,15})-(\d{1,10})-\d{1,10})-([a-z][a-z0-9-]{0,63})")
ENDS: Final[tuple[Literal["done", "reaped"], ...]] = ("done", "reaped")


def unfinished_jobs(root: Path, most: int) -> list[str]:
    """Check the *most* newest jobs. Return the names of those without a `done` or `reaped` file, newest first."""
    try:
        names = [name for name in os.listdir(root) if JOB_NAME.fullmatch(name)]  # noqa: PTH208 - names are wanted
    except OSError:
        return []
    names.sort(reverse=True)  # the names start with the run's time
    place = os.fspath(root)
    return [name for name in names[:most] if not any(os.path.lexists(f"{place}/{name}/{end}") for end in ENDS)]
