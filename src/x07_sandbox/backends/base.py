"""The backend contract. Code above `backends` uses this module and the registry, and no backend by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
FailureKind = Literal["ended", "late", "protocol", "failed", "cancelled"]


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend offers here. proof: the evidence. known: whether it was tried; else features are the weakest."""

    features: Features
    proof: str
    known: bool = True
    warnings: tuple[str, ...] = ()


class MachineKind(msgspec.Struct, frozen=True, kw_only=True):
    """The properties that decide which saved machine a job can be cloned from. runtime: "build" or "run"."""

    image: OpenImage | None
    ram_bytes: int
    runtime: str = "run"
    network: bool = False

    @property
    def image_digest(self) -> str:
        """The image's digest, or "" without an image."""
        return "" if self.image is None else self.image.manifest.digest

    @property
    def key(self) -> tuple[str, int, str, bool]:
        """The kind's identity in every process."""
        return self.image_digest, self.ram_bytes, self.runtime, self.network


class RootPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A folder in the program's view that holds host files. write: whether the program may write there."""

    at: str
    write: bool


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What a container's create call must know about the job. The limits are those of the START frame.

    files_bytes: size of all input files. out: whether a file is expected in /x07/out. places: host folders, outer ones
    first. closed: nothing that the program can write may be executed. alone: as in `Confinement`.
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
    """What a backend needs to start one job. The program itself follows over the channel.

    needs: for container backends. cold: boot, never clone. meanwhile: called once while the instance comes up.
    """

    claim: Claim
    kind: MachineKind
    caller: Caller
    needs: Needs | None = None
    cold: bool = False
    meanwhile: Callable[[], object] = lambda: None

    @property
    def used_ram_bytes(self) -> int:
        """The most RAM that the job uses: all of the machine's if its needs are unknown."""
        ram, needs = self.kind.ram_bytes, self.needs
        if needs is None:
            return ram
        out = settings.ARTIFACT_MAX_BYTES if needs.out else 0
        changes = settings.CHANGES_MAX_BYTES if any(place.write for place in needs.places) else 0
        return used_ram_bytes(ram, needs.mem_bytes, needs.files_bytes + out + changes)


class Greeting(NamedTuple):
    """A ready agent: it has answered and has clock and entropy, and START is the next frame.

    released_at: when the instance was released, on the monotonic clock. times_ms: from then to hello and seeded.
    """

    connection: Connection
    released_at: float
    times_ms: dict[str, float]


class HandshakeFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an agent did not become ready.

    kind: "ended" (the instance or its channel), "late", "protocol" (the agent violated it), "failed" (the agent
    reported a failure) or "cancelled" (by the caller). exit_status, console_tail: set if the instance ended.
    """

    kind: FailureKind
    why: str
    exit_status: int | None = None
    console_tail: str = ""


class NoAnswerError(BackendError):
    """An instance was started and stopped again because its agent did not answer. times_ms: as in `Greeting`."""

    def __init__(self, instance: Instance, failure: HandshakeFailure, times_ms: dict[str, float]) -> None:
        said = " ".join(failure.console_tail.split())[-200:] if failure.kind == "ended" else ""
        why = f"{failure.why}; {said}" if said else failure.why
        super().__init__("the machine did not answer", why, "Run x07 doctor")
        self.instance = instance
        self.failure = failure
        self.times_ms = times_ms


class Instance(Protocol):
    """A started job, which owns its descriptors.

    net_fd: the egress relay's stream, if it is separate. notes: for the user, about the start. greeting: set by
    `start`.
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
        """Let the instance run, after its record was written. A second call does nothing."""

    def side_fds(self) -> tuple[int, ...]:
        """Return the descriptors to read besides the channel."""

    def drain(self, fd: int) -> None:
        """Read one of them, within its size limit."""

    def console_tail(self) -> str:
        """Return the end of the console output, safe to print."""

    def exit_status(self) -> int | None:
        """Return how the instance's process ended (subprocess convention), None while it lives."""

    def stop(self) -> bool:
        """Kill the instance, clean up, and return whether it is proven gone. Can be called again."""


