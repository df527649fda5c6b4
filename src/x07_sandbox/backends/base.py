"""The contract of a backend: what it can do on this host, how it starts a job, and what it gives back.

Everything above `backends` knows this module and the registry, and no backend by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings
from x07_sandbox.host.cancel import Caller
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.jobs.record import Claim, JobRecord
from x07_sandbox.plan.features import Features
from x07_sandbox.plan.sizes import used_ram_bytes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from x07_sandbox.channel.connection import Connection
    from x07_sandbox.host.processes import Identity

StartMode = Literal["cold", "clone", "pool"]  # booted, cloned from a saved machine, or taken from a pool


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend offers here. proof: how that is known. known: else the features are the weakest possible ones."""

    features: Features
    proof: str
    known: bool = True
    warnings: tuple[str, ...] = ()


class MachineKind(msgspec.Struct, frozen=True, kw_only=True):
    """All jobs of one kind may be clones of one saved machine. ram_bytes: plan/sizes. runtime: "build" or "run".

    network: whether the program may have connections.
    """

    image: OpenImage | None
    ram_bytes: int
    runtime: str = "run"
    network: bool = False

    @property
    def image_digest(self) -> str:
        """The image's digest; empty where there is none."""
        return "" if self.image is None else self.image.manifest.digest

    @property
    def key(self) -> tuple[str, int, str, bool]:
        """Identifies the kind in any process."""
        return self.image_digest, self.ram_bytes, self.runtime, self.network


class RootPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A folder in the program's view that holds files of the host's. write: whether the program may write there."""

    at: str
    write: bool


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What of a job has to be known where its surroundings are made beforehand, as an engine makes a container's.

    files_bytes: of all files that come in. out: whether a file is to come back from /x07/out. places: of the host's
    folders, outer ones first. closed: nothing that the program could have written may be executed; alone: as in
    `Confinement`. The limits are those of START.
    """

    mem_bytes: int
    tmp_bytes: int
    tasks: int
    fds: int
    files_bytes: int
    out: bool = False
    places: tuple[RootPlace, ...] = ()
    closed: bool = False
    alone: bool = True


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend needs to start one job; the program itself comes later, over the channel.

    needs: None for a backend that does not ask. cold: boot, even where a clone could be made. meanwhile: called once
    while the instance comes up.
    """

    claim: Claim
    kind: MachineKind
    caller: Caller
    needs: Needs | None = None
    cold: bool = False
    meanwhile: Callable[[], object] = lambda: None

    @property
    def used_ram_bytes(self) -> int:
        """The most of the machine's RAM that the job uses: all of it where its needs are not known."""
        ram, needs = self.kind.ram_bytes, self.needs
        if needs is None:
            return ram
        out = settings.ARTIFACT_MAX_BYTES if needs.out else 0
        changes = settings.CHANGES_MAX_BYTES if any(place.write for place in needs.places) else 0
        return used_ram_bytes(ram, needs.mem_bytes, needs.files_bytes + out + changes)


class Greeting(NamedTuple):
    """An agent that has answered and has clock and entropy: the next frame to send is START.

    released_at: when the instance was let go, on the monotonic clock. times_ms: from then to hello and seeded.
    """

    connection: Connection
    released_at: float
    times_ms: dict[str, float]


class HandshakeFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an agent did not get to where it was expected.

    kind: "ended" (the instance, or its channel), "late", "protocol" (the agent broke it), "failed" (the agent said so),
    "cancelled" (the caller asked for the end). exit_status, console_tail: of the instance, where it had ended.
    """

    kind: Literal["ended", "late", "protocol", "failed", "cancelled"]
    why: str
    exit_status: int | None = None
    console_tail: str = ""


class NoAnswerError(BackendError):
    """An instance was started, and its agent never answered; it has been stopped. times_ms: as of a greeting."""

    def __init__(self, instance: Instance, failure: HandshakeFailure, times_ms: dict[str, float]) -> None:
        said = " ".join(failure.console_tail.split())[-200:] if failure.kind == "ended" else ""
        why = f"{failure.why}; {said}" if said else failure.why
        super().__init__("the machine did not answer", why, "Run x07 doctor")
        self.instance = instance
        self.failure = failure
        self.times_ms = times_ms


class Instance(Protocol):
    """A started job, from its greeting to the proof that it is gone. It owns its descriptors.

    net_fd: the egress relay's stream, where the backend has one of its own. notes: what the user should know of how it
    was started. greeting: set by `start`, before anybody else sees the instance.
    """

    channel_fd: int
    net_fd: int | None
    pidfd: int
    jail: str
    start_mode: StartMode
    record: JobRecord
    notes: tuple[str, ...]
    greeting: Greeting

    def release(self) -> None:
        """Let it run: its record is written. A second call does nothing."""

    def side_fds(self) -> tuple[int, ...]:
        """Descriptors besides the channel that want to be read."""

    def drain(self, fd: int) -> None:
        """Read one of them, keeping no more than its bound."""

    def console_tail(self) -> str:
        """The last of the console, as text that is safe to show."""

    def exit_status(self) -> int | None:
        """How the instance's process ended (subprocess convention); None while it lives."""

    def stop(self) -> bool:
        """Kill it, wait, remove what it left; whether it is proven gone. Safe to call again."""


