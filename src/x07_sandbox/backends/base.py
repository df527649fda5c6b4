"""The backend contract, and the handshake with an agent: it answers, then it becomes ready for a program.

Code above `backends` uses this module and the registry, and refers to no backend by name.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from x07_sandbox.channel.connection import Connection
from x07_sandbox.channel.link import Link, State
from x07_sandbox.channel.messages import PROTOCOL, Failed, Hello, Message, Seed, Seeded
from x07_sandbox.channel.streams import Event, Role
from x07_sandbox.errors import BackendError, PeerError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import Arch, host_arch
from x07_sandbox.host.processes import Identity
from x07_sandbox.host.waiting import Caller, Cancel, Deadline, input_poll, read_deadline, unix_ns
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import Features
from x07_sandbox.policy.guest import used_ram_bytes
from x07_sandbox.policy.outcomes import Evidence
from x07_sandbox.records.runs import Claim, JobRecord

if TYPE_CHECKING:
    import socket

    from x07_sandbox.backends.prerequisites import Need

# Booted, cloned from a saved machine, restored from a saved process of such a clone, taken from a pool, or cloned from
# a snapshot of a running machine.
StartMode = Literal["cold", "clone", "hot", "pool", "fork"]
# The codes of errors about modules that cannot be preloaded, or not in time.
NOT_IMPORTED: Final = "preload-failed"
SLOW_IMPORT: Final = "preload-late"
# Under emulation, measured with compilers and interpreters (docs/explanation/performance.md, "Emulation").
SLOWDOWN: Final = "10 to 30 times"
EMULATED: Final = f"CPU work in the guest typically takes {SLOWDOWN} as long as on the host"
FailureKind = Literal["ended", "late", "protocol", "failed", "cancelled"]


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend offers on this host.

    proof: the evidence. known: whether it was tried; if not, *features* are those of its weakest isolation class.
    fix: how to get hardware virtualisation, if it is missing.
    """

    features: Features
    proof: str
    known: bool = True
    warnings: tuple[str, ...] = ()
    fix: str = "Use a virtual machine on a host where KVM works"


class MachineKind(msgspec.Struct, frozen=True, kw_only=True):
    """The properties that decide from which saved VM a job can be cloned. runtime: "build" or "run"."""

    image: OpenImage | None
    ram_bytes: int
    runtime: str = "run"
    network: bool = False

    @property
    def image_digest(self) -> str:
        """The image's digest, or "" if there is no image."""
        return "" if self.image is None else self.image.manifest.digest

    @property
    def arch(self) -> Arch:
        """The architecture of the guest: the image's, or this host's if there is no image."""
        return host_arch() if self.image is None else self.image.arch

    @property
    def has_program_root(self) -> bool:
        """Whether programs see the files of an imported image, and not those of the image of the agent."""
        return self.runtime == "run" and self.image is not None and self.image.manifest.program is not None

    @property
    def key(self) -> tuple[str, int, str, bool]:
        """A value that is equal for equal kinds, also in other processes."""
        return self.image_digest, self.ram_bytes, self.runtime, self.network


class RootPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A folder of host files that the program sees. at: its path there. write: whether the program may write to it."""

    at: str
    write: bool


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a job that the command to create its container depends on. Limits are those of the command.

    files_bytes: size of all input files. out: whether the program is expected to write a file in /x07/out. places: host
    folders, outer ones first. closed: True if nothing that the program can write may be executed. alone: True if the
    input folder contains only the program and the policy.
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


# Runs x07's own programs in an instance of a kind that has answered, then renews it with the given `Cloning`. May raise
# BackendError.
WarmUp = Callable[["Instance", MachineKind, "Cloning", Cancel], None]


class Fork(NamedTuple):
    """A snapshot of a running machine to start from. folder: of its files. link: our end of the channel to a fork.

    number: of the machine in its session, which may have had others before.
    """

    folder: Path
    link: Link
    number: int = 1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The data that a backend needs to start one job. The program itself follows over the channel.

    needs: for container backends; None if they are not known yet. cold: whether to boot a VM instead of cloning one.
    meanwhile: called while the instance starts, again if another attempt follows. warm_up: see `WarmUp`; None if no
    process may be saved for this job. save_later: called if no VM or process of this kind is saved; it has one saved
    without delaying the job, and returns a remark. None: the job waits until one is saved. fork: a snapshot to start
    from, instead of anything else.
    """

    claim: Claim
    kind: MachineKind
    caller: Caller
    needs: Needs | None = None
    cold: bool = False
    meanwhile: Callable[[], object] = lambda: None
    warm_up: WarmUp | None = None
    save_later: Callable[[MachineKind], str] | None = None
    fork: Fork | None = None

    @property
    def used_ram_bytes(self) -> int:
        """The most RAM that the job can use. Without *needs*, this is all RAM of the machine."""
        ram, needs = self.kind.ram_bytes, self.needs
        if needs is None:
            return ram
        out = settings.ARTIFACT_MAX_BYTES if needs.out else 0
        changes = settings.CHANGES_MAX_BYTES if any(place.write for place in needs.places) else 0
        return used_ram_bytes(ram, needs.mem_bytes, needs.files_bytes + out + changes)


