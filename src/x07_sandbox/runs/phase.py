"""One phase of a run: everything known beforehand, and carrying it out on an instance that has answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from x07_sandbox.backends.base import Needs, RootPlace
from x07_sandbox.host.cancel import Cancel
from x07_sandbox.plan.confinement import UNCONFINED, Confinement
from x07_sandbox.plan.denials import Area
from x07_sandbox.runs.streams import InFile, OutFile, Sink

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Instance
    from x07_sandbox.runs.execute import PhaseFacts

CWD = "/opt/x07"


class PhaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One phase. Descriptors are lent.

    limits, mounts: as START carries them (plan/sizes). limits_shown: those of the policy, for reasons.
    network: what the guest's relay is told, as START carries it (network/guest_view); None without connections.
    places: of these mounts, as a backend may need them beforehand.
    areas: of the host, for reports of refusals. changes: takes changes to the trees (files/incoming.Incoming), or None.
    left: what is wanted of the files in the program's private folders, as START carries it; None where they are not
    looked at. left_files: takes them (runs/private_files.LeftFiles), or None.
    """

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
    places: tuple[RootPlace, ...] = ()
    areas: tuple[Area, ...] = ()
    changes: Any = None
    left: dict[str, int] | None = None
    left_files: Any = None
    output: OutFile | None = None
    limits_shown: Any = None
    network: dict[str, Any] | None = None


def needs_of(spec: PhaseSpec) -> Needs:
    """What a backend may have to know of it beforehand."""
    limits, confine = spec.limits, spec.confine
    return Needs(
        mem_bytes=limits["mem_bytes"],
        tmp_bytes=limits["tmp_bytes"],
        tasks=limits["tasks"],
        fds=limits["fds"],
        files_bytes=sum(file.size for file in spec.files),
        out=spec.output is not None or spec.left_files is not None,
        places=spec.places,
        closed=not confine.execute or confine.programs is not None,
        alone=confine.alone,
    )


class PhaseStreams(msgspec.Struct, frozen=True, kw_only=True):
    """What a phase is connected to; all lent.

    stdin_fd: the program's input. on_started: called when it runs. gate_fd: readable when the egress gate has ended.
    """

    stdin_fd: int | None
    stdout: Sink
    stderr: Sink
    cancel: Cancel
    on_started: Callable[[], object] = lambda: None
    gate_fd: int | None = None


def preload_phase() -> None:
    """Import what carries a phase out: while the instance comes up there is nothing else to do."""
    import x07_sandbox.runs.execute  # noqa: F401


def run_phase(spec: PhaseSpec, instance: Instance, streams: PhaseStreams) -> PhaseFacts:
    """Have the instance carry out a phase, whatever becomes of it."""
    from x07_sandbox.runs.execute import Phase

    return Phase(spec, instance, streams).run()
