"""The contract of a backend: what it can say about a host, how it starts a job, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.jobs.record import JobRecord
    from x07_sandbox.plan.features import Features


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether a backend can run here.

    proof: how that is known. warnings: what the user should know all the same. fix: what to do when it cannot.
    """

    usable: bool
    features: Features
    proof: str
    fix: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineKind:
    """A kind of machine: all jobs with the same may go on from one saved machine.

    ram_bytes: RAM of the machine: a size class. runtime: what it is made ready for, "build" or "run".
    """

    image: OpenImage
    ram_bytes: int
    runtime: str = "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a backend needs to start one job; the program itself comes later, over the channel.

    cold: boot its machine anew, also where a saved one could go on.
    """

    record: JobRecord
    kind: MachineKind
    deadline_s: int
    cold: bool = False


class Instance(Protocol):
    """A started job. All its descriptors are its own; `close` of the context that made it ends it."""

    channel_fd: int
    pidfd: int
    jail: str
    cloned: bool  # whether it goes on from a saved machine, in which the agent has spoken already
    cold_reason: str  # why not, where it was not asked to start cold

    def release(self) -> None:
        """Let the machine run: its record is written."""

    def side_fds(self) -> tuple[int, ...]:
        """Descriptors besides the channel that want to be read."""

    def drain(self, fd: int) -> None:
        """Read one of them, keeping no more than its bound."""

    def console_tail(self) -> str:
        """The last of the console, as text that is safe to show."""

    def exit_status(self) -> int | None:
        """How the machine's process ended (subprocess convention); None while it lives."""

    def stop(self) -> bool:
        """Kill it, wait, remove what it left; whether it is proven gone."""


class Backend(Protocol):
    """One way to start a job."""

    name: str

    def probe(self, image: OpenImage) -> Availability:
        """What this host offers. Cheap when it has been proven before."""

    def start(self, job: Job) -> AbstractContextManager[Instance]:
        """Start a job, blocked until `Instance.release`. Raises BackendError, HostError."""

    def distrust(self, kind: MachineKind, reason: str) -> None:
        """A clone of this kind did not answer: start them cold from now on, and say *reason*."""

    def prepare(self, kind: MachineKind) -> None:
        """Save a machine of this kind now, whatever spoke against it before. Raises SandboxError."""