class Greeting(NamedTuple):
    """A ready agent: it has answered, clock and entropy are set, and OPEN is the next message, or RESUME to a fork.

    released_at: when the instance was released, in seconds on the monotonic clock. times_ms: milliseconds from then
    until the frames HELLO and SEEDED arrived. nonce: that of SEED.
    """

    connection: Connection
    released_at: float
    times_ms: dict[str, float]
    nonce: bytes = b""


class HandshakeFailure(msgspec.Struct, frozen=True, kw_only=True):
    """The reason why an agent did not become ready.

    kind: "ended" (the instance or its channel ended), "late", "protocol" (the agent violated the protocol), "failed"
    (the agent reported a failure) or "cancelled" (by the caller). stage: of a reported failure.
    exit_status, console_tail: set if the instance ended.
    """

    kind: FailureKind
    why: str
    stage: str = ""
    exit_status: int | None = None
    console_tail: str = ""

    @property
    def transient(self) -> bool:
        """Whether the state of the host may be the cause: it was busy, killed the instance, or had no memory for it.

        A guest that fails powers off, and its instance then ends with status 0.
        """
        return self.kind == "late" or (self.kind == "ended" and self.exit_status != 0)

    @property
    def text(self) -> str:
        """The reason, with the stage or, if the instance ended, the end of the console output."""
        said = " ".join(self.console_tail.split())[-200:] if self.kind == "ended" else ""
        return f"{self.why}; {said}" if said else f"{self.stage}: {self.why}" if self.stage else self.why


class NoAnswerError(BackendError):
    """The agent of a started instance did not answer, and the instance was stopped. times_ms: see `Greeting`."""

    def __init__(self, instance: Instance, failure: HandshakeFailure, times_ms: dict[str, float]) -> None:
        super().__init__("the guest agent did not answer", failure.text, "Run x07 doctor")
        self.instance = instance
        self.failure = failure
        self.times_ms = times_ms


class Instance(Protocol):
    """A started job. It owns its descriptors.

    net_fd: the stream of the egress relay, or None if the relay shares the channel. notes: remarks about the start, for
    the user. greeting: set by `start`.
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
        """Let the instance run. Call this after its record is written. A second call does nothing."""

    def side_fds(self) -> tuple[int, ...]:
        """Return the descriptors to read besides the channel."""

    def drain(self, fd: int) -> None:
        """Read one of the `side_fds`, within its size limit."""

    def console_tail(self) -> str:
        """Return the end of the console output, safe to print."""

    def exit_status(self) -> int | None:
        """Return how the instance's process ended (subprocess convention), or None while it runs."""

    def stop(self) -> bool:
        """Kill the instance, clean up, and return whether it is proven gone. May be called again."""


class Prunable(NamedTuple):
    """A file or folder that can be removed by calling `remove`, which may raise OSError."""

    kind: Literal["template", "leftover"]
    path: Path
    why: str
    remove: Callable[[Path], None]


