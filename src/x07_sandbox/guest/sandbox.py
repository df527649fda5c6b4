"""The session of one sandbox: its files and mounts, the commands in it, and what is sent when it closes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel import streams
from x07_sandbox.channel.connection import Carrier
from x07_sandbox.channel.egress import CA_FILE
from x07_sandbox.channel.link import Link, State, Stream
from x07_sandbox.channel.messages import (
    CWD,
    DENIED_MAX,
    IN,
    OUT,
    PROJECT_FOLDER,
    Changes,
    Close,
    Closed,
    Denied,
    Exec,
    Exited,
    Resize,
    Stop,
    Terminal,
)
from x07_sandbox.channel.streams import Event
from x07_sandbox.channel.trees import Entry
from x07_sandbox.channel.trees import Kind as Record
from x07_sandbox.guest import confine, init, system
from x07_sandbox.guest.audit import ProgramPaths, View
from x07_sandbox.guest.environment import IN_MEMORY_BYTES, failure, job_settings
from x07_sandbox.guest.exec import READ, Command, Spare
from x07_sandbox.guest.execution import ExecutionRules
from x07_sandbox.guest.system import JobError, write_all
from x07_sandbox.guest.trees import Left, ProgramTree, Room, Tree, changes, left_files, pack_program, stream_of

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import CommandLimits, InputFile, Message, Mount, Open, Output
    from x07_sandbox.guest.audit import Audit, NoAudit
    from x07_sandbox.guest.environment import Environment, Process


_FULL_BLOCKS: Final = 256  # a disk with fewer free blocks (4 KiB) counts as full
_FULL_SHARE: Final = 64  # a tmpfs with less than 1/64 free counts as full
_QUEUED_MAX: Final = 4 * READ

_FOLDER: Final = f"{IN}/"
SYSTEM_CA: Final = "/etc/ssl/certs/ca-certificates.crt"


class Sandbox:
    """The session that one OPEN message requests. fail: called with an error and the id of its command, or 0."""

    def __init__(
        self,
        link: Link,
        machine_id: bytes,
        opening: Open,
        environment: Environment,
        audit: Audit | NoAudit,
        fail: Callable[[JobError, int], object],
    ) -> None:
        self._link = link
        self._machine_id = machine_id
        self._opening = opening
        self._environment = environment
        self._audit = audit
        self._fail = fail
        self._files = IncomingFiles(opening.files, environment)
        self._waiting: list[Exec] = []  # until all files have arrived
        self._early_input: list[tuple[int, Event]] = []  # of the waiting commands, by their ids
        self._commands: dict[int, Command] = {}
        self._spare = Spare(environment, self._added)
        self._next_limits: CommandLimits | None = None  # for the spare process
        self._prepared = self._begun = False
        self._was_killed = False
        self._closing: Close | None = None
        self._ending = False  # all processes, so that the session can close
        self._emptied = False  # no process is left
        self._sending: list[tuple[Stream, Iterator[bytes]]] = []
        self._number = 0  # of the stream that is being sent
        self._held = b""
        self._closed: Closed | None = None  # once everything before it is queued
        self._carrier: Carrier | None = None
        if environment.relay is not None and environment.relay.carried_fd >= 0:
            self._carrier = Carrier(link.streams, link.open(Stream.RELAY), environment.relay.carried_fd)

    # from the host

    def take(self, event: Message | Event) -> None:
        """Handle a message of the host or an event of a stream. Raises JobError, OSError."""
        if isinstance(event, Event):
            self._take_event(event)
        elif isinstance(event, Exec):
            self._waiting.append(self._environment.platform.adapt_command(event))
            self._start_if_complete()
        elif isinstance(event, Stop):
            self._stop(event)
        elif isinstance(event, Resize):
            if (found := self._commands.get(event.id)) is not None:
                found.resize(Terminal(event.rows, event.columns))
        elif isinstance(event, Changes):
            self._sending.append((Stream.CHANGES, self._changes()))
        elif isinstance(event, Close):
            self._close(event)

    def rejoin(self) -> None:
        """Go on in a copy of the VM. No stream is open, and nothing was asked for that is still to be sent."""
        for command in self._commands.values():
            command.rejoin()

    def _close(self, order: Close) -> None:
        """Send what *order* asks for, once its command has ended. Raises JobError, OSError."""
        self._closing = order
        command = self._commands.get(order.after)
        if command is not None and command.wait_status is None:
            self._environment.end_with(command.process.key)
        elif all(waiting.id != order.after for waiting in self._waiting):
            self._end_all()

    def _stop(self, order: Stop) -> None:
        if (command := self._commands.get(order.id)) is not None:
            command.stop(order.signal)
            self._was_killed |= command.killed
        for waiting in [waiting for waiting in self._waiting if waiting.id == order.id]:
            self._waiting.remove(waiting)
            self._give_up(waiting)

    def _give_up(self, order: Exec) -> None:
        """Report that a command was not executed, since it was stopped before."""
        self._command_failed(JobError("exec", 0, "it was stopped before its start"), order.id)

    def _end_all(self) -> None:
        """End all processes. Then the session closes."""
        if self._ending:
            return
        self._ending = True
        waiting, self._waiting = self._waiting, []
        for order in waiting:
            self._give_up(order)
        self._environment.end()

    def _close_if_empty(self) -> None:
        if self._emptied and not self._commands and self._closing is not None:
            self._send_all(self._closing)

    def _take_event(self, event: Event) -> None:
        if event.code == Stream.INPUT:
            self._take_file(event)
        elif event.code == Stream.RELAY and self._carrier is not None:
            self._carrier.take(event)
        elif event.code == Stream.STDIN:
            command = self._link.subject(event.stream)  # unknown once the stream has ended
            if self._waiting:
                self._early_input.append((command, event))
            else:
                self._take_input(command, event)

    def _take_file(self, event: Event) -> None:
        index = self._link.subject(event.stream)
        if event.type == streams.DATA:
            self._files.write(index, event.data)
            self._link.streams.consumed(event.stream, len(event.data))
        elif event.type == streams.FIN:
            self._files.close(index)
            self._start_if_complete()

    def _take_input(self, number: int, event: Event) -> None:
        command = self._commands.get(number)
        if command is None:
            self._link.streams.reset(event.stream)
        elif event.type == streams.OPEN:
            command.open_input(event.stream)
        elif event.type in {streams.DATA, streams.FIN}:
            command.take_input(event.data, ended=event.type == streams.FIN)

    # commands

    def _start_if_complete(self) -> None:
        if not self._waiting or not self._files.complete():
            return
        orders, self._waiting = self._waiting, []
        for order in orders:
            if self._ending:  # a command before it closes the session
                self._give_up(order)
                continue
            try:
                self._start(order)
            except JobError as exc:
                self._command_failed(exc, order.id)
        early, self._early_input = self._early_input, []
        for command, event in early:
            self._take_input(command, event)

    def _start(self, order: Exec) -> None:
        environment = self._environment
        if not environment.own_groups:  # commands that share a group share its limits
            shared = order.limits._replace(mem_bytes=self._opening.mem_bytes, tasks=self._opening.tasks)
            order = order._replace(limits=shared)
        limits, is_first = order.limits, not self._prepared
        if is_first:
            self._prepare(order)
        if not order.service:
            order = order._replace(argv=self._found(order))
        if not self._begun:
            environment.prepare(self._settings(limits, self._execution(order)))
        confined = self._opening.confine
        if is_first and order.is_plain and not environment.keeps_interpreter(order, confined):
            process = environment.first()
        else:
            python = environment.copies(order, confined)
            process = (None if python else self._spare.take(order)) or self._added(order, python=python)
        if not self._begun:
            self._begun = True
            for tree in self._files.trees.values():
                tree.wait()
            self._begin_audit()
        command = Command(order, process, self._link, environment, self._command_failed)
        self._commands[order.id] = command
        # Init takes the process that waits from the start for the last one, also if it is never used.
        if (closes := self._closes_after(order.id)) or self._closing is None or process.key == init.FIRST:
            environment.end_with(process.key if closes else None)
        command.started_at = environment.start(process, order, self._opening.confine)

    def _added(self, order: Exec, *, python: bool = False) -> Process:
        """Start a process that waits for its start message. python: see `Process`. Raises JobError, OSError."""
        environment, limits = self._environment, order.limits
        limited = environment.platform.resource_limits(self._settings(limits))
        process = environment.add(order, limited, self._opening.confine, python=python)
        process.group.limit(mem_bytes=limits.mem_bytes, tasks=limits.tasks)
        return process

    def _prepare(self, order: Exec) -> None:
        """Mount the folders and set the limits of all commands. Raises JobError, OSError."""
        opening, environment, limits = self._opening, self._environment, order.limits
        self._prepared = True
        # The waiting process may be larger than a small limit, which is applied once it has become the program.
        most_bytes = max(opening.mem_bytes, environment.waiting_bytes)
        environment.group.limit(mem_bytes=most_bytes, tasks=opening.tasks)
        environment.first().group.limit(mem_bytes=max(limits.mem_bytes, environment.waiting_bytes), tasks=limits.tasks)
        if opening.mounts or self._files.ca:
            environment.prepare(self._settings(limits))
            self._mount()
        environment.name(self._machine_id)

    def _begin_audit(self) -> None:
        mounts = self._opening.mounts
        names = ProgramPaths(self._files.trees, mounts, f"/proc/{self._environment.init}/root")
        find = names.path if mounts else None
        self._audit.begin(View(find, names.roots(), names.link_target, self._service_pids))

    def _service_pids(self) -> list[int]:
        """Return the processes of the agent's own services, whose denials are answers to the host."""
        services = [command.process.group for command in self._commands.values() if command.order.service]
        return [pid for group in services for pid in group.pids()]

    def _command_failed(self, error: JobError, command: int) -> None:
        """Report an error: of the command if it could not be executed, else of the whole session."""
        only_command = error.args[0] == "exec"
        self._fail(error, command if only_command else 0)
        if only_command:
            if (failed := self._commands.pop(command, None)) is not None:
                failed.close()
            if self._closes_after(command):
                self._end_all()
            self._close_if_empty()

    def _closes_after(self, command: int) -> bool:
        return self._closing is not None and self._closing.after == command

    def _settings(self, limits: CommandLimits, execution: ExecutionRules | None = None) -> confine.JobSettings:
        spare_cpu_s, on_disk = self._environment.spare_cpu_s, self._files.on_disk
        settings = job_settings(self._opening, limits, spare_cpu_s, inputs_on_disk=on_disk)
        return settings._replace(execution=None if execution is None else tuple(execution))

    def _execution(self, order: Exec) -> ExecutionRules | None:
        """Return the execution rules, or None if everything may be executed."""
        confined = self._opening.confine
        if confined.execute and confined.programs is None:
            return None
        return ExecutionRules(
            programs=confined.programs,
            prefixes=confined.prefixes,
            program=None
            if order.service or self._environment.becomes(order.argv, order.env, confined)
            else order.argv[0],
            alone=confined.alone,
            mounts=[mount.at for mount in self._opening.mounts],
        )

    def _found(self, order: Exec) -> list[str]:
        """Return the arguments. A command name without a slash is replaced by its path, from PATH. Raises JobError."""
        name, *rest = order.argv
        if "/" in name:
            return order.argv
        view = f"/proc/{self._environment.init}/root" if self._environment.platform.namespaces else ""
        for folder in order.env.get("PATH", "").split(":"):
            path = f"{folder}/{name}"
            if not path.startswith("/") or not os.path.lexists(view + path):
                continue
            if (os.path.isfile(view + path) and os.access(view + path, os.X_OK)) or system.is_program(view, path):
                return [path, *rest]
        raise JobError("exec", errno.ENOENT, f"command not found: {name}")

    def _mount(self) -> None:
        wanted = self._opening.mounts
        if any(mount.at.startswith(PROJECT_FOLDER) for mount in wanted):
            os.makedirs(f"{self._environment.folder(on_disk=self._files.on_disk)}/project", exist_ok=True)
        mounts = [(self._source(mount), mount.at, mount.write) for mount in wanted]
        mounts += [(self._files.ca, SYSTEM_CA, False)] if self._files.ca else []
        self._environment.platform.mount(self._environment.init, mounts)
        self._environment.mounted()

    def _source(self, mount: Mount) -> str:
        """Return the path of a mount's source as the agent sees it."""
        if mount.tree is None:
            return self._environment.platform.folder("work")
        folder = os.fsdecode(self._files.trees[mount.tree].folder)
        return f"{folder}/{mount.sub}" if mount.sub else folder

    # while it runs

    def register(self, poll: select.poll) -> None:
        """Register the descriptors to wait for."""
        self._prepare_spare()
        if self._commands or self._ending or self._spare:
            poll.register(self._environment.report_fd, select.POLLIN)
        for command in self._commands.values():
            command.register(poll)
        if self.is_running():
            poll.register(self._audit.fd, select.POLLIN)
            if (server := self._environment.no_network) is not None:
                poll.register(server.fd, select.POLLIN)
            if (relay := self._environment.relay) is not None:
                poll.register(relay.status_fd, select.POLLIN)
        if self._carrier is not None:
            self._carrier.register(poll)

    def _prepare_spare(self) -> None:
        """Prepare for the next command once all have ended, and the messages of the last turn are sent."""
        limits, self._next_limits = self._next_limits, None
        idle = self._closing is None and not self._ending and not self._commands and not self._waiting
        if limits is not None and idle and self._opening.confine.programs is None:
            self._spare.prepare(limits)

    def is_running(self) -> bool:
        """Return whether a command runs, whose CPU time must be checked."""
        for command in self._commands.values():  # noqa: SIM110 - a generator would be new code to a fresh clone
            if command.running:
                return True
        return False

    def paused_s(self) -> float:
        """Return for how many seconds the agent must not read output of a command."""
        pauses = [pause for command in self._commands.values() if (pause := command.paused_s())]
        return min(pauses) if pauses else 0.0

    def handle(self, fd: int, mask: int) -> None:
        """Handle a ready descriptor."""
        relay, server = self._environment.relay, self._environment.no_network
        if self._link.state is State.FAILED:  # since an earlier event of this turn
            return
        if fd == self._environment.report_fd:
            self._take_report()
        elif fd == self._audit.fd:
            self._audit.take()
        elif server is not None and fd == server.fd:
            server.serve()
        elif self._carrier is not None and fd == self._carrier.fd:
            self._carrier.handle(mask)
        elif relay is not None and fd == relay.status_fd:
            self._fail(JobError("relay", 0, relay.end_reason()), 0)
        else:
            for command in list(self._commands.values()):
                if command.handle(fd, mask):
                    return

    def _take_report(self) -> None:
        """Take a report of init: a command has ended, or init has failed."""
        kind, *words = report = self._environment.next_report()
        if kind == init.READY:
            self._emptied = True
            self._close_if_empty()
            return
        if kind != init.EXITED:
            self._fail(failure(report), 0)
            return
        for command in self._commands.values():
            if command.process.key == words[0]:
                command.wait_status, command.was_last = words[1:]
        self._spare.ended(words[0])

    def tick(self) -> None:
        """Do whatever is due after events, or because time has passed. Raises JobError, OSError."""
        if self._link.state is State.FAILED:
            return
        for command in list(self._commands.values()):
            command.tick()
            if command.ended:
                self._exited(command)
        if self._sending:
            self._send_more()

    def _exited(self, command: Command) -> None:
        group, identity = command.process.group, command.order.id
        lost = 0 if command.order.service else self._report_denials(identity)
        assert command.wait_status is not None  # it has ended
        self._link.send(
            Exited(
                id=identity,
                wait_status=command.wait_status,
                cpu_us=command.cpu_us(),
                memory_peak_bytes=group.count("memory_peak_bytes"),
                oom_kills=command.process.count("oom_kills"),
                tasks_peak=group.count("tasks_peak"),
                tasks_refused=command.process.count("tasks_refused"),
                cpu_exceeded=command.cpu_exceeded,
                stopped=command.stopped,
                disk_full=os.statvfs(self._environment.platform.scratch).f_bavail < _FULL_BLOCKS,
                memory_full=self._memory_full(),
                denials_lost=lost,
                wall_us=round((time.monotonic() - command.started_at) * 1_000_000),
            )
        )
        del self._commands[identity]
        if not (closes := self._closes_after(identity)):  # else the machine ends
            command.close()
        if self._closing is None:
            if not command.order.service:
                self._begin_audit()
        elif closes and command.was_last:
            self._emptied = True
        elif closes:  # CLOSE has crossed its end
            self._end_all()
        self._close_if_empty()
        self._next_limits = command.order.limits

    def _report_denials(self, command: int) -> int:
        """Report what was denied since the last command, and return how many denials that does not include."""
        if self._carrier is not None:
            self._carrier.read()  # what the relay has reported, so that the gate knows it before EXITED arrives
        refused, lost = self._audit.end()
        if (server := self._environment.no_network) is not None:
            looked_up, more = server.take()
            refused, lost = {**looked_up, **refused}, lost + more
        for refusal, count in list(refused.items())[:DENIED_MAX]:
            self._link.send(Denied(command, *refusal, count))
        return lost + sum(list(refused.values())[DENIED_MAX:])

    def _memory_full(self) -> bool:
        """Return whether one of the program's tmpfs folders has run out of space or inodes."""
        for fd in self._environment.in_memory_fds:
            room = os.statvfs(fd)
            if room.f_bavail * _FULL_SHARE < room.f_blocks or not room.f_favail:
                return True
        return False

    # the end

    def _send_all(self, order: Close) -> None:
        """Queue everything that *order* asks for, and CLOSED after it."""
        if self._carrier is not None:
            self._carrier.read()  # what the relay has reported so far
        size, problem, output = None, None, None
        if order.output is not None and not self._was_killed:
            size, problem, output = self._open_output(order.output)
        if output is not None:
            self._sending.append((Stream.OUTPUT, output))
        if any(mount.changes for mount in self._opening.mounts):
            self._sending.append((Stream.CHANGES, self._changes()))
        left = self._left_files(order)
        if left.files and order.left is not None and order.left.files:
            self._sending.append((Stream.LEFT, stream_of(left)))
        self._closed = Closed(size, problem, left.files, min(left.size, 2**62))
        if not self._sending:
            self._link.send(self._closed)

    def _left_files(self, order: Close) -> Left:
        """Return the number and size of the files that programs left in private folders, and which of them to send."""
        if order.left is None:
            return Left(0, 0, [])
        # On some platforms, host folders lie inside these; their files are among the changes.
        mounts, platform = self._opening.mounts, self._environment.platform
        places = [mount.at for mount in mounts]
        with_out = order.left.files > 0 and OUT not in places
        folders = [platform.folder(name) for name in ("work", "out")[: 1 + with_out]]
        start = f"{next((mount.at for mount in mounts if mount.tree is None), CWD)}/"
        roots = [os.fsencode(at.removeprefix(start)) for at in places if at.startswith(start)]
        with platform.reading():
            return left_files(folders, self._files.work, order.left.files, order.left.bytes, roots)

    def _open_output(self, output: Output) -> tuple[int | None, str | None, Iterator[bytes] | None]:
        """Open the output. Return its size and content, or the reason why it cannot be sent."""
        platform = self._environment.platform
        path = f"{platform.folder('out')}/{os.path.basename(output.path)}"
        try:
            with platform.reading():
                # O_NONBLOCK: a FIFO in its place must not block.
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                info = os.fstat(fd)
                problem, size, content = "", info.st_size, _content(fd)
                if output.is_tree:
                    problem, size, content = pack_program(fd)
                elif not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
                    problem = "is not a regular file with a single link"
        except OSError as exc:
            link = exc.errno == errno.ELOOP  # from O_NOFOLLOW
            return None, "is a symbolic link" if link else f"cannot be opened: {exc.strerror}", None
        if not problem and size > output.max_bytes:
            problem = f"has {size} bytes, over the limit of {output.max_bytes}"
        if problem:
            os.close(fd)
            return None, problem, None
        return size, None, content

    def _changes(self) -> Iterator[bytes]:
        room = Room(*self._opening.room)
        for number, mount in enumerate(mount for mount in self._opening.mounts if mount.changes):
            assert mount.tree is not None  # only trees have changes
            yield Entry(Record.ROOT, b"%d" % number).encoded()
            yield from changes(self._files.trees[mount.tree], os.fsencode(mount.sub), room)
        yield Entry(Record.END, b"").encoded()

    def _send_more(self) -> None:
        """Send more of the queued streams, as far as the windows allow, and CLOSED after the last."""
        while self._sending and self._link.pending() < _QUEUED_MAX:
            stream, pieces = self._sending[0]
            if not self._number:
                self._number = self._link.open(stream)
            if self._link.streams.is_open(self._number):  # the host wants all of it
                if not (window := self._link.streams.window(self._number)):
                    return
                with self._environment.platform.reading():
                    while len(self._held) < READ and (more := next(pieces, b"")):
                        self._held += more
                if self._held:
                    count = self._link.streams.send(self._number, self._held[: min(window, READ)])
                    self._held = self._held[count:]
                    continue
                self._link.streams.finish(self._number)
            self._number, self._held = 0, b""
            del self._sending[0]
            if not self._sending and self._closed is not None:
                self._link.send(self._closed)


