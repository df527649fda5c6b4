"""X07's wrapped report, `x07.run.report@0.3.0`: a runner's report with the resolved target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from x07_sandbox.host.paths import is_folder
from x07_sandbox.x07.runner_report import CompileRunReport, RunOsReport, World

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.runs.program import Program

SCHEMA: Final = "x07.run.report@0.3.0"


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was run. resolved_module_roots: empty for our toolchains."""

    kind: Literal["project", "program", "artifact"]
    path: str
    project_root: str | None
    lockfile: str | None
    resolved_module_roots: list[str]


class WrappedReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The wrapped report. report: the runner's, unchanged."""

    schema_version: Literal["x07.run.report@0.3.0"] = SCHEMA
    runner: Literal["os", "host"]
    world: World
    target: Target
    repair: dict[str, Any] | UnsetType = UNSET
    report: dict[str, Any]


def wrap(report: CompileRunReport | RunOsReport, target: Target) -> WrappedReport:
    """Return the runner's report in its envelope."""
    return WrappedReport(runner="os", world=report.world, target=target, report=msgspec.to_builtins(report))


def target_of(program: Program, path: Path | None, report: CompileRunReport | RunOsReport) -> Target:
    """Return what was run. path: of the program; None for a source without a file, which is named `-`."""
    root = None if path is None or not program.project else path if is_folder(path) else path.parent
    return Target(
        kind="artifact" if isinstance(report, RunOsReport) else "project" if program.project else "program",
        path="-" if path is None else str(path),
        project_root=None if root is None else str(root),
        lockfile=None if root is None or program.lockfile is None else str(root / program.lockfile),
        resolved_module_roots=[],
    )
