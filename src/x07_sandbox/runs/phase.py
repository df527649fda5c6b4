"""One phase of a run, all of it known beforehand, and its being carried out by a machine that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from x07_sandbox.plan.confinement import UNCONFINED, Confinement
from x07_sandbox.plan.denials import Area
from x07_sandbox.runs.streams import InFile, OutFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.backends.base import Instance
    from x07_sandbox.runs.execute import PhaseFacts
    from x07_sandbox.runs.streams import Cancel, Sink

CWD = "/opt/x07"


class PhaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One phase, all of it known beforehand. limits_shown: those of the policy, for reasons."""

    name: Literal["build", "run"]
    argv: list[str]
    files: tuple[InFile, ...]
    limits: dict[str, int]
    confine: Confinement = UNCONFINED
    wall_ms: int
    env: dict[str, str]
    ram_bytes: int
    cwd: str = CWD
    mounts: tuple[dict[str, Any], ...] = ()
    areas: tuple[Area, ...] = ()  # of the host, for what is said of refusals
    changes: Any = None  # files/incoming.Incoming, whose module is loaded only where files may change
    output: OutFile | None = None
    limits_shown: Any = None


def carry_out(
    spec: PhaseSpec,
    instance: Instance,
    *,
    stdin_fd: int | None,
    sinks: tuple[Sink, Sink],
    cancel: Cancel,
    on_started: Callable[[], None] = lambda: None,
) -> PhaseFacts:
    """Have the machine carry out a phase, whatever becomes of it. stdin_fd: the program's input, lent, or None."""
    instance.release()
    # Not before: while the machine comes up there is nothing else to do.
    from x07_sandbox.runs.execute import Phase, PhaseRequest

    stdout, stderr = sinks
    request = PhaseRequest(
        job_id=instance.record.job_id,
        phase=spec.name,
        argv=spec.argv,
        env=spec.env,
        cwd=spec.cwd,
        files=spec.files,
        mounts=list(spec.mounts),
        changes=spec.changes,
        limits=spec.limits,
        confine=spec.confine.for_guest(),
        wall_ms=spec.wall_ms,
        stdin_fd=stdin_fd,
        stdout=stdout,
        stderr=stderr,
        output=spec.output,
        cancel=cancel,
        on_started=on_started,
    )
    return Phase(request, instance).run()
