"""The user's settings, ~/.config/x07/sandbox.toml, which no policy or project can override."""

import os
import stat
from pathlib import Path
from typing import Any, Final

from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.host.paths import settings_file

_MAX_BYTES: Final = 1 << 20


def settings_bytes(path: Path) -> bytes | None:
    """Return the content of a settings file; None if it is missing. Raises HostError."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HostError(f"cannot read {path}", exc.strerror or str(exc), "Make it readable, or remove it") from exc
    if info.st_uid not in {0, os.geteuid()} or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = "other users can write to it"
        raise HostError(f"cannot use {path}", why, f"Run: chmod go-w {path} (it must belong to you or root)")
    return data


def settings_table(data: bytes, name: str, keys: frozenset[str], source: str) -> dict[str, Any]:
    """Return the table [*name*] of a settings file with these valid *keys*. Raises UsageError that names *source*."""
    import tomllib

    what = f"cannot use {source}"
    if len(data) > _MAX_BYTES:
        raise UsageError(what, f"it has more than {_MAX_BYTES} bytes", "Make it smaller")
    try:
        table = tomllib.loads(data.decode()).get(name, {})
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(what, f"it is not TOML: {exc}", "Correct it") from exc
    if not isinstance(table, dict):
        raise UsageError(what, f"{name} is not a table", f"Write [{name}]")
    if unknown := sorted(set(table) - keys):
        raise UsageError(what, f"[{name}] has an unknown key {unknown[0]!r}", f"Valid keys: {', '.join(sorted(keys))}")
    return table


def scale_when_emulated() -> bool:
    """Return whether `[limits] scale_when_emulated = "auto"` is set. Raises HostError, UsageError."""
    path = settings_file()
    if (data := settings_bytes(path)) is None:
        return False
    value = settings_table(data, "limits", frozenset({"scale_when_emulated"}), str(path)).get("scale_when_emulated")
    if value not in {None, "auto", "never"}:
        why = 'limits.scale_when_emulated is neither "auto" nor "never"'
        raise UsageError(f"cannot use {path}", why, "Correct it")
    return value == "auto"
