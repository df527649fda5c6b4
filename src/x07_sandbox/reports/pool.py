"""The document of `x07 pool`, `x07.sandbox.pool@0.1.0`."""

from __future__ import annotations

from typing import Literal

import msgspec


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The status that the pool reports.

    size: VMs that should wait. ready, running: VMs that wait and run now. claimed: VMs used since the start.
    image: digest. idle_s: seconds without use after which it ends. unused_s: seconds since the last use.
    problem: why no VM can be started now, or null.
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
    """The document. pool: null if none is running."""

    schema_version: Literal["x07.sandbox.pool@0.1.0"] = "x07.sandbox.pool@0.1.0"
    pool: PoolStatus | None
