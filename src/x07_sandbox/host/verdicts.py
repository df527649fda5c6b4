"""Stored results of tests of this host and of its files.

A result is valid until the host reboots, or for minutes if the state of the host may have caused it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import boot_ms
from x07_sandbox.host.paths import cache_folder, read_bounded, replace_file
from x07_sandbox.host.processes import boot_id

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX: Final = 64 * 1024


def proof_file(program: str, *parts: object) -> Path:
    """Return the path of the file that stores the result of a test of *program* (a path). Raises HostError.

    The path depends on the boot of this host, the kernel, *program* and *parts* (JSON values).
    """
    info, host = Path(program).stat(), os.uname()
    key = [boot_id(), host.release, host.version, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, *parts]
    return cache_folder("proofs") / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def write_verdict(path: Path, values: Mapping[str, object], *, transient: bool = False) -> None:
    """Store *values* until the host reboots, or for minutes if the cause may be *transient*. Raises OSError."""
    stored = dict(values) | {"boot_id": boot_id()}
    if transient:
        stored["retry_at_ms"] = boot_ms() + int(settings.RETRY_S * 1000)
    replace_file(path, json.dumps(stored).encode())


def validity(stored: Mapping[str, Any]) -> str:
    """Return how long the stored values are valid: "until this host reboots" or "for 5 minutes"."""
    if "retry_at_ms" not in stored:
        return "until this host reboots"
    minutes = math.ceil((float(stored["retry_at_ms"]) - boot_ms()) / 60_000)
    return f"for {minutes} minute{'' if minutes == 1 else 's'}"


def read_verdict(path: Path) -> dict[str, Any]:
    """Return the values stored in *path*, or {} if there are none or if they have expired."""
    with contextlib.suppress(UsageError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        stored = json.loads(read_bounded(path, "verdict", _MAX))
        if stored["boot_id"] == boot_id() and boot_ms() < float(stored.get("retry_at_ms", math.inf)):
            return dict(stored)
    return {}
