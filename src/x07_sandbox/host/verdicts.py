"""The store of results of tests of this host and of its files.

A result is valid until the host reboots, or for minutes if the state of the host may have caused it.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import boot_id, boot_ms
from x07_sandbox.host.paths import cache_folder, read_bounded, replace_file

FOLDER: Final = "verdicts"
# A change within one tick of the kernel's clock (4 ms at HZ=250, 10 ms at 100) after reading could keep the ctime, so
# the state of a file that changed so recently is not recorded.
SETTLED_NS: Final = 1_000_000_000
_MAX: Final = 64 * 1024


def file_state(path: str) -> tuple[object, ...]:
    """Return JSON values that change when a file is written or replaced. Raises OSError."""
    info = Path(path).stat()
    return path, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


class Verdict:
    """The stored result of one test.

    kind: the name of the test. subject: what was tested, as JSON values. key: a JSON value on which the result depends
    too. Results with different subjects are stored side by side. A result with another key replaces the earlier one.
    """

    def __init__(self, kind: str, *subject: object, key: object = None) -> None:
        self.path = cache_folder(FOLDER) / f"{kind}-{_digest(subject)}.json"
        self._key = None if key is None else _digest(key)

    def read(self) -> dict[str, Any]:
        """Return the stored values, or {} if there are none or if they have expired."""
        stored = stored_in(self.path)
        return stored if stored.get("key") == self._key else {}

    def write(self, values: Mapping[str, object], *, transient: bool = False) -> None:
        """Store *values* until the host reboots, or for minutes if the cause may be *transient*. Raises OSError.

        Each failure after such a one doubles the minutes: the test of KVM where its guests hang takes a processor for
        5 to 30 s, and the cause is then hardly transient.
        """
        stored = dict(values) | {"boot_id": boot_id(), "key": self._key}
        if transient:
            before = _of_this_boot(self.path)
            last_s = float(before.get("retry_s", 0)) if before.get("key") == self._key else 0.0
            retry_s = min(settings.RETRY_MAX_S, max(settings.RETRY_S, 2 * last_s))
            stored |= {"retry_s": retry_s, "retry_at_ms": boot_ms() + int(retry_s * 1000)}
        replace_file(self.path, json.dumps(stored).encode())

    def read_or_make(self, test: Callable[[], Mapping[str, object]]) -> Mapping[str, Any]:
        """Return the stored values. If there are none, store and return those of *test*. Raises OSError."""
        if known := self.read():
            return known
        made = test()
        self.write(made)
        return made


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def stored_in(path: Path) -> dict[str, Any]:
    """Return the values stored in a verdict's file, or {} if there are none or if they have expired."""
    stored = _of_this_boot(path)
    return stored if boot_ms() < stored.get("retry_at_ms", math.inf) else {}


def _of_this_boot(path: Path) -> dict[str, Any]:
    """Return the values that were stored since the host's boot, expired ones too, or {} if there are none."""
    with contextlib.suppress(UsageError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        stored = dict(json.loads(read_bounded(path, "verdict", _MAX)))
        times = {name: float(stored[name]) for name in ("retry_at_ms", "retry_s") if name in stored}
        if stored["boot_id"] == boot_id():
            return stored | times
    return {}


def validity(stored: Mapping[str, Any]) -> str:
    """Return how long the stored values are valid: "until this host reboots" or "for 5 minutes"."""
    if "retry_at_ms" not in stored:
        return "until this host reboots"
    minutes = math.ceil((float(stored["retry_at_ms"]) - boot_ms()) / 60_000)
    return f"for {minutes} minute{'' if minutes == 1 else 's'}"


def forget(kind: str) -> None:
    """Remove all results of one test. Raises HostError."""
    for path in cache_folder(FOLDER).glob(f"{kind}-*.json"):
        path.unlink(missing_ok=True)
