"""The messages between host and guest agent as typed values, and their encoding.

Most messages that a fresh clone of a saved VM handles are packed, since code that a clone runs for the first time is
slow. The others are JSON arrays with the fields in order. The guest is hostile, so all fields of its messages are
bounded. The guest trusts the host. In each message but EXEC, *id* is the id of a command.
"""

from __future__ import annotations

import json
import operator
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from x07_sandbox.channel.streams import Message as Bounds
from x07_sandbox.channel.streams import Role
from x07_sandbox.errors import ChannelUsageError, PeerError

PROTOCOL: Final = 5
COUNT_MAX: Final = 2**63 - 1
ID_MAX: Final = 2**32 - 1  # of commands
TEXT_MAX: Final = 2000  # characters of a text from the guest
DENIED_MAX: Final = 64  # DENIED messages for one command
CWD: Final = "/opt/x07"  # where a program starts, and its home
IN: Final = "/x07/in"
OUT: Final = "/x07/out"
PROJECT_FOLDER: Final = f"{IN}/project"
FILES: Final = "files"  # the service of the file server (channel/files)
CONNECT: Final = "connect"  # the service that connects to a port of the guest
# Of every program, and of the interpreter that waits to become one. PYTHONUNBUFFERED: a timeout would lose buffered
# output. PYTHONDONTWRITEBYTECODE: the folders of programs are read-only.
ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": CWD,
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_JSON_MAX: Final = 32 * 1024  # a text of TEXT_MAX characters fits, each as two JSON escapes
_LARGE_JSON_MAX: Final = 16 * 1024 * 1024  # arguments and environment, which JSON escapes may make six times larger


class Hello(NamedTuple):
    """The agent is up. protocol: `PROTOCOL` of its code."""

    protocol: int


class CommandLimits(NamedTuple):
    """The limits of one command.

    mem_bytes: memory. tasks: processes and threads. cpu_ms: CPU time. fds: open files of a process.
    core_bytes: size of a core file, or -1 for no limit.
    """

    mem_bytes: int
    tasks: int
    cpu_ms: int
    fds: int
    core_bytes: int


class Warm(NamedTuple):
    """Prepare everything that does not depend on the job, then answer WARMED.

    The host then saves the VM, or keeps it waiting for a job.

    preload: modules that a waiting Python interpreter imports; None if the waiting process is no interpreter.
    limits, tmp_bytes, hostname, out_writable: the values that OPEN and EXEC will probably have. network: whether OPEN
    will configure a relay. commands: programs of the image to run once, so that the kernel has read them.
    """

    preload: list[str] | None
    limits: CommandLimits
    tmp_bytes: int
    hostname: str
    out_writable: bool
    network: bool
    commands: list[list[str]]


class Warmed(NamedTuple):
    """Everything is prepared."""


class Seed(NamedTuple):
    """Clock, entropy and names for a resumed VM. While its programs are held, it is a copy of the VM that was held.

    unix_ns: the time in nanoseconds since 1970. entropy: 64 bytes for the kernel's entropy pool. nonce: 16 bytes, which
    the answer repeats. machine_id: 16 bytes, written to /etc/machine-id in hexadecimal.
    """

    unix_ns: int
    entropy: bytes
    nonce: bytes
    machine_id: bytes


class Hold(NamedTuple):
    """Stop all programs, and answer HELD after everything that is queued, so that the VM can be saved.

    The host sends nothing more before RESUME, or SEED in a copy of the VM. number: from 1, one more each time.
    """

    number: int


class Held(NamedTuple):
    """The guest sends nothing more before RESUME. number: that of HOLD. stopped: whether all programs have stopped."""

    number: int
    stopped: bool


class Resume(NamedTuple):
    """Let the programs go on after HOLD."""


class Seeded(NamedTuple):
    """Clock and entropy are set. nonce: that of SEED."""

    nonce: bytes


class InputFile(NamedTuple):
    """A file that the host sends on a stream whose subject is the file's number.

    path: where the agent puts it. mode: its permission bits. kind: "file" or "tree" (channel/trees). size: the number
    of bytes on the stream.
    """

    path: str
    mode: int
    kind: str
    size: int


class Mount(NamedTuple):
    """A folder that programs see.

    tree: the number of an input file, which is a tree; None for the private working folder. sub: the part of the tree
    to mount; "" for all of it. at: the path for programs. write: whether it is writable. changes: whether its changes
    are sent at the end.
    """

    tree: int | None
    sub: str
    at: str
    write: bool
    changes: bool


