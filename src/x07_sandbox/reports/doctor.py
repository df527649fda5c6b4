"""The document of `x07 doctor`, `x07.sandbox.doctor@0.1.0`."""

from __future__ import annotations

from typing import Literal

import msgspec

from x07_sandbox.backends.prerequisites import BackendState


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one check. good: null if it is neither good nor bad. fix: empty if nothing needs to be fixed."""

    subject: str
    good: bool | None
    text: str
    fix: str = ""


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 doctor --json`. good: whether no finding is bad; the exit code is then 0, else 1."""

    schema_version: Literal["x07.sandbox.doctor@0.1.0"] = "x07.sandbox.doctor@0.1.0"
    good: bool
    findings: tuple[Finding, ...]
    backends: tuple[BackendState, ...]
