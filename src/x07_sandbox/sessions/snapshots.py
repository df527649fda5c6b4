"""Snapshots of sandboxes: what a fork needs to know beside the files that the backend saves.

FOLDER/sandbox    a pickled `SavedSandbox`

The folder is private to the user, who may run any code anyway, so unpickling what is in it gives nothing away.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.backends.base import Fork
from x07_sandbox.channel.link import Link
from x07_sandbox.errors import RefusedError, SandboxError
from x07_sandbox.host.linux import spare_bytes
from x07_sandbox.host.paths import raised_as
from x07_sandbox.host.settings import MIB, __version__
from x07_sandbox.policy.outcomes import Stage
from x07_sandbox.records.admission import FORKS
from x07_sandbox.sessions.execution import Execution
from x07_sandbox.sessions.prepare import prepare
from x07_sandbox.sessions.transfers import Backlog, Receivers, kept_streams

if TYPE_CHECKING:
    import contextlib

    from x07_sandbox.backends.base import Snapshots
    from x07_sandbox.channel.link import LinkState
    from x07_sandbox.channel.messages import Exec
    from x07_sandbox.policy.controls import Plan
    from x07_sandbox.policy.denials import Denial, NetworkUse
    from x07_sandbox.policy.model import EffectivePolicy
    from x07_sandbox.sessions.host_files import HostFiles
    from x07_sandbox.sessions.prepare import Prepared
    from x07_sandbox.sessions.request import RunCaller, RunRequest
    from x07_sandbox.sessions.result import CommandReport, Draft
    from x07_sandbox.sessions.shared import Life
    from x07_sandbox.sessions.specs import SessionSpec
    from x07_sandbox.sessions.transfers import RunFolder

FILE: Final = "sandbox"
_WHAT: Final = "cannot use the snapshot"
_AGAIN: Final = "Take another snapshot"
_FORK_BYTES: Final = 64 * MIB  # of a fork's process, beside the pages that differ from those of the snapshot


class SavedCommand(NamedTuple):
    """A command of the sandbox. left_ms: of its time limit. stopping: whether it was to be killed."""

    order: Exec
    running: bool
    left_ms: int | None
    open_input: bool
    stopping: bool

    @staticmethod
    def of(execution: Execution) -> SavedCommand:
        """Return the command of an execution that has not ended."""
        left_ms = None if execution.limit is None else round(execution.limit.left_s() * 1000)
        open_input = execution.streams.open_input and not execution.input_done
        running = execution.stage is Stage.RUN
        return SavedCommand(execution.order, running, left_ms, open_input, execution.asked_to_stop)

    def execution(self) -> Execution:
        """Return the same command in a fork, which is a detached one there."""
        streams = kept_streams(Backlog, open_input=self.open_input)
        execution = Execution(self.order._replace(detached=True), streams, self.left_ms)
        execution.asked_to_stop = self.stopping
        if self.running:
            execution.times_ms["started"] = 0.0
            execution.started()
        return execution


class Past(NamedTuple):
    """What has happened in a sandbox that was paused. left_s: of its lifetime.

    numbers: of the next command and the next machine.
    """

    reports: tuple[CommandReport, ...]
    net: NetworkUse | None
    tried: dict[tuple[str, str], Denial]
    memory_peak_bytes: int
    opened_unix_ms: int
    life: Life
    left_s: float
    numbers: tuple[int, int]


class SavedSandbox(NamedTuple):
    """A sandbox whose VM is in a snapshot. key: see `Snapshots.key`. run: its id. host_files: of `HostFiles.kept`.

    past: if the sandbox itself goes on from it.
    """

    version: str
    backend: str
    key: str
    run: str
    request: RunRequest
    policy: EffectivePolicy
    plan: Plan
    spec: SessionSpec
    left_out: tuple[Denial, ...]
    host_files: dict[str, Any] | None
    link: LinkState | None = None
    commands: tuple[SavedCommand, ...] = ()
    past: Past | None = None

    def fork(self, folder: Path) -> Fork:
        """Return what the backend needs to know about a snapshot in *folder*."""
        assert self.link is not None  # it was held
        return Fork(folder, Link.resumed(self.link))

    def reopened(
        self,
        request: RunRequest,
        folder: Path,
        caller: RunCaller,
        draft: Draft,
        own: RunFolder,
        stack: contextlib.ExitStack,
    ) -> tuple[Prepared, HostFiles | None]:
        """Return the prepared request of a fork, and its host files. Raises SandboxError.

        request: that of the sandbox, with the fork's own time to wait. own: the folder of its run.
        """
        prepared = prepare(request, None, replace(caller, policy=self.policy), draft, stack)
        prepared = replace(prepared, plan=self.plan)
        snapshots = require_snapshots(prepared)
        if self.key != snapshots.key(self.spec.kind(prepared.image)):
            why = "it was taken with another image, another QEMU or on another processor"
            raise RefusedError(_WHAT, why, _AGAIN, code="snapshot-outdated")
        draft.set(limits=self.plan.limits.of_policy(), forked_from=None if self.past else self.run)
        draft.deny(*self.left_out)
        if self.host_files is None:
            return prepared, None
        from x07_sandbox.sessions.host_files import HostFiles  # as in other sandboxes, only for those with files

        return prepared, HostFiles(prepared, own, stack, (self.host_files, folder))


def saved_sandbox(
    run: str, prepared: Prepared, spec: SessionSpec, left_out: tuple[Denial, ...], host_files: dict[str, Any] | None
) -> SavedSandbox:
    """Return what is known about a sandbox before its VM is held. left_out: see `AnySandbox.left_out`."""
    return SavedSandbox(
        version=__version__,
        backend=prepared.backend.name,
        key=require_snapshots(prepared).key(spec.kind(prepared.image)),
        run=run,
        request=prepared.request,
        policy=prepared.policy._replace(denied=dict(prepared.policy.denied)),
        plan=prepared.plan,
        spec=replace(spec, files=(), receivers=Receivers()),
        left_out=left_out,
        host_files=host_files,
    )


def require_snapshots(prepared: Prepared) -> Snapshots:
    """Return the backend's support for snapshots. Raises RefusedError if it has none."""
    if (found := prepared.backend.snapshots) is None:
        why = f"the backend {prepared.backend.name} cannot save a running sandbox"
        raise RefusedError("cannot take a snapshot", why, "Use the backend qemu", code="no-snapshots")
    return found