class Lease(Protocol):
    """The connection to the process that owns a leased instance. The instance ends with it."""

    def exit_status(self) -> int | None:
        """Return how the instance ended according to its owner, None while it lives."""

    def end_lease(self) -> bool:
        """Return the instance to its owner, wait, and return whether the owner proved it gone."""


class Prunable(NamedTuple):
    """A file or folder that can be removed by calling `remove`, which may raise OSError."""

    kind: Literal["template", "leftover"]
    path: Path
    why: str
    remove: Callable[[Path], None]


class Cloning(Protocol):
    """Cloning prepared machines. The pool uses nothing else of a backend."""

    def prepare(self, kind: MachineKind, caller: Caller) -> None:
        """Save a machine of this kind now, even if saving is suspended. Raises SandboxError."""

    def prunable(self, images: set[str], on_wait: Callable[[], None]) -> Iterator[Prunable]:
        """Yield, under the lock of the saved machines, what can go if only *images* (digests) stay.

        on_wait: called before waiting for the lock. Raises SandboxError.
        """

    def renew(self, instance: Instance, kind: MachineKind) -> None:
        """Have the agent prepare for another program after one of our own. Raises BackendError."""

    def adopt(self, instance: Instance, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Turn a waiting instance into the job of *claim*, run by *runner*. Raises HostError, BackendError.

        ram_bytes: the most RAM that the job uses.
        """

    def descriptors(self, instance: Instance) -> dict[str, int]:
        """Return the descriptors that another process needs to use the instance, by name; lent."""

    def leased(self, lease: Lease, record: JobRecord, jail: str, owned_fds: Mapping[str, int]) -> Instance:
        """Return the instance for such descriptors, in the process that received them. Raises KeyError."""


class EngineImages(Protocol):
    """The guest images of a container engine."""

    def find(self, ref: str | None) -> OpenImage:
        """Return the image *ref*, or for None the one in X07_VM_GUEST_IMAGE. Raises ImageError, HostError."""


class MachineSource(Protocol):
    """A source of prepared machines: a pool in this process or in another."""

    def claim(self, backend: Backend, job: Job) -> AbstractContextManager[Instance] | None:
        """Return a greeted machine for *job*, None if there is none. Raises BackendError; the job may be recorded."""


class Backend(Protocol):
    """One way to start a job. uses_image: whether it runs a guest image, else the host's own programs."""

    name: str
    uses_image: bool

    @property
    def known_gaps(self) -> Mapping[str, str]:
        """Behaviours of the contract (conformance/behaviours) that the backend lacks, by name, with the reason."""

    @property
    def engine_images(self) -> EngineImages | None:
        """The engine's image store, or None if the backend uses ours."""

    @property
    def cloning(self) -> Cloning | None:
        """Support for cloning prepared machines, if any."""

    def probe(self, image: OpenImage | None, *, boot: bool = True) -> Availability:
        """Return what this host offers; cheap once it was proven. Raises HostError if the backend cannot run here.

        boot: whether a guest may be booted to find out.
        """

    def start(self, job: Job) -> AbstractContextManager[Instance]:
        """Start a job, greeted; on exit it is gone and recorded so. Raises NoAnswerError, BackendError, HostError."""

    def list_owned(self) -> Sequence[JobRecord]:
        """Return this user's jobs on this backend that are not recorded as gone."""

    def stop(self, record: JobRecord) -> bool:
        """Stop a job from any process and return whether it is proven and recorded as gone. Raises SandboxError."""


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """An instance in an engine. id: the engine's name for it. labels: as reported by the engine."""

    id: str
    labels: Mapping[str, str]


@runtime_checkable
class HoldsInstances(Protocol):
    """A backend whose instances belong to a daemon or engine and can outlive their record."""

    def orphans(self) -> Sequence[Orphan]:
        """Return the instances with our labels, which anybody can set (see housekeeping/sweep). Raises SandboxError."""

    def remove(self, orphan: Orphan) -> bool:
        """Remove one of them and return whether it is proven gone. Raises SandboxError."""
