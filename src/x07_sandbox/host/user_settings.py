"""The user's settings file, ~/.config/x07/sandbox.toml. No policy or project can override it."""

import os
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

from x07_sandbox.errors import Command, HostError, UsageError
from x07_sandbox.host.paths import settings_file

_MAX_BYTES: Final = 1 << 20
_DISK_MAX: Final = 10**9


class Setting(NamedTuple):
    """One key of the file, shown in docs/reference/settings.md. default: the default value in TOML."""

    table: str
    key: str
    values: str
    default: str
    doc: str


SETTINGS: Final = (
    Setting(
        "net",
        "allow_local",
        "list of `ADDRESS:PORT` or `NETWORK:PORT`",
        "`[]`",
        "Private, shared and link-local addresses to which programs may connect if the policy allows them too. "
        "A network never includes loopback or metadata addresses, or addresses of this host.",
    ),
    Setting(
        "net",
        "allow_special",
        "list of `ADDRESS:PORT` or `NETWORK:PORT`",
        "`[]`",
        "Addresses for documentation (such as 192.0.2.0/24) and benchmarks (198.18.0.0/15) that may be used likewise.",
    ),
    Setting(
        "net",
        "allow_loopback",
        "true or false",
        "`false`",
        "Whether `allow_local` may contain loopback addresses of this host.",
    ),
    Setting(
        "net",
        "allow_metadata",
        "true or false",
        "`false`",
        "Whether `allow_local` may contain the address of a cloud's metadata service.",
    ),
    Setting("net", "opaque_ports", "list of ports", "`[]`", "Ports on which all bytes pass unchecked."),
    Setting(
        "net", "proxy", '`"http://[USER:PASSWORD@]HOST:PORT"`', "none", "HTTP proxy for all connections (CONNECT)."
    ),
    Setting("net", "proxy_resolves", "true or false", "`false`", "Whether the proxy gets names instead of addresses."),
    Setting("net", "ca", "path", "none", "PEM file of certificates that programs trust too, as with `--ca`."),
    Setting("net", "max_connections", "1 to 512", "`256`", "How many connections a program may have open at once."),
    Setting("net", "connections_per_second", "1 to 1000", "`100`", "Limit of new connections; others have to wait."),
    Setting("net", "max_pending", "1 to 256", "`128`", "Limit of connections being established; others have to wait."),
    Setting("net", "idle_seconds", "1 to 86400", "`3600`", "After how long an idle TCP connection is closed."),
    Setting(
        "limits",
        "scale_when_emulated",
        '`"auto"`, `"never"`',
        '`"never"`',
        "Whether x07 multiplies the time limits of all runs in emulated VMs, as `--scale-limits` does for one run.",
    ),
    Setting(
        "disk",
        "saved_vms_mib",
        "MiB",
        "`8192`",
        "How much disk space saved VMs, snapshots and checkpoints may take. Above it, x07 removes the least recently "
        "used saved VMs and snapshots.",
    ),
    Setting("disk", "runs_days", "days", "`7`", "How long records of runs are kept after the run has ended."),
    Setting("disk", "runs_max", "number", "`1000`", "How many records of runs are kept. The newest ones stay."),
    Setting("disk", "runs_mib", "MiB", "`1024`", "How much disk space records of runs may take."),
)


class DiskLimits(NamedTuple):
    """What saved VMs and records of runs may take on the disk: the settings of `[disk]`."""

    saved_vms_mib: int = 8192  # a default image has 1.3 GiB of saved VMs, so three images have room
    runs_days: int = 7
    runs_max: int = 1000
    runs_mib: int = 1024


def settings_bytes(path: Path) -> bytes | None:
    """Return the content of a settings file, or None if it is missing. Raises HostError if it cannot be used."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HostError(f"cannot read {path}", exc.strerror or str(exc), "Make it readable, or remove it") from exc
    if info.st_uid not in {0, os.geteuid()} or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        import shlex

        why = "other users can write to it"
        fix = ("If it belongs to you or root, run: ", Command(f"chmod go-w {shlex.quote(str(path))}"))
        raise HostError(f"cannot use {path}", why, fix)
    return data


def settings_table(data: bytes, name: str, source: str) -> dict[str, Any]:
    """Return the table [*name*] of a settings file. source: its path, for errors. Raises UsageError if invalid."""
    import tomllib

    keys = {row.key for row in SETTINGS if row.table == name}
    what = f"cannot use {source}"
    if len(data) > _MAX_BYTES:
        raise UsageError(what, f"it has more than {_MAX_BYTES} bytes", "Make it smaller")
    try:
        table = tomllib.loads(data.decode()).get(name, {})
    except (ValueError, RecursionError) as exc:  # also of a number that is too long
        raise UsageError(what, f"it is not valid TOML ({exc})", "Correct the file") from exc
    if not isinstance(table, dict):
        raise UsageError(what, f"{name} is not a table", f"Write [{name}]")
    if unknown := sorted(set(table) - keys):
        raise UsageError(what, f"[{name}] has an unknown key {unknown[0]!r}", f"Valid keys: {', '.join(sorted(keys))}")
    return table


def scale_when_emulated() -> bool:
    """Return whether the settings contain `[limits] scale_when_emulated = "auto"`. Raises HostError, UsageError."""
    path = settings_file()
    if (data := settings_bytes(path)) is None:
        return False
    value = settings_table(data, "limits", str(path)).get("scale_when_emulated")
    if value not in {None, "auto", "never"}:
        why = 'limits.scale_when_emulated is neither "auto" nor "never"'
        raise UsageError(f"cannot use {path}", why, "Correct the file")
    return value == "auto"


def disk_limits() -> DiskLimits:
    """Return the settings in `[disk]`, or the defaults. Raises HostError, UsageError."""
    try:
        path = settings_file()
    except HostError:  # without a home there are no settings
        return DiskLimits()
    if (data := settings_bytes(path)) is None:
        return DiskLimits()
    found = settings_table(data, "disk", str(path))
    for key, value in found.items():
        if type(value) is not int or not 1 <= value <= _DISK_MAX:
            why = f"disk.{key} is not a whole number from 1 to {_DISK_MAX}"
            raise UsageError(f"cannot use {path}", why, f"Correct {key}, or remove it")
    return DiskLimits(**found)