def require_slots(count: int) -> None:
    """Raise RefusedError if *count* forks could never be open at once: each would wait for the others."""
    if count > (most := FORKS.count()):
        why, fix = f"{count} were asked for, and {most} may be open at once", "Make fewer, or set X07_VM_MAX_FORKS"
        raise RefusedError("cannot fork the sandbox", why, fix, code="no-slot")


def require_room(count: int, ram_bytes: int) -> None:
    """Raise RefusedError if *count* forks of a VM that has written ram_bytes would not fit into the free memory."""
    each, spare = ram_bytes + _FORK_BYTES, spare_bytes()
    if count * each > spare:
        why = f"{count} would take about {each // MIB} MiB of memory each, and {spare // MIB} MiB are free"
        raise RefusedError("cannot fork the sandbox", why, "Make fewer forks at once", code="no-memory")


def write(saved: SavedSandbox, folder: Path) -> None:
    """Write the description of a sandbox into the folder of its snapshot. Raises SandboxError."""
    with raised_as(SandboxError, "cannot take a snapshot of the sandbox", "Free disk space"):
        fd = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            pickle.dump(saved, file)


def read(folder: Path) -> SavedSandbox:
    """Return the description of a sandbox from the folder of its snapshot. Raises SandboxError."""
    try:
        with (folder / FILE).open("rb") as file:
            saved = pickle.load(file)  # noqa: S301 - written by this user's own process
    except FileNotFoundError as exc:
        raise RefusedError(_WHAT, "it was removed", _AGAIN, code="no-such-snapshot") from exc
    except Exception as exc:  # any error of a pickle of other code
        raise RefusedError(
            _WHAT, "another version of x07-sandbox has taken it", _AGAIN, code="snapshot-outdated"
        ) from exc
    if not isinstance(saved, SavedSandbox) or saved.version != __version__:
        raise RefusedError(_WHAT, "another version of x07-sandbox has taken it", _AGAIN, code="snapshot-outdated")
    return saved
