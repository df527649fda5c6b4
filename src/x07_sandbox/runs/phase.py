"""One phase of a run: its description, and how it runs on an instance whose agent has answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from x07_sandbox.backends.base import Needs, RootPlace
from x07_sandbox.host.cancel import Cancel
from x07_sandbox.plan.confinement import UNCONFINED, Confinement
from x07_sandbox.plan.denials import GuestMount
from x07_sandbox.runs.streams import InFile, OutFile, Sink

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Instance
    from x07_sandbox.runs.execute import PhaseFacts

CWD = "/opt/x07"


class PhaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one phase. The caller owns the descriptors.

    limits, mounts, left, network: fields of the START frame.
    limits_shown: the limits that messages show.
    places: the guest folders with host files, for the backend.
    areas: the mounted host folders, for the advice in denials.
    changes: a files/incoming.Incoming that takes changes to the trees; None to ignore changes.
    left_files: a runs/private_files.LeftFiles that takes files of the private folders; None to ignore these files.
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
    areas: tuple[GuestMount, ...] = ()
    changes: Any = None
    room: dict[str, int] | None = None
    left: dict[str, int] | None = None
    left_files: Any = None
    output: OutFile | None = None
    limits_shown: Any = None
    network: dict[str, Any] | None = None


def needs_of(spec: PhaseSpec) -> Needs:
    """Return the facts about a phase that a backend may need before it starts an instance."""
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
    """The streams of a phase, which the caller owns. gate_fd: becomes readable when the egress gate has ended."""

    stdin_fd: int | None
    stdout: Sink
    stderr: Sink
    cancel: Cancel
    on_started: Callable[[], object] = lambda: None
    gate_fd: int | None = None


def preload_phase() -> None:
    """Import the module that runs a phase. Called while the instance boots, to save time."""
    import x07_sandbox.runs.execute  # noqa: F401


def run_phase(spec: PhaseSpec, instance: Instance, streams: PhaseStreams) -> PhaseFacts:
    """Run a phase on an instance until the phase ends."""
    from x07_sandbox.runs.execute import Phase

    return Phase(spec, instance, streams).run()