class IncomingFiles:
    """The input files of a session. Trees are unpacked while they arrive.

    trees: each tree of host files, by the number of its file. work: the tree of the working folder, or None.
    on_disk: whether the other files are on disk, not in memory. ca: the file to mount at SYSTEM_CA, or "".
    """

    def __init__(self, files: list[InputFile], environment: Environment) -> None:
        in_folder = [file.kind == "file" or file.path.startswith(_FOLDER) for file in files]
        self.on_disk = sum(file.size for file, own in zip(files, in_folder, strict=True) if own) > IN_MEMORY_BYTES
        self.trees: dict[int, Tree] = {}
        self.work: Tree | None = None
        self.ca = ""
        self._mounts = environment.platform.namespaces
        self._folder = environment.folder(on_disk=self.on_disk)
        self._files = files
        self._open: dict[int, int | Tree] = {}  # descriptors and trees
        self._left = {number: file.size for number, file in enumerate(files)}
        for number, file in enumerate(files):
            if file.kind == "file":
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._open[number] = os.open(self._path(file), flags, file.mode)
            elif in_folder[number]:
                os.mkdir(self._path(file), 0o755)
                self._open[number] = ProgramTree(self._path(file))
            else:
                in_work = file.path == CWD
                tree = environment.platform.work_tree() if in_work else environment.platform.tree(number)
                self._open[number] = self.trees[number] = tree
                self.work = tree if in_work else self.work

    def _path(self, file: InputFile) -> str:
        name = file.path.removeprefix(_FOLDER)
        if not name or "/" in name or name.startswith("."):
            raise JobError("files", 0, f"invalid path: {file.path}")
        return f"{self._folder}/{name}"

    def write(self, number: int, data: bytes) -> None:
        """Append to file *number*. Raises JobError, OSError."""
        left = self._left.get(number, 0) - len(data)
        if left < 0:
            raise JobError("files", 0, f"file {number} is unknown, or longer than announced")
        self._left[number] = left
        target = self._open[number]
        if isinstance(target, int):
            write_all(target, data)
        else:
            target.write(data)

    def close(self, number: int) -> None:
        """Close a complete file. Raises JobError, OSError."""
        if self._left.pop(number, 1) != 0:
            raise JobError("files", 0, f"file {number} is unknown or incomplete")
        target, file = self._open.pop(number), self._files[number]
        if not isinstance(target, int):
            target.finish()
            return
        if file.path == CA_FILE:
            self._add_system_certificates(target, self._path(file))
        os.close(target)

    def _add_system_certificates(self, fd: int, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), open(SYSTEM_CA, "rb") as system:
            write_all(fd, system.read())
            self.ca = path if self._mounts else ""

    def complete(self) -> bool:
        """Return whether all files have arrived."""
        return not self._left


def _content(fd: int) -> Iterator[bytes]:
    with os.fdopen(fd, "rb", buffering=0) as file:
        while data := file.read(READ):
            yield data