class Cloning(Protocol):
    """Cloning of saved VMs. The pool uses no other part of a backend."""

    def prepare(self, kind: MachineKind, caller: Caller, warm_up: WarmUp) -> None:
        """Save a VM of this kind now, even if saving is suspended. Raises SandboxError."""

    def save(self, kind: MachineKind, caller: Caller, warm_up: WarmUp) -> str:
        """Save what a job of this kind would start from, unless that failed recently. Return why it fails, or "".

        A failure is remembered for some minutes. Raises Cancelled.
        """

    def prunable(self, images: set[str], on_wait: Callable[[], None]) -> Iterator[Prunable]:
        """Lock the saved VMs, and yield the files that can be removed if only *images* (digests) stay.

        on_wait: called before waiting for the lock. Raises SandboxError.
        """

    def saved_bytes(self) -> dict[str, int]:
        """Return the disk space that saved VMs take, by the digest of their image. Raises HostError."""

    def why_not_hot(self) -> str:
        """Return why VMs cannot be restored from saved processes here, or "". Call `Backend.probe` first."""

    def renew(self, instance: Instance, kind: MachineKind) -> None:
        """Prepare an instance for one user program after it has run x07's own programs. Raises BackendError."""

    def limit_ram(self, instance: Instance, ram_bytes: int) -> None:
        """Lower the most RAM that a VM may use, once its job is known. Raises BackendError."""

    def adopt(self, instance: Instance, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Turn a waiting VM into the job in *claim*, which uses at most *ram_bytes* of RAM. Raises SandboxError."""

    def descriptors(self, instance: Instance) -> dict[str, int]:
        """Return, by name, the descriptors with which another process can use *instance*, which still owns them."""

    def leased(self, lease: socket.socket, record: JobRecord, jail: str, fds: Mapping[str, int]) -> Instance:
        """Return an instance that uses the `descriptors` of the pool's process. Raises KeyError if one is missing.

        lease: the connection to that process (backends/lease). The caller keeps owning all descriptors.
        """


class Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known about a snapshot. name: chosen by the user, or "". sandbox: the id of the sandbox.

    folder: of that sandbox's run, whose record says whether it is paused.
    keep: "kept" by the user, "paused" (the sandbox itself goes on from it), or "open", for a checkpoint of an open
    sandbox.
    """

    id: str
    name: str
    sandbox: str
    folder: str
    created_unix_ms: int
    keep: Literal["kept", "paused", "open"] = "kept"


class Kept(NamedTuple):
    """A snapshot. folder: of its files. image: the digest of the image. bytes: its size on the disk."""

    note: Note
    folder: Path
    image: str
    bytes: int


class Capture(Protocol):
    """A running machine whose snapshot is prepared. ram_bytes: the RAM that it has written until then."""

    ram_bytes: int

    def take(self) -> None:
        """Pause the machine, save it, and let it run on. Raises BackendError; it then runs on, if it still can."""


class SnapshotFolder(Protocol):
    """A private folder for a snapshot. path: where it is now."""

    path: Path

    def keep(self, note: Note, kind: MachineKind) -> list[str]:
        """Keep the snapshot, and remove what takes too much space then. Return remarks about that. Raises SandboxError.

        It outlives the context of the folder, unless it is a checkpoint.
        """


class Snapshots(Protocol):
    """Snapshots of running machines, from which forks start (`Job.fork`)."""

    def folder(self) -> AbstractContextManager[SnapshotFolder]:
        """Make an empty folder for a snapshot, which is removed at the end of the context. Raises HostError."""

    def capture(self, instance: Instance, kind: MachineKind, folder: Path) -> AbstractContextManager[Capture]:
        """Prepare a snapshot of a running machine, in an empty private folder. Raises SandboxError."""

    def prove(self, fork: Fork, kind: MachineKind) -> None:
        """Start a machine from a snapshot, once on each host. Its programs stay held. Raises SandboxError.

        So nobody gives up a machine for a snapshot from which none starts.
        """

    def kept(self) -> list[Kept]:
        """Return the kept snapshots, oldest first. Raises HostError."""

    def drop(self, folder: Path) -> None:
        """Remove a kept snapshot. Sandboxes that have started from it go on. Raises OSError."""

    def key(self, kind: MachineKind) -> str:
        """Return a text that is equal for machines that can start from each other's snapshots. Raises HostError."""


class EngineImages(Protocol):
    """The guest images of a backend that does not use x07's store.

    image_variable: the environment variable that names the folder of the only image; "" if an engine stores images.
    """

    image_variable: str

    def find(self, ref: str | None) -> OpenImage:
        """Return the image *ref*; for None, the image that X07_VM_GUEST_IMAGE names. Raises ImageError, HostError."""


class MachineSource(Protocol):
    """A source of ready VMs: a pool in this process or in another."""

    def claim(self, backend: Backend, job: Job) -> AbstractContextManager[Instance] | None:
        """Return a VM whose agent has answered, or None. Raises BackendError, perhaps after the job was recorded."""


class Backend(Protocol):
    """One way to start a job. uses_image: False if it runs the host's own programs instead of a guest image."""

    name: str
    uses_image: bool

    @property
    def needs(self) -> Sequence[Need]:
        """The prerequisites of the backend on this machine."""

    @property
    def known_gaps(self) -> Mapping[str, str]:
        """The behaviours of the contract (conformance/behaviours) that the backend lacks, each with the reason."""

    @property
    def engine_images(self) -> EngineImages | None:
        """The backend's own images, such as those of its engine, or None if the backend uses x07's store."""

    @property
    def cloning(self) -> Cloning | None:
        """Support for cloning saved VMs, if there is any."""

    @property
    def snapshots(self) -> Snapshots | None:
        """Support for snapshots of running machines, if there is any."""

    def least_features(self) -> Features:
        """Return the features of the backend's weakest isolation class, without starting anything. Raises HostError."""

    def probe(self, image: OpenImage | None, *, boot: bool = True) -> Availability:
        """Return what the backend offers on this host. Raises HostError if the backend cannot run here.

        boot: whether a guest may be booted to find out. The result is stored, so that later calls are cheap.
        """

    def start(self, job: Job) -> AbstractContextManager[Instance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError.

        When the context ends, the job is gone and recorded as gone.
        """

    def stop(self, record: JobRecord) -> bool:
        """Stop a job from any process. Return whether it is proven and recorded as gone. Raises SandboxError."""


_CLOCK_S: Final = 0.5
_EXIT_S: Final = 5.0  # for an instance whose channel ended to end itself, so that its exit status is known


def greet(
    instance: Instance,
    *,
    cancel_fd: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    boot_s: float = settings.BOOT_S,
    link: Link | None = None,
) -> None:
    """Release the instance, wait for its agent, send clock and entropy, and set `Instance.greeting`.

    cancel_fd: the wait ends once it is readable. meanwhile: called while the instance starts. boot_s: timeout
    of a boot, in seconds. link: of a fork. Raises NoAnswerError; the caller stops the instance.
    """
    cold = instance.start_mode == "cold"  # the agent of any other start has sent HELLO already
    released_at = time.monotonic()
    deadline = Deadline.after(boot_s if cold else settings.CLONE_S)
    instance.release()
    talk = Handshake(instance, State.WAITING if cold else State.WARM, cancel_fd, link)
    ready = State.READY if link is None else State.HELD
    if not cold:
        talk.seed()
        talk.connection.flush()
    meanwhile()
    failure = talk.until(State.GREETED, deadline) if cold else None
    if failure is None:
        if cold:
            talk.seed()
            if deadline.passed():  # the agent was in time, this process was not
                deadline = Deadline.after(settings.CLONE_S)
        failure = talk.until(ready, deadline)
        while failure is None and link is not None and talk.waited_s() > _CLOCK_S and not deadline.passed():
            talk.seed()  # the clock is late by that time at most, and a fork can be told again
            failure = talk.until(ready, deadline)
    if failure is not None:
        talk.reached["end"] = time.monotonic()
    times_ms = {name: round((at - released_at) * 1000, 1) for name, at in talk.reached.items()}
    if failure is not None:
        raise NoAnswerError(instance, failure, times_ms)
    instance.greeting = Greeting(talk.connection, released_at, times_ms, talk.nonce)


@contextmanager
def claimed(instance: Instance, job: Job, end: Callable[[], object]) -> Iterator[Instance]:
    """Greet an instance that waited in a pool, and yield it. *end* is called at the end. Raises NoAnswerError."""
    try:
        greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
        yield instance
    finally:
        end()


class Handshake:
    """One handshake. reached: when HELLO and SEEDED arrived, in seconds on the monotonic clock."""

    def __init__(
        self, instance: Instance, begin: State, cancel_fd: int | None = None, link: Link | None = None
    ) -> None:
        self.connection = Connection(instance.channel_fd, Role.HOST, begin)
        self.connection.link = link or self.connection.link
        self.reached: dict[str, float] = {}
        self._instance = instance
        self._cancel_fd = cancel_fd
        self.nonce = os.urandom(16)
        self._asked_at = 0.0

    def waited_s(self) -> float:
        """Return for how long the last answer to `seed` took, in seconds."""
        return self.reached["seeded"] - self._asked_at

    def seed(self) -> None:
        """Queue clock, entropy, and a nonce that the answer must repeat."""
        self._asked_at = time.monotonic()
        self.connection.link.send(Seed(unix_ns(), os.urandom(64), self.nonce, os.urandom(16)))

    def until(
        self, wanted: State, deadline: Deadline, say: Mapping[State, Message] | None = None
    ) -> HandshakeFailure | None:
        """Exchange messages until the state *wanted*. Return None, or the failure. say: messages to send, by state."""
        link, late = self.connection.link, None
        while link.state is not wanted:
            if say and (message := say.get(link.state)):
                link.send(message)
            if not self.connection.flush():
                return self._ended("its channel ended")
            wait_s = deadline.left_s() + 0.001
            if deadline.passed():
                # Read what arrived in time first: this process may have been stopped or starved.
                wait_s = late.left_s() if late else 0.0
                late = late or read_deadline(deadline)
            ready = self._poll(wait_s)
            if late and (not ready or late.passed()):
                return self._failed("late", "it did not answer in time")
            for fd in ready:
                if failure := self._ready(fd):
                    return failure
        return None

    def _poll(self, wait_s: float) -> list[int]:
        cancel = () if self._cancel_fd is None else (self._cancel_fd,)
        poll = input_poll(self.connection.fd, self._instance.pidfd, *self._instance.side_fds(), *cancel)
        pending = self.connection.link.pending()
        poll.register(self.connection.fd, select.POLLIN | (select.POLLOUT if pending else 0))
        return [fd for fd, _ in poll.poll(wait_s * 1000)]

    def _ready(self, fd: int) -> HandshakeFailure | None:
        if fd == self._cancel_fd:
            return HandshakeFailure(kind="cancelled", why="the caller stopped it")
        if fd == self._instance.pidfd:
            return self._ended("it ended")
        if fd == self.connection.fd:
            return self._receive()
        self._instance.drain(fd)
        return None

    def _receive(self) -> HandshakeFailure | None:
        events = self.connection.read()
        if events is None:
            return self._ended("its channel ended")
        try:
            for event in events:
                if isinstance(event, Failed):
                    return HandshakeFailure(kind="failed", why=event.message, stage=event.stage)
                if not isinstance(event, Event):
                    self._take(event)
        except PeerError as exc:
            return self._failed("protocol", f"{exc.what}: {exc.why}")
        return None

    def _take(self, message: Message) -> None:
        if isinstance(message, Hello):
            if message.protocol != PROTOCOL:
                why = f"the agent uses protocol {message.protocol}, this host protocol {PROTOCOL}"
                raise PeerError("bad HELLO message", why)
            self.reached["hello"] = time.monotonic()
        elif isinstance(message, Seeded):
            if message.nonce != self.nonce:
                raise PeerError("bad SEEDED message", "its nonce is not the one that was sent")
            self.reached["seeded"] = time.monotonic()

    def _ended(self, why: str) -> HandshakeFailure:
        return self._failed("ended", why, wait_for_exit(self._instance))

    def _failed(self, kind: FailureKind, why: str, exit_status: int | None = None) -> HandshakeFailure:
        tail = self._instance.console_tail()
        return HandshakeFailure(kind=kind, why=why, exit_status=exit_status, console_tail=tail)


def wait_for_exit(instance: Instance) -> int | None:
    """Return the exit status of an instance whose channel or process just ended, or None if it takes too long."""
    limit = Deadline.after(_EXIT_S)
    poll = input_poll(instance.pidfd, *instance.side_fds())
    while instance.exit_status() is None and not limit.passed():
        for fd, _ in poll.poll(limit.left_s() * 1000):
            if fd != instance.pidfd:
                instance.drain(fd)
                if fd not in instance.side_fds():
                    poll.unregister(fd)
    return instance.exit_status()


def evidence_of(failure: HandshakeFailure, cancelled_by: int | None = None) -> Evidence:
    """Return the evidence for the job's outcome. cancelled_by: the signal that made the caller cancel the job."""
    from x07_sandbox.policy.outcomes import Evidence, Stage  # only imported after a failure

    found = Evidence(stage=Stage.BOOT, instance_status=failure.exit_status, console_tail=failure.console_tail)
    cause: dict[str, dict[str, Any]] = {
        "late": {"boot_timeout": True},
        "protocol": {"channel_error": failure.why},
        "failed": {"setup_failure": failure.text},
        "cancelled": {"cancelled_by": cancelled_by or 0},
    }
    return replace(found, **cause.get(failure.kind, {}))