class Confine(NamedTuple):
    """What programs may do.

    threads, spawn, execute: whether they may start threads, start processes, and execute other programs.
    programs: paths that may be executed; None if the policy has no list. prefixes: prefixes of further paths that may
    be executed. alone: whether the inputs contain nothing else that can be executed.
    """

    threads: bool
    spawn: bool
    execute: bool
    programs: list[str] | None
    prefixes: list[str]
    alone: bool


FREE: Final = Confine(threads=True, spawn=True, execute=True, programs=None, prefixes=[], alone=False)


class Network(NamedTuple):
    """Configuration of the relay.

    names: the address that stands for each name. wildcards: each suffix, and the first of 256 addresses for names below
    it. tcp, udp: the allowed targets as [first address, last address, ports].
    """

    names: dict[str, str]
    wildcards: list[list[str]]
    tcp: list[list[Any]]
    udp: list[list[Any]]


class Room(NamedTuple):
    """The room for contents of changed files. file_bytes: of one file. total_bytes: of all of them."""

    file_bytes: int
    total_bytes: int


class Open(NamedTuple):
    """Open the session, with everything that its commands share.

    hostname: as programs see it. mem_bytes, tasks: of all commands together. tmp_bytes: the size of /tmp and of
    /dev/shm. files: those that the host sends, file N on a stream INPUT with the subject N. mounts: the folders that
    programs see. confine: what programs may do. network: None if there is no relay. out_writable: whether programs may
    write to /x07/out. room: for changes. root: whether programs are root in a user namespace of their own, over a
    writable layer of the system.
    """

    hostname: str
    mem_bytes: int
    tasks: int
    tmp_bytes: int
    files: list[InputFile]
    mounts: list[Mount]
    confine: Confine
    network: Network | None
    out_writable: bool
    room: Room
    root: bool = False


class Terminal(NamedTuple):
    """The size of a terminal. rows, columns: in characters."""

    rows: int
    columns: int


class Exec(NamedTuple):
    """Start a command once all files of OPEN have arrived. id: from 1, each higher than the one before.

    argv: the program and its arguments. env: the complete environment. cwd: the working directory. limits: of this
    command. service: "" for a program; else the service of the agent to run like a command, on the same streams:
    FILES, or CONNECT, which connects its streams to the port argv[0] of this sandbox.
    merge: whether standard error goes to standard output. terminal: if not None, the command gets a terminal, whose
    output is standard output. detached: whether it has no input.
    """

    id: int
    argv: list[str]
    env: dict[str, str]
    cwd: str
    limits: CommandLimits
    service: str = ""
    merge: bool = False
    terminal: Terminal | None = None
    detached: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether this is a program with three pipes, so that the process that was started in advance can run it."""
        return not (self.service or self.merge or self.terminal or self.detached)


class Started(NamedTuple):
    """The command was executed. Its time counts from this message."""

    id: int


class Stop(NamedTuple):
    """Send a signal to a command. signal: its number. SIGKILL goes to all processes of the command.

    Before the start of the command, any signal makes it fail.
    """

    id: int
    signal: int


class Resize(NamedTuple):
    """Change the size of a command's terminal. rows, columns: in characters."""

    id: int
    rows: int
    columns: int


class Changes(NamedTuple):
    """Send the changes so far on a stream of kind CHANGES."""


class Denied(NamedTuple):
    """A system call that was denied to a command. by: "kernel", "seccomp" or "network".

    call: its name. errno: the error that it returned. write: whether it would have changed something. times: how many
    times it was denied. path: the path in the call, with a final slash for a new entry in that folder; empty if there
    is none. If the call raises a limit: `core`, `cpu` or `nofile`. By "network" in a session without connections:
    ADDRESS:PORT of a `connect`, or the name in a `lookup`, which is no system call.
    """

    id: int
    by: str
    call: str
    errno: int
    path: str
    write: bool
    times: int


class Exited(NamedTuple):
    """A command and its output have ended. Counters are of the command's control group; 0 where there is none.

    Where commands share a group, a counter includes what other commands did at the same time, and peaks are of all.
    wait_status: as of waitpid(2). cpu_us: CPU time. memory_peak_bytes, tasks_peak: peaks of memory, and of processes
    and threads. oom_kills: processes that the kernel killed for lack of memory. tasks_refused: processes and threads
    that were refused. cpu_exceeded: whether the agent killed it for its CPU time. stopped: whether a signal had stopped
    it when STOP came. disk_full, memory_full: whether the scratch disk, or one of /tmp and /dev/shm, is full.
    denials_lost: how many denials, or records of denials, were not reported. wall_us: the time since the agent let it
    start, by the guest's clock.
    """

    id: int
    wait_status: int
    cpu_us: int
    memory_peak_bytes: int
    oom_kills: int
    tasks_peak: int
    tasks_refused: int
    cpu_exceeded: bool
    stopped: bool
    disk_full: bool
    memory_full: bool
    denials_lost: int
    wall_us: int


