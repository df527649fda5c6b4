"""What `x07 pool status --json` prints, `x07.sandbox.pool@0.1.0`."""

from __future__ import annotations

from typing import Literal

import msgspec


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the pool's process says of itself.

    size: machines that are to wait. ready, running: how many wait and run now. claimed: how many were ever taken.
    image: digest. idle_s: seconds without use after which it ends. unused_s: seconds since the last use.
    problem: why no machine can be made now, or null.
    """

    pid: int
    size: int
    ready: int
    running: int
    claimed: int
    image: str
    idle_s: float
    unused_s: float
    problem: str | None


class PoolReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. pool: null where none runs."""

    schema_version: Literal["x07.sandbox.pool@0.1.0"] = "x07.sandbox.pool@0.1.0"
    pool: PoolStatus | None
