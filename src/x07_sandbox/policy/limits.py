"""Limits that a caller sets in addition to the policy, such as `--memory 1G` or `memory="1G"`.

The author of a policy may raise its limits up to the schema's maximum. Everybody else may only lower them. A value
out of range is an error and is never clamped.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import Flag, Text, UsageError
from x07_sandbox.options import FILE_SIZE, LIMITS, Option
from x07_sandbox.policy.model import Limits, Policy

FILE_BYTES: Final = 16 << 20  # if the policy has 0
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE: Final = re.compile(r"([0-9]{1,12})(?:(\.[0-9]{1,6})?([KMG])(?:i?B)?)?", re.IGNORECASE | re.ASCII)


NAMES: Final[Mapping[str, Option]] = MappingProxyType({row.sets.removeprefix("limits."): row for row in LIMITS})
"""The option for each field of a policy's limits."""

_FILE_SIZE: Final = "file_bytes"  # sets both fields of a policy
_FILE_FIELDS: Final = ("max_read_bytes", "max_write_bytes")


class LimitChanges(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that the caller set; None keeps the policy's limit."""

    mem_bytes: int | None = None
    cpu_ms: int | None = None
    wall_ms: int | None = None
    procs: int | None = None
    fds: int | None = None
    file_bytes: int | None = None  # of one file that is copied, in or back
    may_raise: bool | None = None  # whether they may exceed the policy's; None: its origin decides (sessions/request)

    def given(self) -> dict[str, int]:
        """Return the limits that are set, by field."""
        return {field: value for field in NAMES if (value := getattr(self, field)) is not None}


class FlagReach(msgspec.Struct, frozen=True):
    """How far flags can raise the effective limits."""

    tops: Mapping[str, int] = MappingProxyType({})  # the largest value that a flag can set, by path ("limits.fds")
    policy_too: bool = True  # whether a change of the policy could also raise the limits


def parse_size(text: str) -> int | None:
    """Return the number of bytes of a size such as 512M, 1.5G or a plain number, or None for any other text."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    number, fraction, unit = found[1], found[2] or "", (found[3] or "").upper()
    return int(float(number + fraction) * _UNITS[unit]) if fraction else int(number) * _UNITS[unit]


def size_text(size: int) -> str:
    """Return a size in the form that flags accept: 1536M for 1.5 GiB."""
    unit = next(unit for unit in ("G", "M", "K", "") if size % _UNITS[unit] == 0)
    return f"{size // _UNITS[unit]}{unit}"


def flag_text(field: str, value: int) -> str:
    """Return the flag that sets a limit to *value*, such as `--cpu-time 2.5`."""
    return f"{NAMES.get(field, FILE_SIZE).flag} {_value(field, value)}"


def flag_for_file(size: int) -> str:
    """Return the flag that allows a file of *size* bytes to be copied, rounded up to MiB."""
    return flag_text(_FILE_SIZE, min(-(-size >> 20) << 20, int(FILE_SIZE.most)))


def _value(field: str, value: int) -> str:
    if field in {"mem_bytes", _FILE_SIZE}:
        return size_text(value)
    return f"{value / 1000:.3f}".rstrip("0").rstrip(".") if field.endswith("_ms") else str(value)


def range_fault(row: Option, value: float) -> str:
    """Return the problem with the value of an option that is out of range, or "" for a valid value."""
    if row.least <= value <= row.most:
        return ""
    least, most = (size_text(int(end)) if row.kind == "size" else str(end) for end in (row.least, row.most))
    return f"must be at least {least} and at most {most}{' seconds' if row.kind == 'seconds' else ''}"


def change_limits(policy: Policy, changes: LimitChanges, *, may_raise: bool, source: str) -> Policy:
    """Return *policy* with the caller's limits. source: the policy's name. Raises UsageError for a forbidden limit.

    If limits may be raised, a new procs limit also raises a smaller process.max_live, and a new wall_ms also raises a
    smaller cpu_ms.
    """
    given = changes.given()
    if may_raise and "cpu_ms" not in given and given.get("wall_ms", 0) > policy.limits.cpu_ms:
        given["cpu_ms"] = given["wall_ms"]
    limits = policy.limits
    for field, value in given.items():
        if fault := range_fault(NAMES[field], value / 1000 if field.endswith("_ms") else value):
            flag = Flag(NAMES[field].flag)
            raise UsageError(_cannot_use(field, value), (flag, f" {fault}"), "Use another value")
        if value > getattr(limits, field) and not may_raise:
            raise _too_large(field, value, f"limits.{field}", getattr(limits, field), source)
    process, procs = policy.process, given.get("procs")
    if procs is not None and process.may_spawn and process.max_live < procs:
        if not may_raise:
            raise _too_large("procs", procs, "process.max_live", process.max_live, source)
        process = replace(process, max_live=procs)
    size, fs = changes.file_bytes or 0, policy.fs
    for name in _FILE_FIELDS if size else ():
        held = getattr(fs, name) or FILE_BYTES
        if size > held and not may_raise:
            raise _too_large(_FILE_SIZE, size, f"fs.{name}", held, source)
        fs = replace(fs, **{name: size})
    return replace(policy, limits=replace(limits, **given), process=process, fs=fs)


def _too_large(field: str, value: int, path: str, held: int, source: str) -> UsageError:
    """Return the error for a limit above the limit *held* of a policy, if the caller may only lower limits."""
    allowed = f"{_value(field, held)}{' s' if field.endswith('_ms') else ''}"
    why = f"the policy {source} allows at most {allowed} ({path})"
    fix = (f"Set {path} to {value} in the policy, or use ", Flag(flag_text(field, held)))
    return UsageError(_cannot_use(field, value), why, fix).caused_by(path, value)


def _cannot_use(field: str, value: int) -> Text:
    return "cannot use ", Flag(flag_text(field, value))


def flag_reach(own: Limits | None, current: Limits, *, may_raise: bool) -> FlagReach:
    """Return how far flags can raise the limits *current*. own: the limits of the unchanged policy, or None."""
    if may_raise:
        return FlagReach({row.sets: int(row.most * (1000 if row.kind == "seconds" else 1)) for row in LIMITS})
    if own is None:
        return FlagReach()
    tops = {f"limits.{field}": getattr(own, field) for field in NAMES if getattr(own, field) > getattr(current, field)}
    return FlagReach(tops, policy_too=False)