class Output(NamedTuple):
    """What to send of /x07/out.

    path: the file, or the folder. max_bytes: the largest size that is sent. is_tree: whether it is a folder, which is
    sent as a tree without times.
    """

    path: str
    max_bytes: int
    is_tree: bool = False


class Left(NamedTuple):
    """What to send from the private folders. files, bytes: at most as many.

    If *files* is 0, the files of the working folder are only counted.
    """

    files: int
    bytes: int


class Close(NamedTuple):
    """End all other commands once the command *after* has ended. Send what is asked for, then answer CLOSED.

    after: 0, or the id of a command that has ended, to end all commands now. output: None for no output. left: None to
    send no files of the private folders. Changes are sent for the mounts that OPEN marks.
    """

    after: int
    output: Output | None
    left: Left | None


class Closed(NamedTuple):
    """Everything has been sent.

    output_bytes: size of the output file; None if it was not sent. output_problem: why it was not sent.
    left_files, left_bytes: number and size of the files left in the private folders.
    """

    output_bytes: int | None
    output_problem: str | None
    left_files: int
    left_bytes: int


class Failed(NamedTuple):
    """The command *id* could not be started, or (id 0) the session failed.

    stage: what the agent was doing. errno: 0 if there is none. message: the error in words.
    """

    id: int
    stage: str
    errno: int
    message: str


Message = (
    Hello
    | Warm
    | Warmed
    | Seed
    | Seeded
    | Open
    | Exec
    | Started
    | Stop
    | Resize
    | Changes
    | Hold
    | Held
    | Resume
    | Denied
    | Exited
    | Close
    | Closed
    | Failed
)


class Shape(NamedTuple):
    """The bounds of a field: numbers lo to hi, or texts or lists with lo to hi characters or items."""

    type: type
    hi: int = COUNT_MAX
    lo: int = 0
    optional: bool = False

    def problem(self, value: Any) -> str:  # noqa: ANN401 - it is checked
        """Return what is wrong with a value, or ""."""
        found = type(value)
        if found is not self.type:  # bool is a subclass of int
            return "has the wrong type"
        size = len(value) if self.type in {str, list} else value
        return "" if self.lo <= size <= self.hi else "is out of range"


class Form(NamedTuple):
    """The form of a message: its number, its sender, and how it is encoded.

    layout: the layout of a packed message; None for JSON. shapes: the bounds of the fields of a JSON message from the
    guest.
    """

    number: int
    sender: Role
    layout: struct.Struct | None = None
    shapes: tuple[Shape, ...] = ()
    most: int = _JSON_MAX
    build: Callable[[list[Any]], Message] | None = None


def _open(values: list[Any]) -> Open:
    hostname, mem_bytes, tasks, tmp_bytes, files, mounts, confine, network, out_writable, room, root = values
    return Open(
        hostname,
        mem_bytes,
        tasks,
        tmp_bytes,
        [InputFile(*file) for file in files],
        [Mount(*mount) for mount in mounts],
        Confine(*confine),
        network and Network(*network),
        out_writable,
        Room(*room),
        root,
    )


def _exec(values: list[Any]) -> Exec:
    number, argv, env, cwd, limits, service, merge, terminal, detached = values
    return Exec(
        operator.index(number),
        argv,
        env,
        cwd,
        CommandLimits(*limits),
        service,
        merge,
        terminal and Terminal(*terminal),
        detached,
    )


def _warm(values: list[Any]) -> Warm:
    preload, limits, *values = values
    return Warm(preload, CommandLimits(*limits), *values)


def _close(values: list[Any]) -> Close:
    after, output, left = values
    return Close(after, output and Output(*output), left and Left(*left))


