"""A sandbox: a session that stays open for many commands, from its opening to its result.

runs/RUN/sandbox.json       a SandboxRecord
runs/RUN/commands.jsonl     one line per command that has ended
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import os
import posixpath
import re
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.backends.base import NoAnswerError, Note
from x07_sandbox.channel.messages import DENIED_MAX, FILES, CommandLimits, Exec
from x07_sandbox.errors import Cancelled, Flag, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import open_private_file, replace_file
from x07_sandbox.host.waiting import Notice, unix_ms
from x07_sandbox.options import milliseconds
from x07_sandbox.policy.denials import CONNECTS, NetworkUse
from x07_sandbox.policy.outcomes import Verdict, cancelled_verdict, classify, limit_set_by, verdict
from x07_sandbox.records.admission import FORKS, SANDBOXES
from x07_sandbox.records.runs import SANDBOX, SandboxRecord, new_run_id
from x07_sandbox.sessions.command import AnySandbox, Ended, Process
from x07_sandbox.sessions.denials import Observed, ending_of
from x07_sandbox.sessions.execution import terminal_kind
from x07_sandbox.sessions.job import SessionJob
from x07_sandbox.sessions.request import check_arguments, check_variables, encoded
from x07_sandbox.sessions.result import Changes, CommandReport, Diff, Draft, Result
from x07_sandbox.sessions.run import (
    copy_in,
    described,
    ended_by,
    make_folder,
    planned,
    settle,
    store_result,
    verdict_of,
)
from x07_sandbox.sessions.shared import Life, SharedSession
from x07_sandbox.sessions.specs import Planned, SessionSpec, in_folder, run_plan
from x07_sandbox.sessions.transfers import Backlog, Inbox, Receivers, Unwanted, kept_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from x07_sandbox.backends.base import SnapshotFolder
    from x07_sandbox.files.incoming import Incoming
    from x07_sandbox.policy.denials import Denial
    from x07_sandbox.policy.outcomes import Evidence
    from x07_sandbox.sessions.execution import Execution
    from x07_sandbox.sessions.request import RunCaller, RunRequest
    from x07_sandbox.sessions.result import ChangesChoice
    from x07_sandbox.sessions.session import Session
    from x07_sandbox.sessions.snapshots import Past, SavedSandbox

_DISCARD_S: Final = 5.0  # for the guest to report the ends of commands, if its changes are not wanted
_PATH_MAX: Final = 4095
COMMANDS_KEPT: Final = 10_000  # in a result
_NAME_MAX: Final = 100
CHECKPOINTS_KEPT: Final = 16
_DETACHED_MAX: Final = 32  # detached commands that have ended, with at most 2 MiB of output each
_SERVER_FILES: Final = 64  # open files of the file server
_TIMEOUT: Final = Flag("--timeout")


NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")  # of a sandbox; no id starts with a letter
NAME_RULE: Final = "use up to 64 letters, digits and '_.-', with a letter first"


class OpenSandbox(AnySandbox):
    """A sandbox that this process has opened."""

    def __init__(
        self,
        request: RunRequest,
        caller: RunCaller,
        life: Life,
        snapshot: Path | None = None,
        saved: SavedSandbox | None = None,
    ) -> None:
        """Open a sandbox. Raises SandboxError, whose `result` has the details.

        snapshot: the folder of the snapshot from which it starts, and its description; *request* is that of it then.
        """
        past = None if saved is None else saved.past
        super().__init__(new_run_id() if saved is None or past is None else saved.run)
        self._caller = caller
        self._life = life
        self._stack = contextlib.ExitStack()
        self._log_fd = -1
        self._cancelled_by: int | None = None
        self._logging = threading.Lock()
        self._starting = threading.Lock()
        self._saving = threading.Lock()
        self._finishing = threading.Lock()
        self._commands: dict[int, Process] = {}
        self._detached: dict[int, Process] = {}  # that have ended
        self._reports: list[CommandReport] = []
        self._net = NetworkUse()  # the gate's last account
        self._tried: dict[tuple[str, str], Denial] = {}  # connections that were denied without a gate
        self._net_before: dict[int, NetworkUse] = {}  # that one at the start of each command
        self._memory_peak_bytes = 0
        self._opened_at = time.monotonic()
        self._extended_s: float | None = None  # by the last `extend`
        self._points = itertools.count(1)
        self._checkpoints: dict[int, tuple[SnapshotFolder, contextlib.ExitStack]] = {}
        self._stack.callback(self._drop_checkpoints)
        self._draft = Draft(self.run)
        if past is not None:
            self._life = past.life
            self._reports, self._memory_peak_bytes = [*past.reports], past.memory_peak_bytes
            self._tried = {(one.action, one.subject): one for one in past.tried}
        try:
            self._open(request, snapshot, saved)
        except (SandboxError, OSError, MemoryError) as exc:
            self._stack.close()
            result, error = ended_by(exc, self._draft, caller)
            error.result = result
            raise error from exc
        except BaseException:
            self._stack.close()
            raise

    def _open(self, request: RunRequest, snapshot: Path | None, saved: SavedSandbox | None) -> None:
        stack, caller, past = self._stack, self._caller, None if saved is None else saved.past
        self._folder = make_folder(request, caller, self.run, stack, "sandbox")
        self._log_fd = open_private_file(self._folder.path / "commands.jsonl", os.O_WRONLY | os.O_APPEND)
        stack.callback(self._close_log)
        fork, slots, adopted = None, SANDBOXES, []
        wall_ms = settings.LIFETIME_MAX_S * 1000
        asked: SessionSpec | Planned
        if snapshot is None or saved is None:
            self.prepared = planned(request, None, caller, self._draft, self._folder, stack)

            def describe() -> SessionSpec:
                self._host_files = copy_in(self.prepared, self._draft, self._folder, stack)
                spec = described(self.prepared, None, self._host_files, self._draft, stack)
                return replace(spec, wall_ms=wall_ms)

            asked = run_plan(self.prepared, describe)._replace(wall_ms=wall_ms)
        else:
            self.prepared, self._host_files = saved.reopened(
                request, snapshot, caller, self._draft, self._folder, stack
            )
            changes = None if self._host_files is None else self._host_files.incoming
            asked = replace(saved.spec(Receivers(changes=changes)), wall_ms=wall_ms)
            fork, slots, adopted = saved.fork(snapshot), FORKS, [one.execution() for one in saved.commands]
        numbers = (1 if fork is None else fork.link.last_command + 1, 1) if past is None else past.numbers
        self._numbers, self._instances = map(itertools.count, numbers)
        number = next(self._instances)
        self._limits = self._command_limits(request)

        def progress(text: str) -> None:
            caller.progress(Notice(text))

        self._job = stack.enter_context(
            SessionJob(self.prepared, asked, self._folder, slots, progress, fork and fork._replace(number=number))
        )
        if past is not None and past.net is not None:
            self._job.before.append(past.net)
        self._loop = self._opened_session(adopted)
        self._spec = self._job.spec
        self._opened_at, self._opened_unix_ms = time.monotonic(), unix_ms() if past is None else past.opened_unix_ms
        left_s = self._life.lifetime_s if past is None else past.left_s
        until_s = self._opened_at + left_s
        self.session = SharedSession(self._loop, until_s, self._life.idle_s, self._on_end)
        self._adopt(adopted)
        self.session.begin()
        self._write_record(left_s)
        atexit.register(self._at_exit)

    def _drop_checkpoints(self) -> None:
        for _, stack in self._checkpoints.values():
            stack.close()

    def _write_record(self, left_s: float, paused: str = "") -> None:
        """Write the record of the sandbox. left_s: seconds until its lifetime ends."""
        record = SandboxRecord(
            name=self._life.name,
            tags=dict(self._life.tags),
            opened_unix_ms=self._opened_unix_ms,
            until_unix_ms=unix_ms() + round(left_s * 1000),
            backend=self._draft.result.backend or "",
            image=self._draft.result.digests.image,
            left_out=tuple(one for one in self._draft.result.denials if one.action == "copy"),
            forked_from=self._draft.result.forked_from or "",
            paused=paused,
        )
        replace_file(self._folder.path / SANDBOX, msgspec.json.encode(record))

    @property
    def running(self) -> int:
        """How many commands run."""
        return sum(not command.ended for command in [*self._commands.values()])

    def _close_log(self) -> None:
        with self._logging:
            os.close(self._log_fd)
            self._log_fd = -1

    def _opened_session(self, adopted: list[Execution]) -> Session:
        try:
            return self._job.open(adopted)
        except NoAnswerError as exc:
            if exc.failure.kind != "cancelled":
                raise
            cancelled = Cancelled("the sandbox was not opened", "it was cancelled", "Open it again")
            cancelled.signal = self._caller.cancel.signal
            raise cancelled from exc

    def _command_limits(self, request: RunRequest) -> CommandLimits:
        """Return the limits of each command, and set the default of its time.

        Those of the built-in policy on time do not apply, since it is made for programs that run once.
        """
        limits, changed = self.prepared.plan.limits, () if request.limits is None else request.limits.given()
        named = request.policy is not None
        self._wall_ms = limits.wall_ms if named or "wall_ms" in changed else None
        given: CommandLimits = limits.for_guest()
        if named or "cpu_ms" in changed:
            return given
        return given._replace(cpu_ms=settings.LIFETIME_MAX_S * 1000)

    # commands

    @property
    def cwd(self) -> str:
        """The working folder of the sandbox."""
        return self._spec.order.cwd

    def start(self, asked: Exec, timeout_s: float | None = None, term: str = "") -> Process:
        """See `AnySandbox.start`."""
        service = asked.service
        if not service and not asked.argv:
            raise UsageError("cannot run the command", "it has no words", "Name a program")
        if not service:
            checked = replace(self.prepared.request, command=tuple(asked.argv), args=(), env=asked.env)
            check_arguments(checked)
            check_variables(checked, self.prepared.policy.policy)
        cwd = posixpath.normpath(posixpath.join(self.cwd, asked.cwd))
        what = "cannot use the folder of the command"
        if "\0" in cwd or len(encoded(cwd, what, "its path")) > _PATH_MAX:
            why = f"it contains a NUL byte, or is longer than {_PATH_MAX} bytes"
            raise UsageError(what, why, "Use another folder")
        for command in [*self._commands.values()]:
            if command.ended and command.execution.order.detached:  # perhaps nobody asks for its end
                command.ending()
        asked_ms = None if timeout_s is None else milliseconds(timeout_s)
        limits_ms = [] if service else [limit for limit in (self._wall_ms, asked_ms) if limit is not None]
        wall_ms = min(limits_ms, default=None)
        kind = {} if asked.terminal is None else {"TERM": term or terminal_kind()}
        limits = self._limits._replace(fds=_SERVER_FILES) if service == FILES else self._limits
        given = asked._replace(
            argv=in_folder(asked.argv, cwd), env={**kind, **self._spec.order.env, **asked.env}, cwd=cwd, limits=limits
        )
        with self._starting:
            self.require_open()
            number = next(self._numbers)
            with self.session.using() as session:
                streams = kept_streams(Backlog if asked.detached else Inbox, open_input=not asked.detached)
                execution = session.execute(given._replace(id=number), streams, wall_ms)
            command = Process(self, execution, wall_ms, self._caller.word)
            if not service:
                self._commands[number] = command
                self._net_before[number] = self._net
        return command

    def command(self, number: int) -> Process | None:
        """See `AnySandbox.command`."""
        return self._commands.get(number) or self._detached.get(number)

    def at_end(self, call: Callable[[], object]) -> None:
        """See `AnySandbox.at_end`."""
        with self._starting:
            self.require_open()
            self._job.at_end(call)

    def extend(self, lifetime_s: float) -> None:
        """See `AnySandbox.extend`."""
        self.require_open()
        most_s = self._opened_at + settings.LIFETIME_MAX_S - time.monotonic()
        self._extended_s = min(lifetime_s, round(most_s, 1))
        self.session.extend(time.monotonic() + self._extended_s)
        with contextlib.suppress(OSError):  # such as a full disk; only `x07 ps` shows this time
            self._write_record(self._extended_s)

    @contextlib.contextmanager
    def saved(self, forks: int = 0) -> Iterator[SnapshotFolder]:
        """Save the sandbox in a folder that is removed at the end of the context. See `save`."""
        from x07_sandbox.sessions.snapshots import require_snapshots  # few sandboxes are saved

        with require_snapshots(self.prepared).folder() as place:
            self.save(place.path, forks)
            yield place

    def snapshot(self, name: str) -> str:
        """See `AnySandbox.snapshot`."""
        with self.saved() as place:
            return self._kept(place, "kept", name).id

    def _kept(self, place: SnapshotFolder, keep: Literal["kept", "paused", "open"], name: str = "") -> Note:
        """Keep a snapshot of this sandbox."""
        from x07_sandbox.sessions.snapshots import read, require_snapshots  # as above

        note = Note(
            id=os.urandom(6).hex(),
            name=name,
            sandbox=self.run,
            folder=str(self._folder.path),
            created_unix_ms=unix_ms(),
            keep=keep,
        )
        backend, kind = require_snapshots(self.prepared), self._spec.kind(self.prepared.image)
        if keep != "open":  # its VM may be gone when a fork starts
            backend.prove(read(place.path).fork(place.path), kind)
        for remark in place.keep(note, kind):
            self._caller.progress(Notice(remark))
        return note

    def checkpoint(self) -> int:
        """See `AnySandbox.checkpoint`."""
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(self.saved())
            self._kept(place, "open")
            with self._starting:
                self.require_open()
                number = next(self._points)
                self._checkpoints[number] = place, stack.pop_all()
                for old in [*self._checkpoints][:-CHECKPOINTS_KEPT]:
                    self._checkpoints.pop(old)[1].close()
        return number

    def rollback(self, point: int) -> None:
        """See `AnySandbox.rollback`."""
        from x07_sandbox.sessions import snapshots  # as above

        with self._saving:
            self.require_open()
            if point not in self._checkpoints:
                kept = ", ".join(map(str, self._checkpoints)) or "none"
                why = f"there is none of this number (kept: {kept})"
                raise UsageError(
                    f"cannot go back to checkpoint {point}", why, "Use one that is kept", code="no-checkpoint"
                )
            folder = self._checkpoints[point][0].path
            saved = snapshots.read(folder)
            fork, adopted = saved.fork(folder), [one.execution() for one in saved.commands]

            def switch(loop: Session) -> None:
                with self.session.using():
                    self.require_open()  # it may have ended meanwhile
                    self._loop.leave(fork.link.last_command)
                    self._loop = loop
                    self.session.replace(loop)
                    self._adopt(adopted)

            with self._starting:
                self.require_open()
                self._job.replace(fork._replace(number=next(self._instances)), adopted, switch)

    def _adopt(self, adopted: Sequence[Execution]) -> None:
        for execution in adopted:
            if not execution.order.service:
                command = Process(self, execution, execution.wall_ms, self._caller.word)
                self._commands[command.id], self._net_before[command.id] = command, self._net

    def put_away(self) -> None:
        """Save the sandbox for `AnySandbox.pause`, and end without a result. Raises SandboxError."""
        from x07_sandbox.sessions.snapshots import require_snapshots  # as above

        with self._finishing, contextlib.ExitStack() as unless_paused:
            self.require_open()
            if self._host_files is not None:
                unless_paused.callback(self._host_files.forget_at_pause)
                self._host_files.save_at_pause(self._receive_changes)
            backend, left_s = require_snapshots(self.prepared), self.session.until_s - time.monotonic()
            with backend.folder() as place:
                self.save(place.path, past=partial(self._past, left_s))
                try:
                    self._write_record(left_s, paused=self._kept(place, "paused").id)
                except BaseException:
                    with self.session.using():
                        self._loop.go_on()
                    raise
            unless_paused.pop_all()
            with self.session.using():
                self._loop.end()
            self.session.end()
            if self._host_files is not None:
                self._host_files.forget()
            self._job.end(self._loop.evidence())
            self._stack.close()
            atexit.unregister(self._at_exit)

    def _past(self, left_s: float) -> Past:
        from x07_sandbox.sessions.snapshots import Past  # as above

        return Past(
            reports=tuple(self._reports),
            net=self._job.connections(),
            tried=tuple(self._tried.values()),
            memory_peak_bytes=self._memory_peak_bytes,
            opened_unix_ms=self._opened_unix_ms,
            life=self._life,
            left_s=left_s,
            numbers=(next(self._numbers), next(self._instances)),
        )

    def save(self, folder: Path, forks: int = 0, past: Callable[[], Past] | None = None) -> None:
        """Save the sandbox in an empty private folder, from which forks can start. It goes on.

        forks: for how many forks there must be room in memory. past: returns what the sandbox must know to go on from
        there itself; its programs stay held then. Raises SandboxError.
        """
        from x07_sandbox.sessions import snapshots  # few sandboxes are saved

        snapshots.require_slots(forks)
        with self._saving:
            self.require_open()
            files = None if self._host_files is None else self._host_files.saved(folder)
            saved = snapshots.saved_sandbox(self.run, self.prepared, self._spec, self.left_out, files)
            kind, backend = self._spec.kind(self.prepared.image), snapshots.require_snapshots(self.prepared)
            with backend.capture(self._job.instance, kind, folder) as capture:
                snapshots.require_room(forks, capture.ram_bytes)
                with self._starting:
                    self.require_open()
                    with self.session.using():
                        try:
                            self._loop.hold()
                            link, commands = self._loop.unended()
                            capture.take()
                            left = tuple(snapshots.SavedCommand.of(one) for one in commands)
                            saved = replace(saved, link=link, commands=left)
                            if past is not None:
                                snapshots.write(replace(saved, past=past()), folder)
                        except BaseException:
                            self._loop.go_on()
                            raise
                        if past is None:
                            self._loop.go_on()
            if past is None:
                snapshots.write(saved, folder)

    def changes(self) -> Diff:
        """See `AnySandbox.changes`."""
        self.require_open()
        running, host_files = self.running > 0, self._host_files
        if host_files is None or host_files.incoming is None:
            return Diff(changes=Changes(), patch=b"", running=running)
        with host_files.received(self._receive_changes) as saved:
            from x07_sandbox.sessions.patches import diff_of  # few sandboxes are asked

            return replace(diff_of(saved), running=running or self.running > 0)

    def _receive_changes(self, incoming: Incoming) -> None:
        with self.session.using():
            arrival = self._loop.changes(incoming)
        if not self.session.until(lambda: arrival.ended):
            raise self.gone()

    # ends of commands

    def ending(self, command: Process) -> Ended:
        """See `AnySandbox.ending`. Keeps the report about the command."""
        execution = command.execution
        with self.session.using():
            facts = self._loop.facts(execution)
        shown = self._spec.limits_shown
        if command.wall_ms is not None:
            shown = replace(shown, wall_ms=command.wall_ms)
        features = self.prepared.availability.features
        found = classify(facts.evidence, features=features, limits=shown)
        if found.outcome == "timeout" and command.wall_ms != self._wall_ms:
            found = limit_set_by(found, option=_TIMEOUT)
        net = self._denied_since(command)
        seen = Observed(execution.order, facts, net, command.tail())
        ending, denials, hints, _ = ending_of(found, seen, self.prepared, self._spec)
        if net is None:
            self._note_connections(denials)
        report = CommandReport(
            id=execution.order.id,
            name=_shown(execution.order.argv[:1]),
            argv_sha256=_digest(execution),
            outcome=ending.outcome,
            exit_code=ending.exit_code,
            signal=ending.signal,
            began_ms=round((command.began_at - self._opened_at) * 1000, 1),
            wall_ms=round(facts.times_ms.get("exited", facts.times_ms["end"]) - self._since_release(command), 1),
            cpu_ms=0.0 if facts.exited is None else facts.exited.cpu_us / 1000,
        )
        peak = 0 if facts.exited is None else facts.exited.memory_peak_bytes
        self._keep(report, peak)
        if execution.order.detached:  # for clients that come later
            self._detached[report.id] = command
            for number in [*self._detached][:-_DETACHED_MAX]:
                del self._detached[number]
        return Ended(
            id=report.id,
            outcome=ending.outcome,
            reason_code=ending.code,
            reason=ending.reason_for(command.word),
            x07_exit_code=ending.x07_exit_code,
            exit_code=ending.exit_code,
            signal=ending.signal,
            wall_ms=report.wall_ms,
            cpu_ms=report.cpu_ms,
            memory_peak_bytes=peak,
            denials=tuple(denials),
            hints=tuple(hints),
        )

    def _keep(self, report: CommandReport, memory_peak_bytes: int) -> None:
        """Keep the report about a command that has ended."""
        self._commands.pop(report.id, None)
        self._net_before.pop(report.id, None)
        self._memory_peak_bytes = max(self._memory_peak_bytes, memory_peak_bytes)
        if len(self._reports) < COMMANDS_KEPT:
            self._reports.append(report)
        with self._logging, contextlib.suppress(OSError):  # such as a full disk; the result has it too
            if self._log_fd >= 0:
                os.write(self._log_fd, msgspec.json.encode(report) + b"\n")

    def _denied_since(self, command: Process) -> NetworkUse | None:
        """Return what the gate has denied since the last command ended before this one started; None without a gate.

        The gate does not know commands. So these are the connections of this command, and of all that ran beside it.
        """
        if (now := self._job.connections()) is None:
            return None
        from x07_sandbox.sessions.egress import new_denials

        before, self._net = self._net_before.get(command.id, NetworkUse()), now
        return new_denials(now, before)

    def _note_connections(self, denials: Sequence[Denial]) -> None:
        """Keep what a command without connections tried, for the result, as the gate does for others."""
        for one in denials:
            key = one.action, one.subject
            if one.action in CONNECTS and (key in self._tried or len(self._tried) < DENIED_MAX):
                count = one.count + (self._tried[key].count if key in self._tried else 0)
                self._tried[key] = replace(one, count=count)

    def _since_release(self, command: Process) -> float:
        return (command.began_at - self._job.instance.greeting.released_at) * 1000

    # the end

    def finish(self, choice: ChangesChoice, cancelled_by: int | None = None) -> Result:
        """See `AnySandbox.finish`. cancelled_by: the signal that ends it, if nobody has closed it."""
        with self._finishing:
            if self.result is None:
                self.session.end()
                self._cancelled_by = cancelled_by
                self._finish(self.session.why or "closed", choice)
            assert self.result is not None
            return self.result

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self.finish("keep")

    def _on_end(self, why: str) -> None:
        """Finish in the thread of the loop, unless another thread does so."""
        if self._finishing.acquire(blocking=False):
            try:
                if self.result is None:
                    self._finish(why, "keep")
            finally:
                self._finishing.release()

    def _finish(self, why: str, choice: ChangesChoice) -> None:
        draft = self._draft
        try:
            with self._saving, self._stack:
                self._close(why, choice)
                store_result(self._folder.path, draft.result)
        except (SandboxError, OSError, MemoryError) as exc:
            draft.result, _ = ended_by(exc, draft, self._caller)
        self.result = draft.result
        atexit.unregister(self._at_exit)

    def _close(self, why: str, choice: ChangesChoice) -> None:
        draft, job, host_files, discards = self._draft, self._job, self._host_files, choice == "discard"
        receivers = Receivers(changes=Unwanted() if host_files is None or discards else host_files.incoming)
        within_s = _DISCARD_S if discards else settings.CHANGES_OUT_S
        with self.session.using():
            closed = self._loop.close(receivers, within_s)
        if closed is None and not discards and why == "closed":
            why = "lost"
        evidence = self._loop.evidence()
        for command in list(self._commands.values()):
            command.ending()
        evidence, net = job.end(evidence)
        ending, released_at = self._verdict(why, evidence), job.instance.greeting.released_at
        times_s = {"opened": self._opened_at - released_at, "end": time.monotonic() - released_at}
        report = job.report(
            ending,
            self._caller.word,
            job.instance.greeting.times_ms | {name: round(at * 1000, 1) for name, at in times_s.items()},
            cpu_ms=round(sum(one.cpu_ms for one in self._reports)),
            memory_peak_bytes=self._memory_peak_bytes,
        )
        denied, lost = [*self._tried.values()], 0
        if net is not None and net.denied and self.prepared.egress is not None:
            from x07_sandbox.sessions.egress import denials as denied_connections

            denied, lost = denied_connections(net, self.prepared.egress.allowlist)
        draft.deny(*denied)
        draft.set_phase("run", report)
        draft.set(denials_lost=lost, jail=job.instance.jail, net=net, commands=tuple(self._reports))
        draft.warn(*job.warnings)
        why_kept = "" if ending.code == "closed" else ending.reason_for(self._caller.word)
        settle(draft, host_files, choice, why_kept, ending, self._caller.word)

    def _verdict(self, why: str, evidence: Evidence) -> Verdict:
        if self.session.problem is not None:
            return verdict_of(self.session.problem)
        if why == "lost" or evidence.gate_lost or evidence.cancelled_by is not None or evidence.channel_error:
            return classify(evidence, features=self.prepared.availability.features)
        if why == "closed" and self._cancelled_by is not None:
            return cancelled_verdict(self._cancelled_by)
        if why == "closed":
            return replace(verdict("ok", "closed"), exit_code=0)
        seconds, facts = self._life.idle_s if why == "idle" else self._life.lifetime_s, {}
        if why == "expired" and self._extended_s is not None:
            seconds, facts = self._extended_s, {"event": "it was extended"}
        return verdict("timeout", why, {"limit": f"{seconds:g} s"} | facts)


def _shown(argv: list[str]) -> str:
    """Return the first word of a command for a document, at most _NAME_MAX characters of it."""
    return os.fsencode("".join(argv)).decode("utf-8", "backslashreplace")[:_NAME_MAX]


def _digest(execution: Execution) -> str:
    words = b"".join(os.fsencode(word) + b"\0" for word in execution.order.argv)
    return f"sha256:{hashlib.sha256(words).hexdigest()}"
