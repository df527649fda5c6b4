"""The document of `x07 conform`, `x07.sandbox.conform@0.1.0`."""

from __future__ import annotations

from typing import Literal

import msgspec

from x07_sandbox.conformance.run import Report


class ConformReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document. good: whether no check failed. The exit code is 0 if it is true, else 1."""

    schema_version: Literal["x07.sandbox.conform@0.1.0"] = "x07.sandbox.conform@0.1.0"
    good: bool
    backends: tuple[Report, ...]
