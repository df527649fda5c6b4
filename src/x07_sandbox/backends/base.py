"""The contract of a backend: what it can say about a host, how it starts a job, and what it gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

from x07_sandbox.host import settings
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.jobs.record import Claim, JobRecord
from x07_sandbox.plan.features import Features

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

Begun = Literal["cold", "clone", "pool"]  # how a machine came to be: booted, cloned, or taken from a pool

# What is told of an instance that was mistimed, and what to do.
MISTIMED: Final = "its kernel measured its timer wrong, as on a host with too little time for it"
MISTIMED_FIX: Final = "try again with less beside it"


def boots() -> Iterator[bool]:
    """For each cold machine that a job may have, one after the other was mistimed: whether it is the last."""
    return (number == settings.BOOTS_MAX for number in range(1, settings.BOOTS_MAX + 1))


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a backend can run here.

    proof: how that is known. warnings: what the user should know all the same. fix: what to do when it cannot.
    """

    usable: bool
    features: Features
    proof: str
    fix: str = ""
    warnings: tuple[str, ...] = ()


class MachineKind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of machine: all jobs with the same may go on from one saved machine.

    ram_bytes: RAM of the machine: a size class. runtime: what it is made ready for, "build" or "run".
    """

    image: OpenImage
    ram_bytes: int
    runtime: str = "run"

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells kinds apart, in any process."""
        return self.image.manifest.digest, self.ram_bytes, self.runtime


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend needs to start one job; the program itself comes later, over the channel.

    cold: boot its machine anew, also where a saved one could go on.
    last_try: others were mistimed (see `Instance`); this one goes on with whatever timer it has.
    """

    record: JobRecord
    kind: MachineKind
    deadline_s: int
    cold: bool = False
    last_try: bool = False


class Instance(Protocol):
    """A started job. All its descriptors are its own; `close` of the context that made it ends it."""

    channel_fd: int
    pidfd: int
    jail: str
    begun: Begun  # in all but "cold" the agent has spoken already, to whoever had the machine saved
    record: JobRecord
    cold_reason: str  # why not, where it was not asked to start cold

    def release(self) -> None:
        """Let the machine run: its record is written."""

    def side_fds(self) -> tuple[int, ...]:
        """Descriptors besides the channel that want to be read."""

    def drain(self, fd: int) -> None:
        """Read one of them, keeping no more than its bound."""

    def mistimed(self) -> bool:
        """Whether it gave up booting since its kernel had measured its timer wrong: another may do better."""

    def console_tail(self) -> str:
        """The last of the console, as text that is safe to show."""

    def exit_status(self) -> int | None:
        """How the machine's process ended (subprocess convention); None while it lives."""

    def stop(self) -> bool:
        """Kill it, wait, remove what it left; whether it is proven gone."""


class Machines(Protocol):
    """Where machines wait that were warmed beforehand."""

    def claim(self, kind: MachineKind, claim: Claim) -> AbstractContextManager[Instance] | None:
        """One of them, as the job of *claim*; None if there is none of this kind.

        Raises BackendError if it broke off: there may be a record of that job by then.
        """


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