class Lease(Protocol):
    """The tie to the process that keeps a leased instance: when it ends, for any reason, so does the instance."""

    def exit_status(self) -> int | None:
        """How the instance ended, by that process's word; None while it lives."""

    def end_lease(self) -> bool:
        """Say that the instance is not needed any more, and wait; whether that process proved it gone."""


class Pruner(Protocol):
    """Removes what may go, or only counts it, and keeps account (housekeeping/pruner)."""

    progress: Callable[[str], None]

    def remove(self, kind: Literal["template", "leftover"], path: Path, why: str, how: Callable[[Path], None]) -> None:
        """Remove *path* as *how* does; what cannot be removed is reported and stays."""

    def remove_own(
        self, kind: Literal["template", "leftover"], path: Path, why: str, how: Callable[[Path], None]
    ) -> None:
        """As `remove`, for a folder; one that is not ours is kept."""


class Cloning(Protocol):
    """What a backend offers that can clone prepared machines. The pool uses nothing else."""

    def prepare(self, kind: MachineKind, caller: Caller) -> None:
        """Save a machine of this kind now, whatever prevented it before. Raises SandboxError."""

    def prune(self, pruner: Pruner, images: set[str]) -> None:
        """Remove saved machines of images that are gone, and the oldest above the size limit. Raises SandboxError.

        images: digests of those that stay.
        """

    def renew(self, instance: Instance, kind: MachineKind) -> None:
        """After a program of our own: have the agent make a fresh place for the next one. Raises BackendError."""

    def adopt(self, instance: Instance, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Make a waiting instance the job of *claim*, carried out by *runner*. Raises HostError, BackendError.

        ram_bytes: the most of the machine's RAM that the job uses.
        """

    def descriptors(self, instance: Instance) -> dict[str, int]:
        """What another process needs to use the instance, by name; lent."""

    def leased(self, lease: Lease, record: JobRecord, jail: str, owned_fds: Mapping[str, int]) -> Instance:
        """The instance that such descriptors belong to, in the process that got them. Raises KeyError."""


class EngineImages(Protocol):
    """Guest images that a container engine keeps."""

    def find(self, ref: str | None) -> OpenImage:
        """The image of that name; None: the one that X07_VM_GUEST_IMAGE names. Raises ImageError, HostError."""


class MachineSource(Protocol):
    """Where prepared machines wait."""

    def claim(self, backend: Backend, job: Job) -> AbstractContextManager[Instance] | None:
        """One of them, greeted, for *job*; None if there is none of its kind.

        Raises BackendError (NoAnswerError among them): there may be a record of that job by then.
        """


class Backend(Protocol):
    """One way to start a job.

    uses_image: whether it runs a guest image; else the programs are the host's own.
    """

    name: str
    uses_image: bool

    @property
    def known_gaps(self) -> Mapping[str, str]:
        """Behaviours of the contract (conformance/behaviours) that it does not have, by name, each with a reason."""

    @property
    def engine_images(self) -> EngineImages | None:
        """Its images, where an engine keeps them; None where they are our store's."""

    @property
    def cloning(self) -> Cloning | None:
        """What it offers where it can clone prepared machines."""

    def probe(self, image: OpenImage | None, *, boot: bool = True) -> Availability:
        """What this host offers; cheap when it has been proven before. Raises HostError where it cannot run at all.

        boot: whether a guest may be booted to find out.
        """

    def start(self, job: Job) -> AbstractContextManager[Instance]:
        """Start a job, greeted; retrying is the backend's own business. On the way out it is gone, and recorded so.

        Raises NoAnswerError, BackendError, HostError.
        """

    def list_owned(self) -> Sequence[JobRecord]:
        """Jobs of this user that this backend started and that are not recorded as gone."""

    def stop(self, record: JobRecord) -> bool:
        """Stop a job by its record, from any process; whether it is proven gone, and recorded so.

        Safe to call again. Raises SandboxError.
        """


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that an engine holds. id: the engine's name of it. labels: as the engine tells them."""

    id: str
    labels: Mapping[str, str]


@runtime_checkable
class HoldsInstances(Protocol):
    """What a backend offers whose instances are held by a daemon or engine, and may outlive their record."""

    def orphans(self) -> Sequence[Orphan]:
        """Every instance of the engine that carries a label of ours, at most some thousands. Raises SandboxError.

        What the engine says is checked by the caller (housekeeping/orphans): an instance may be anybody's.
        """

    def remove(self, orphan: Orphan) -> bool:
        """End and remove one of them; whether it is proven gone. Raises SandboxError."""
