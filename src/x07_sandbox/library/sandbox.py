"""Sandboxes from Python: one VM, many commands."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING, Literal, Self, TypedDict, Unpack

from x07_sandbox.errors import ArgumentError, SandboxError, UsageError, whole_number
from x07_sandbox.host.settings import LIFETIME_S, OUTPUT_MAX_BYTES, QUEUE_S
from x07_sandbox.library.arguments import check_names, check_snapshot_name, checked_seconds
from x07_sandbox.library.run import run_uninterrupted
from x07_sandbox.sessions.command import KEEPS, Process, bad_value, checked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from x07_sandbox.backends.base import MachineSource
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.files import Files
    from x07_sandbox.library.snapshots import Snapshot
    from x07_sandbox.policy.denials import Denial
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.reports.sandboxes import SandboxInfo
    from x07_sandbox.sessions.command import AnySandbox, Ended, Keep, StreamName
    from x07_sandbox.sessions.result import Diff, Result

_PROBE_S = 60.0
_SIZE = (24, 80)  # of a terminal, in characters


class SandboxOptions(TypedDict, total=False):
    """The keyword arguments of `Sandbox`."""

    policy: str | os.PathLike[str] | Policy | None
    image: str | None
    snapshot: Snapshot | str | None
    env: Mapping[str, str] | None
    workdir: str | os.PathLike[str] | None
    read_only: bool
    files: Mapping[str, str | bytes] | Mapping[Path, str | bytes] | None
    read_roots: Sequence[str | os.PathLike[str]]
    write_roots: Sequence[str | os.PathLike[str]]
    allow_hosts: Sequence[str]
    deny_hosts: Sequence[str]
    allow_hidden: bool
    allow_symlinks: bool
    hide: Sequence[str]
    reveal: Sequence[str]
    guest_root: bool
    git: bool
    memory: str | int | None
    cpu_s: float | None
    procs: int | None
    fds: int | None
    max_file_size: str | int | None
    scale_limits: bool | None
    ca: str | os.PathLike[str] | None
    lifetime_s: float
    idle_s: float | None
    tags: Mapping[str, str] | None
    backend: str | None
    wait_s: float
    on_progress: Callable[[str], object] | None


class ForkOptions(TypedDict, total=False):
    """The keyword arguments of `Sandbox.fork`, besides count."""

    lifetime_s: float
    idle_s: float | None
    tags: Mapping[str, str] | None
    wait_s: float


class ExecOptions(TypedDict, total=False):
    """The keyword arguments of `Sandbox.exec`."""

    input: bytes
    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    timeout_s: float | None
    merge: bool
    max_output_bytes: int
    keep: Keep
    on_output: Callable[[StreamName, bytes], object] | None
    check: bool


class StartOptions(TypedDict, total=False):
    """The keyword arguments of `Sandbox.start`."""

    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    timeout_s: float | None
    merge: bool
    tty: bool
    detach: bool


class Sandbox:
    r"""A virtual machine that stays open for many commands.

        with Sandbox(workdir="project", allow_hosts=["example.org:443"]) as sandbox:
            done = sandbox.shell("make test", timeout_s=60)
            print(done.exit_code, done.stdout.decode())
            sandbox.files.write("notes.txt", b"checked\n")

    Commands run as an ordinary user, several at once if you like; background processes live until the sandbox is
    closed. Files are read and written as that user. When the sandbox is closed, changes to folders of the host are
    applied, as after a run. If the `with` block ends by an exception, or the sandbox reaches the end of its life, they
    are kept for `x07 apply`. A `with` block raises SandboxError at its end if the sandbox had ended before.

    Thread-safe. A forked child cannot use it. Methods raise SandboxError if the sandbox is closed or was lost.
    """

    def __init__(  # noqa: PLR0913 - each is a keyword
        self,
        *,
        policy: str | os.PathLike[str] | Policy | None = None,
        image: str | None = None,
        snapshot: Snapshot | str | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | os.PathLike[str] | None = None,
        read_only: bool = False,
        files: Mapping[str, str | bytes] | Mapping[Path, str | bytes] | None = None,
        read_roots: Sequence[str | os.PathLike[str]] = (),
        write_roots: Sequence[str | os.PathLike[str]] = (),
        allow_hosts: Sequence[str] = (),
        deny_hosts: Sequence[str] = (),
        allow_hidden: bool = False,
        allow_symlinks: bool = False,
        hide: Sequence[str] = (),
        reveal: Sequence[str] = (),
        guest_root: bool = False,
        git: bool = False,
        memory: str | int | None = None,
        cpu_s: float | None = None,
        procs: int | None = None,
        fds: int | None = None,
        max_file_size: str | int | None = None,
        scale_limits: bool | None = None,
        ca: str | os.PathLike[str] | None = None,
        lifetime_s: float = LIFETIME_S,
        idle_s: float | None = None,
        tags: Mapping[str, str] | None = None,
        backend: str | None = None,
        wait_s: float = QUEUE_S,
        on_progress: Callable[[str], object] | None = None,
        machines: MachineSource | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        """Open a sandbox. Raises SandboxError.

        policy, image, env, workdir, read_only, files, read_roots, write_roots, allow_hosts, deny_hosts, allow_hidden,
        allow_symlinks, hide, reveal, guest_root, git, max_file_size, ca: see `run_program`. Commands start in a copy of
        workdir.
        snapshot: start from this snapshot, or the one with this id or name, instead of an image: see `snapshot`. Then
        only lifetime_s, idle_s, tags, wait_s and on_progress can be given.
        memory, procs: limits of all commands together. cpu_s, fds: limits of each command. Of a policy that you pass,
        `limits.wall_ms` and `limits.cpu_ms` limit each command; those of the built-in policy do not apply.
        scale_limits: whether to multiply these times by the slowdown of emulation; None follows your settings.
        lifetime_s: after this time the sandbox ends, at most 24 hours. idle_s: it ends after this time without a
        running command and without a call; None for no such limit. tags: words by which `list` finds it.
        backend: name of a backend, such as "podman"; None stands for the one that the environment selects.
        wait_s: how long to wait while `max_open` sandboxes are open, at most 24 hours; 0 to fail within a second.
        SandboxError is raised then, with the code "no-slot". on_progress: called, in any thread, with a line of text
        before each long step of the opening. Waits are also warnings of the logger "x07_sandbox".
        machines: where ready VMs come from; None for the VMs of `x07 pool`. cancel: ends the opening, and the sandbox.
        """
        own = {"self", "machines", "cancel", "on_progress"}
        given = {
            name: value for name, value in locals().items() if name not in own and value is not _DEFAULTS.get(name, own)
        }
        from x07_sandbox.host.waiting import Cancel as NewCancel
        from x07_sandbox.library.opening import open_sandbox

        cancel = NewCancel() if cancel is None else cancel
        opened: list[AnySandbox] = []
        try:
            tell = _teller(on_progress, opened)
            work = partial(open_sandbox, given, cancel, machines=machines, progress=tell)
            run_uninterrupted(cancel, lambda: opened.append(work()))
        except BaseException:
            for one in opened:  # Ctrl-C came too late to prevent it
                one.finish("discard")
            cancel.close()
            raise
        self._use(opened[0], cancel)

    def _use(self, opened: AnySandbox, cancel: Cancel | None = None) -> None:
        self._open = opened
        self._cancel = cancel
        self._files: Files | None = None
        self._bash = ""  # the shell, once it is known

    @classmethod
    def create(cls, *, name: str = "", **options: Unpack[SandboxOptions]) -> Self:
        """Open a sandbox that outlives this process, in a process of its own, and connect to it. Raises SandboxError.

        name: a name by which `connect` finds it. options: see `Sandbox`.
        """
        from x07_sandbox.host.waiting import Cancel as NewCancel

        return cls._created(name, options, NewCancel())

    @classmethod
    def _created(cls, name: str, options: SandboxOptions, cancel: Cancel, *, find: bool = False) -> Self:
        """Carry out `create`, or `get_or_create` to *find* it. cancel: ends the opening; closed at its end."""
        from x07_sandbox.library.held import create
        from x07_sandbox.library.held_messages import Create
        from x07_sandbox.library.listing import naming, require_new_name

        with contextlib.ExitStack() as stack:
            stack.callback(cancel.close)
            check_names("Sandbox.create", options, SandboxOptions.__annotations__)
            if find:
                stack.enter_context(naming(name, cancel))
                try:
                    return cls.connect(name)
                except UsageError as exc:
                    if exc.code != "no-such-sandbox":
                        raise
            require_new_name(name)
            tell = _teller(options.pop("on_progress", None))
            given = {key: value for key, value in options.items() if value is not _DEFAULTS.get(key, options)}
            asked = Create(dict(given, name=name), None, flags=False)
            run = run_uninterrupted(cancel, lambda: create(asked, cancel.fd, tell))
            return cls.connect(run)

    @classmethod
    def get_or_create(cls, name: str, **options: Unpack[SandboxOptions]) -> Self:
        """Return the open sandbox with this name, or open one. Raises SandboxError.

        Of several processes that call this at once, one opens it. options: see `Sandbox`; without effect if it is open.
        """
        from x07_sandbox.host.waiting import Cancel as NewCancel

        return cls._created(name, options, NewCancel(), find=True)

    @classmethod
    def connect(cls, id: str) -> Self:  # noqa: A002 - as the property
        """Return the open sandbox with this id, start of an id, or name. Raises SandboxError.

        It must be one that outlives its creator: `Sandbox.create` and `x07 sandbox create` open such. One that was
        paused goes on. Only the user who opened it can connect. At the end of a `with` block it stays open, and
        commands that were started through this object are killed, except detached ones. `close` closes the sandbox for
        everybody.
        """
        from x07_sandbox.library.listing import connect_to

        sandbox = cls.__new__(cls)
        sandbox._use(connect_to(id))  # noqa: SLF001 - of this class
        return sandbox

    @staticmethod
    def list(tags: Mapping[str, str] | None = None) -> Sequence[SandboxInfo]:
        """Return this user's open sandboxes that have all of *tags*, oldest first."""
        from x07_sandbox.library.listing import list_sandboxes

        return list_sandboxes(tags)

    @staticmethod
    def max_open() -> int:
        """Return how many sandboxes of this user may be open at once. Others wait to be opened. Raises SandboxError."""
        from x07_sandbox.records.admission import SANDBOXES

        return SANDBOXES.count()

    @staticmethod
    def images() -> Sequence[str]:
        """Return the names of this user's guest images, which *image* may be. Raises SandboxError."""
        from x07_sandbox.images.store import all_names

        return sorted(all_names())

    @property
    def id(self) -> str:
        """The id of the sandbox, to give to commands such as `x07 kill` and `x07 diff`."""
        return self._open.run

    @property
    def alive(self) -> bool:
        """Whether the sandbox is open."""
        return not self._open.session.over

    @property
    def left_out(self) -> tuple[Denial, ...]:
        """What was not copied in from folders of the host: one denial for each reason, such as hidden names.

        Its `subject` has the first names, `count` says how many there are, and `how_to_allow.flag` names the option
        that would let them in.
        """
        return self._open.left_out

    @property
    def result(self) -> Result | None:
        """The result, once the sandbox has ended."""
        return self._open.result

    @property
    def files(self) -> Files:
        """The files of the sandbox. Each of their methods has a time limit, *timeout_s*: see `Files`."""
        if self._files is None:
            from x07_sandbox.library.files import Files

            self._files = Files(self._using())
        return self._files

    def exec(  # noqa: PLR0913 - each is a keyword
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        input: bytes = b"",  # noqa: A002 - as subprocess.run has it
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        merge: bool = False,
        max_output_bytes: int = OUTPUT_MAX_BYTES,
        keep: Keep = "head",
        on_output: Callable[[StreamName, bytes], object] | None = None,
        check: bool = False,
    ) -> Ended:
        """Run a command, and return how it ended. Its standard input is *input*, which is at its end by default.

        argv: the command and its arguments. cwd: its folder; a relative path is below the sandbox's own folder. env:
        additional environment variables. timeout_s: after this time all processes of the command are killed, and the
        outcome is "timeout". merge: put standard error into standard output, in order. max_output_bytes: how much of
        each stream to keep. keep: whether to keep the "head" or the "tail" of a longer stream, or half of "both".
        on_output: called with "stdout" or "stderr" and bytes as they arrive, in this thread.

        A timeout or an exit status that is not 0 is no exception, unless *check* is set. Ctrl-C kills the command, and
        the sandbox stays open.
        """
        if keep not in KEEPS:
            raise bad_value("keep", keep, f"one of {', '.join(KEEPS)}")
        if not isinstance(input, bytes | bytearray | memoryview):
            raise bad_value("input", input, "bytes")
        whole_number(max_output_bytes, bad_value("max_output_bytes", max_output_bytes, "a number from 0"), 0)
        process = self.start(argv, cwd=cwd, env=env, timeout_s=timeout_s, merge=merge)
        try:
            process.feed(bytes(input))
            process.close_stdin()
            ended = process.collect(max_output_bytes, keep, on_output)
        except BaseException:
            process.kill()
            raise
        return checked(ended) if check else ended

    def shell(self, text: str, **options: Unpack[ExecOptions]) -> Ended:
        """Run shell commands by `bash -c`, or `sh -c` where there is no bash. The options are those of `exec`."""
        if not isinstance(text, str):
            raise ArgumentError("cannot run the commands", f"they are {type(text).__name__}, not str", "Use exec()")
        return self.exec([self._shell(), "-c", text], **options)

    def start(  # noqa: PLR0913 - as above
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        merge: bool = False,
        tty: bool = False,
        detach: bool = False,
    ) -> Process:
        """Start a command, and return it while it runs. Its standard input stays open until `Process.close_stdin`.

        tty: give it a terminal, whose output is standard output. detach: give it no input, and let it outlive its
        client. The end of its output is kept for other clients, see `process`. All else: see `exec`.
        """
        from x07_sandbox.channel.messages import Terminal
        from x07_sandbox.sessions.execution import order

        given = () if isinstance(argv, str | bytes) else argv
        words = [os.fspath(word) if isinstance(word, os.PathLike) else word for word in given]
        if not words:
            why, fix = "argv is not a list with at least one word", 'Pass a list such as ["make", "test"]'
            raise ArgumentError("cannot run the command", why, fix)
        if timeout_s is not None:
            checked_seconds("timeout_s", timeout_s, bad_value("timeout_s", timeout_s, "a number of seconds above 0"))
        terminal = Terminal(*_SIZE) if tty else None
        folder = "" if cwd is None else os.fspath(cwd)
        asked = order(words, env or {}, folder, merge=merge, terminal=terminal, detached=detach)
        return self._using().start(asked, timeout_s)

    def process(self, number: int) -> Process:
        """Return a command by its id: one that runs, or whose end nobody has asked for, or a detached one.

        Detached commands are found also after their end, the last 32 of them, with up to 1 MiB of each of their
        streams. Raises UsageError.
        """
        whole_number(number, bad_value("number", number, "the id of a command"))
        command = self._using().command(number)
        if command is None:
            why = "none has this id, or it was waited for"
            raise UsageError(f"there is no command {number}", why, "Start it again", code="no-such-command")
        return command

    def upload(
        self, local: str | os.PathLike[str], path: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """Copy a file, or a folder with all that is in it, into the sandbox. A folder must not exist there yet.

        timeout_s: see `files`. Raises OSError, SandboxError.
        """
        self.files.upload(local, path, timeout_s=timeout_s)

    def download(
        self, path: str | os.PathLike[str], local: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """Copy a file, or a folder with all that is in it, from the sandbox to a path that does not exist yet.

        The content is not trusted: links in a folder are copied as links, and nothing is written outside *local*. Holes
        of sparse files stay holes. A file, or a folder, has at most 64 GiB. timeout_s: see `files`. Raises OSError,
        SandboxError.
        """
        self.files.download(path, local, timeout_s=timeout_s)

    def forward(self, port: int, *, unix: str | os.PathLike[str] | None = None) -> tuple[str, int]:
        """Let programs of the host connect to a port of the sandbox, until it or this process ends, or `disconnect`.

        Return the address and port.

        Any user of the host may connect to that port of the loopback interface. unix: use a Unix socket at this path
        instead, which only you may connect to, and return the path and 0. A connection to a port on which nothing
        listens is closed at once. Raises OSError.
        """
        from x07_sandbox.library.forwarding import Forwarder

        return Forwarder(self._using(), _port("forward", port), None if unix is None else os.fspath(unix)).address

    def wait_for_port(self, port: int, timeout_s: float = 30.0) -> None:
        """Wait until a program of the sandbox accepts connections at 127.0.0.1. Raises TimeoutError, SandboxError."""
        from x07_sandbox.channel.messages import CONNECT
        from x07_sandbox.sessions.execution import order

        within_s = checked_seconds("timeout_s", timeout_s)
        asked = order([str(_port("wait for", port)), f"{within_s:.3f}"], service=CONNECT)
        if not self._using().start(asked).wait().ok:
            raise TimeoutError(f"no program of the sandbox accepted connections at port {port} within {timeout_s} s")

    def changes(self) -> Diff:
        """Return what has changed in folders of the host so far, as a patch. Nothing is applied.

        `Diff.running` says whether commands were running, which may have written only parts of their files.
        """
        opened = self._using()
        return run_uninterrupted(lambda: None, opened.changes)

    def fork(self, count: int = 1, **options: Unpack[ForkOptions]) -> Sequence[Self]:
        """Return *count* sandboxes that go on from this moment: with the same files, programs and memory.

            tries = sandbox.fork(4)
            for number, one in enumerate(tries):
                one.shell(f"git apply /x07/in/candidate-{number}.patch && make test")

        Each has its own id, machine id, random numbers, clock, connections and changes. Commands that run go on in each
        of them, and `process` returns them by their ids; connections to hosts end in them. Meanwhile the programs of
        this sandbox stop for a moment. Forks end like this sandbox: with the process, if it does, else by `close`.
        options: lifetime_s, idle_s, tags and wait_s, as of `Sandbox`. If one of them cannot be started, none is, and
        SandboxError is raised.
        """
        from x07_sandbox.library.opening import forks_of

        check_names("fork", options, ForkOptions.__annotations__)
        forks = []
        for opened, cancel in forks_of(self._using(), count, options):
            fork = type(self).__new__(type(self))
            fork._use(opened, cancel)  # noqa: SLF001 - of this class
            forks.append(fork)
        return forks

    def snapshot(self, name: str = "") -> Snapshot:
        """Keep a snapshot of this moment, from which sandboxes can start: `Sandbox(snapshot=...)`. Raises SandboxError.

        It has the files, programs and memory of this sandbox, which goes on, and is as secret as they are. It outlives
        the sandbox, and takes some 200 MiB and what was written. Those that were not used for longest are removed when
        all take more space than the settings allow, or after 7 days. name: replaces the snapshot of this name.
        """
        from x07_sandbox.library.snapshots import Snapshot

        opened = self._using()
        check_snapshot_name(name)
        return Snapshot.find(run_uninterrupted(lambda: None, lambda: opened.snapshot(name)))

    def checkpoint(self) -> int:
        """Keep this moment for `rollback`, and return its number. The last 16 are kept, while the sandbox is open."""
        return run_uninterrupted(lambda: None, self._using().checkpoint)

    def rollback(self, checkpoint: int) -> None:
        """Go back to a checkpoint: with its files, programs and memory. Raises SandboxError, and changes nothing then.

        Commands that were started later end as "cancelled", and forwarded ports that are in use are disconnected.
        Commands that ran then go on: get them again by `process`. The clock is right, and the used lifetime counts.
        """
        opened = self._using()
        what, fix = "cannot go back to the checkpoint", "Pass a number that checkpoint() returned"
        whole_number(checkpoint, ArgumentError(what, f"it is {checkpoint!r}", fix))
        run_uninterrupted(lambda: None, lambda: opened.rollback(checkpoint))

    def pause(self) -> None:
        """Save the sandbox to the disk and free its memory, until `connect` lets it go on, with the same id.

        Only of one that outlives its creator. This object is disconnected. The lifetime does not count meanwhile.
        Connections to hosts end, and checkpoints are lost. It is removed after 7 days. Raises SandboxError.
        """
        run_uninterrupted(lambda: None, self._using().pause)

    def extend(self, lifetime_s: float) -> None:
        """Let the sandbox last for lifetime_s seconds from now, within 24 hours from its opening."""
        self._using().extend(checked_seconds("lifetime_s", lifetime_s))

    def close(self, changes: Literal["apply", "all-or-nothing", "keep", "discard"] = "apply") -> Result:
        """End all commands, and apply, keep or discard the changes to folders of the host. Return the result.

        If the sandbox has ended already, return its result.
        """
        from x07_sandbox.options import CHANGES

        opened = self._using()
        if changes not in CHANGES:
            fix = f"Use one of {', '.join(CHANGES)}"
            raise ArgumentError("cannot close the sandbox", f"changes is {changes!r}", fix)
        try:
            return run_uninterrupted(lambda: None, lambda: opened.finish(changes))
        finally:
            cancel, self._cancel = self._cancel, None
            if cancel is not None:
                cancel.close()
            from x07_sandbox.sessions.run import retain_records

            retain_records()

    def disconnect(self) -> None:
        """Leave a sandbox that `connect` returned, as at the end of a `with` block."""
        self._using().disconnect()

    def kill(self) -> Result:
        """End the sandbox at once, and discard the changes."""
        return self.close("discard")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open.outlives:
            self._open.disconnect()
            return
        result = self.close("apply" if kind is None else "keep")
        if kind is None and result.reason_code != "closed":
            error = SandboxError(
                "the sandbox ended before it was closed", result.reason, "See the result of this error"
            )
            error.result = result
            raise error

    def wake(self) -> None:
        """Have all threads that wait for commands or files look whether they still should."""
        self._open.session.wake()
        if self._files is not None:
            self._files.wake()

    def _using(self) -> AnySandbox:
        self._open.require_own_process()
        return self._open

    def _shell(self) -> str:
        if not self._bash:
            found = self.exec(["/bin/sh", "-c", "command -v bash"], timeout_s=_PROBE_S)
            if found.outcome not in {"ok", "failed"}:  # perhaps only now
                return "/bin/sh"
            self._bash = "bash" if found.ok else "/bin/sh"
        return self._bash


def _teller(on_progress: Callable[[str], object] | None, opened: Sequence[object] = ()) -> Callable[[str], None]:
    """Return a function for lines of progress, until *opened* has an item. It logs each `Notice`."""
    from x07_sandbox.host.waiting import Notice

    def tell(text: str) -> None:
        if isinstance(text, Notice) and not opened:
            import logging

            logging.getLogger("x07_sandbox").warning("opening a sandbox: %s", text, extra={"event": "sandbox.waiting"})
        if text and on_progress is not None and not opened:
            on_progress(str(text))

    return tell


def _port(what: str, port: int) -> int:
    error = ArgumentError(f"cannot {what} a port", f"it is {port!r}", "Pass a number from 1 to 65535")
    return whole_number(port, error, 1, 65535)


_DEFAULTS = Sandbox.__init__.__kwdefaults__ or {}
