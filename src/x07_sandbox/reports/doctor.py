"""What `x07 doctor --json` prints, `x07.sandbox.doctor@0.1.0`."""

from __future__ import annotations

from typing import Literal

import msgspec

from x07_sandbox.backends.prerequisites import BackendState


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing looked at. good: None where it is neither good nor bad but worth knowing. fix: empty for none."""

    subject: str
    good: bool | None
    text: str
    fix: str = ""


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. good: whether nothing is bad; the exit code is 0 then, else 1."""

    schema_version: Literal["x07.sandbox.doctor@0.1.0"] = "x07.sandbox.doctor@0.1.0"
    good: bool
    findings: tuple[Finding, ...]
    backends: tuple[BackendState, ...]