_ID: Final = Shape(int, ID_MAX)
_TEXT: Final = Shape(str, TEXT_MAX)
_ERRNO: Final = Shape(int, 4096)
FORMS: Final[dict[type[Any], Form]] = {
    Hello: Form(1, Role.GUEST, struct.Struct(">I")),
    Warm: Form(2, Role.HOST, build=_warm),
    Warmed: Form(3, Role.GUEST, struct.Struct("")),
    Seed: Form(4, Role.HOST, struct.Struct(">Q64s16s16s")),
    Seeded: Form(5, Role.GUEST, struct.Struct("16s")),
    Open: Form(6, Role.HOST, most=_LARGE_JSON_MAX, build=_open),
    Exec: Form(7, Role.HOST, most=_LARGE_JSON_MAX, build=_exec),
    Started: Form(8, Role.GUEST, struct.Struct(">I")),
    Stop: Form(9, Role.HOST, struct.Struct(">IB")),
    Denied: Form(
        10,
        Role.GUEST,
        shapes=(_ID, Shape(str, 16), Shape(str, 64), _ERRNO, _TEXT, Shape(bool), Shape(int, lo=1)),
    ),
    Exited: Form(11, Role.GUEST, struct.Struct(">IHQQQQQ????QQ")),
    Close: Form(12, Role.HOST, build=_close),
    Closed: Form(
        13,
        Role.GUEST,
        shapes=(Shape(int, 2**40, optional=True), Shape(str, TEXT_MAX, optional=True), Shape(int), Shape(int)),
    ),
    Failed: Form(14, Role.GUEST, shapes=(_ID, Shape(str, 64), _ERRNO, _TEXT)),
    Resize: Form(15, Role.HOST, struct.Struct(">IHH")),
    Changes: Form(16, Role.HOST, struct.Struct("")),
    Hold: Form(17, Role.HOST, struct.Struct(">I")),
    Held: Form(18, Role.GUEST, struct.Struct(">I?")),
    Resume: Form(19, Role.HOST, struct.Struct("")),
}
_TYPES: Final = {form.number: (kind, form) for kind, form in FORMS.items()}
BOUNDS: Final = {
    form.number: Bounds(form.sender, form.layout.size, form.layout.size)
    if form.layout is not None
    else Bounds(form.sender, 2, form.most)
    for form in FORMS.values()
}


def encode(message: Message) -> tuple[int, bytes]:
    """Return a message's number and payload. Raises ChannelUsageError if a value does not fit.

    Lone surrogates stand for undecodable bytes. They become JSON escapes in messages of the host, and question marks in
    messages of the guest.
    """
    form = FORMS[type(message)]
    try:
        if form.layout is not None:
            return form.number, form.layout.pack(*message)
        values: Any = message
        if form.shapes:
            values = [value.encode("utf-8", "replace").decode() if type(value) is str else value for value in message]
        payload = _ENCODER.encode(values).encode("ascii")
    except (struct.error, ValueError) as exc:
        raise ChannelUsageError(f"a value of {type(message).__name__.upper()} does not fit: {exc}") from exc
    if len(payload) > form.most:
        raise ChannelUsageError(f"{type(message).__name__.upper()} has {len(payload)} bytes, over {form.most}")
    return form.number, payload


def decode(number: int, payload: bytes) -> Message:
    """Decode the payload of message *number* and check it. Raises PeerError."""
    kind, form = _TYPES[number]
    name = kind.__name__.upper()
    if form.layout is not None:
        values: Any = form.layout.unpack(payload)
        if any(value > COUNT_MAX for value in values if isinstance(value, int)):
            raise PeerError(f"bad {name} message", "a number is out of range")
    else:
        values = _parsed(name, payload)
    if form.build is not None:
        try:
            return form.build(values)
        except (TypeError, ValueError) as exc:
            raise PeerError(f"bad {name} message", f"it has another form ({exc})") from None
    if form.shapes:
        _check(name, kind, form, values)
    message: Message = kind(*values)
    return message


def _parsed(name: str, payload: bytes) -> list[Any]:
    try:
        text = payload.decode("utf-8")
        values, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError) as exc:
        raise PeerError(f"bad {name} message", f"invalid JSON ({type(exc).__name__})") from None
    if not isinstance(values, list) or end != len(text):
        raise PeerError(f"bad {name} message", "not one JSON array")
    return values


def _check(name: str, kind: type[Any], form: Form, values: list[Any]) -> None:
    if len(values) != len(form.shapes):
        raise PeerError(f"bad {name} message", f"{len(values)} fields instead of {len(form.shapes)}")
    for number, shape in enumerate(form.shapes):
        field = kind._fields[number]
        value = values[number]
        if value is None and shape.optional:
            continue
        if problem := shape.problem(value):
            raise PeerError(f"bad {name} message", f"{field} {problem}")
        # A lone surrogate would fail wherever the text is written later.
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise PeerError(f"bad {name} message", f"{field} is not text")


def _no_constant(name: str) -> None:
    raise ValueError(name)


# Created once: json.dumps and json.loads create them on each call, which costs a fresh clone milliseconds.
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)
