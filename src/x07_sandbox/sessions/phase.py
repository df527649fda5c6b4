"""One phase of a run: its description, and how it runs on an instance whose agent has answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from x07_sandbox.backends.base import Instance, Needs, RootPlace
from x07_sandbox.channel.messages import Close, Exec, InputFile, Open
from x07_sandbox.policy.denials import GuestMount
from x07_sandbox.sessions.transfers import CommandStreams, InFile, Receivers

if TYPE_CHECKING:
    from x07_sandbox.host.cancel import Cancel
    from x07_sandbox.sessions.execution import Facts

CWD = "/opt/x07"


class PhaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one phase: a session with one command. The caller owns the descriptors.

    filters: names of the image's seccomp filters for the command.
    limits_shown: the limits that messages show.
    places: the guest folders with host files, for the backend.
    areas: the mounted host folders, for the advice in denials.
    """

    name: Literal["build", "run"]
    opening: Open
    order: Exec
    closing: Close
    files: tuple[InFile, ...]
    receivers: Receivers
    wall_ms: int
    ram_bytes: int
    filters: tuple[str, ...]
    places: tuple[RootPlace, ...] = ()
    areas: tuple[GuestMount, ...] = ()
    limits_shown: Any = None


def input_files(files: Sequence[InFile]) -> list[InputFile]:
    """Return the descriptions of *files* for the guest."""
    return [InputFile(file.path, file.mode, file.kind, file.size) for file in files]


def needs_of(spec: PhaseSpec) -> Needs:
    """Return the facts about a phase that a backend may need before it starts an instance."""
    opening, limits = spec.opening, spec.order.limits
    confine = opening.confine
    return Needs(
        mem_bytes=limits.mem_bytes,
        tmp_bytes=opening.tmp_bytes,
        tasks=limits.tasks,
        fds=limits.fds,
        files_bytes=sum(file.size for file in spec.files),
        out=opening.out_writable,
        places=spec.places,
        closed=not confine.execute or confine.programs is not None,
        alone=confine.alone,
    )


def preload_phase() -> None:
    """Import the module that runs a phase. Called while the instance boots, to save time."""
    import x07_sandbox.sessions.session  # noqa: F401


def run_phase(
    spec: PhaseSpec,
    instance: Instance,
    streams: CommandStreams,
    cancel: Cancel,
    gate_fd: int | None = None,
    relay_fd: int | None = None,
) -> Facts:
    """Run a phase on an instance until the phase ends. gate_fd, relay_fd: see `Session`."""
    from x07_sandbox.sessions.session import Session

    session = Session(instance, cancel, gate_fd, relay_fd)
    session.open(spec.opening, spec.files)
    execution = session.execute(spec.order, streams, spec.wall_ms)
    session.close_after(execution, spec.closing, spec.receivers)
    return session.run(execution)
