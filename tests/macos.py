"""Let a process think that it runs on a Mac, for tests of backends that exist only there."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def pretend(change: Callable[[object, str, object], None], major: int) -> None:
    """Let the selection of a backend see this version of macOS; everything else stays Linux. change: setattr."""
    real = os.uname()
    change(os, "uname", lambda: os.uname_result(("Darwin", *real[1:])))
    change(platform, "mac_ver", lambda: (f"{major}.0", ("", "", ""), "arm64"))
