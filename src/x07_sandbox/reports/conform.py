"""The document of `x07 conform`, `x07.sandbox.conform@0.1.0`."""

from typing import Literal

import msgspec

from x07_sandbox.conformance.behaviours import Report


class ConformReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 conform --json`. good: whether no check failed; the exit code is then 0, else 1."""

    schema_version: Literal["x07.sandbox.conform@0.1.0"] = "x07.sandbox.conform@0.1.0"
    good: bool
    backends: tuple[Report, ...]
