"""The document of `x07 doctor`, `x07.sandbox.doctor@0.1.0`."""

from typing import Literal

import msgspec

State = Literal["proven", "untried", "failed", "not-here"]


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one check.

    code: the kind of finding, or of the error that was found (docs/reference/codes.md).
    good: null if it is neither good nor bad. fix: empty if nothing needs to be fixed.
    """

    code: str
    subject: str
    good: bool | None
    text: str
    fix: str = ""


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prerequisite on this host.

    good: null if the prerequisite is missing but optional.
    """

    what: str
    good: bool | None
    text: str


class BackendState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One backend on this host.

    state: "proven" (it has started a VM here), "untried" (its prerequisites are met), "failed" or
    "not-here" (not for this platform).
    needs_acceptance: whether its isolation is weaker than that of a virtual machine.
    looks: its prerequisites.
    remedies: what to do; empty if the state is "proven" or "untried".
    """

    name: str
    sandbox_backend: str
    isolation: tuple[str, ...]
    needs_acceptance: bool
    state: State
    text: str
    looks: tuple[Look, ...]
    remedies: tuple[str, ...]


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 doctor --json`. good: whether no finding is bad; the exit code is then 0, else 1."""

    schema_version: Literal["x07.sandbox.doctor@0.1.0"] = "x07.sandbox.doctor@0.1.0"
    good: bool
    findings: tuple[Finding, ...]
    backends: tuple[BackendState, ...]
