"""Snapshots of sandboxes: what a fork needs to know beside the files that the backend saves.

FOLDER/sandbox.json    a `SavedSandbox`
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec
from msgspec.structs import asdict, replace

from x07_sandbox.backends.base import Fork, RootPlace
from x07_sandbox.channel.link import Link, LinkState
from x07_sandbox.channel.messages import PROTOCOL, Exec, Open
from x07_sandbox.errors import RefusedError, SandboxError, UsageError
from x07_sandbox.host.documents import prepared as model
from x07_sandbox.host.linux import spare_bytes
from x07_sandbox.host.paths import raised_as, read_bounded, replace_file
from x07_sandbox.host.settings import MIB
from x07_sandbox.policy.changes import LimitChanges, Overrides
from x07_sandbox.policy.controls import RunLimits
from x07_sandbox.policy.denials import Denial, GuestMount, NetworkUse
from x07_sandbox.policy.model import EffectivePolicy
from x07_sandbox.policy.outcomes import Stage
from x07_sandbox.records.admission import FORKS
from x07_sandbox.sessions.execution import Execution
from x07_sandbox.sessions.host_files import SavedFiles
from x07_sandbox.sessions.prepare import prepare
from x07_sandbox.sessions.request import ProjectPolicy, RunRequest
from x07_sandbox.sessions.result import CommandReport
from x07_sandbox.sessions.shared import Life
from x07_sandbox.sessions.specs import SessionSpec
from x07_sandbox.sessions.transfers import Backlog, Receivers, kept_streams

if TYPE_CHECKING:
    import contextlib

    from x07_sandbox.backends.base import Snapshots
    from x07_sandbox.sessions.host_files import HostFiles
    from x07_sandbox.sessions.prepare import Prepared
    from x07_sandbox.sessions.request import RunCaller
    from x07_sandbox.sessions.result import Draft
    from x07_sandbox.sessions.transfers import RunFolder

FILE: Final = "sandbox.json"
SCHEMA: Final = "x07.sandbox.snapshot-of-sandbox@0.1.0"
OUTDATED: Final = "snapshot-outdated"
_WHAT: Final = "cannot use the snapshot"
_AGAIN: Final = "Take another snapshot"
_FILE_MAX: Final = 1 << 30
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

    tried: the connections that were denied without a gate. numbers: of the next command and the next machine.
    """

    reports: tuple[CommandReport, ...]
    net: NetworkUse | None
    tried: tuple[Denial, ...]
    memory_peak_bytes: int
    opened_unix_ms: int
    life: Life
    left_s: float
    numbers: tuple[int, int]


class SavedRequest(RunRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request for a sandbox. policy: a path or `built-in:TEMPLATE`; for a policy that was given as such, its id."""

    policy: str | None = None
    input: None = None
    overrides: Overrides | None = None
    limits: LimitChanges | None = None

    @staticmethod
    def of(request: RunRequest) -> SavedRequest:
        """Return the same request."""
        policy = request.policy
        if not (policy is None or isinstance(policy, str | Path | ProjectPolicy)):
            policy = f"policy {policy.policy_id}"
        return SavedRequest(**{**asdict(request), "policy": policy and str(policy), "input": None})


class SavedSandbox(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sandbox whose VM is in a snapshot.

    protocol: that of its guest. image: the digest of its image, or "". key: see `Snapshots.key`. run: its id.
    limits: of its plan. opening, order, places, areas: see `SessionSpec`. files: of its host files.
    past: if the sandbox itself goes on from it.
    """

    schema_version: Literal["x07.sandbox.snapshot-of-sandbox@0.1.0"] = SCHEMA
    protocol: int = PROTOCOL
    backend: str
    image: str
    key: str
    run: str
    request: SavedRequest
    policy: EffectivePolicy
    limits: RunLimits
    opening: Open
    order: Exec
    places: tuple[RootPlace, ...]
    areas: tuple[GuestMount, ...]
    left_out: tuple[Denial, ...]
    files: SavedFiles | None
    link: LinkState | None = None
    commands: tuple[SavedCommand, ...] = ()
    past: Past | None = None

    def spec(self, receivers: Receivers) -> SessionSpec:
        """Return the description of the session. Its guest has the files already."""
        return SessionSpec(
            name="run",
            opening=self.opening,
            order=self.order,
            files=(),
            receivers=receivers,
            wall_ms=0,
            ram_bytes=self.limits.ram_bytes,
            places=self.places,
            areas=self.areas,
            limits_shown=self.limits,
        )

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
        pinned = replace(request, image=self.image or None)  # its name may stand for another one now
        prepared = prepare(pinned, None, replace(caller, policy=self.policy), draft, stack)
        prepared = replace(prepared, request=request, plan=replace(prepared.plan, limits=self.limits))
        snapshots = require_snapshots(prepared)
        if self.key != snapshots.key(self.spec(Receivers()).kind(prepared.image)):
            raise RefusedError(
                _WHAT, "it was taken with another QEMU, or on another processor", _AGAIN, code="snapshot-outdated"
            )
        draft.set(limits=self.limits.of_policy(), forked_from=None if self.past else self.run)
        draft.deny(*self.left_out)
        if self.files is None:
            return prepared, None
        from x07_sandbox.sessions.host_files import HostFiles

        return prepared, HostFiles(prepared, own, stack, (self.files, folder))


def saved_sandbox(
    run: str, prepared: Prepared, spec: SessionSpec, left_out: tuple[Denial, ...], files: SavedFiles | None
) -> SavedSandbox:
    """Return what is known about a sandbox before its VM is held. left_out: see `AnySandbox.left_out`."""
    return SavedSandbox(
        backend=prepared.backend.name,
        image="" if prepared.image is None else prepared.image.manifest.digest,
        key=require_snapshots(prepared).key(spec.kind(prepared.image)),
        run=run,
        request=SavedRequest.of(prepared.request),
        policy=prepared.policy,
        limits=prepared.plan.limits,
        opening=spec.opening,
        order=spec.order,
        places=spec.places,
        areas=spec.areas,
        left_out=left_out,
        files=files,
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
    # Not by msgspec alone, which refuses names of files that are not UTF-8.
    data = json.dumps(msgspec.to_builtins(saved, str_keys=True, enc_hook=_plain)).encode("ascii")
    with raised_as(SandboxError, "cannot take a snapshot of the sandbox", "Free disk space"):
        replace_file(folder / FILE, data)


def read(folder: Path) -> SavedSandbox:
    """Return the description of a sandbox from the folder of its snapshot. Raises SandboxError."""
    if not os.path.lexists(folder):
        raise RefusedError(_WHAT, "it was removed", _AGAIN, code="no-such-snapshot")
    other = RefusedError(_WHAT, "another version of x07-sandbox has taken it", _AGAIN, code="snapshot-outdated")
    try:
        found = json.loads(read_bounded(folder / FILE, "description", _FILE_MAX))
        if not isinstance(found, dict) or (found.get("schema_version"), found.get("protocol")) != (SCHEMA, PROTOCOL):
            raise other
        return msgspec.convert(found, model(SavedSandbox), str_keys=True, dec_hook=_typed)
    except UsageError as exc:  # such as the pickle of an early version, which had another name
        raise other from exc
    except (ValueError, RecursionError) as exc:  # json.JSONDecodeError, msgspec.ValidationError
        raise RefusedError(_WHAT, f"its description is damaged ({exc})", _AGAIN, code="snapshot-outdated") from exc


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)  # else a Path


def _typed(kind: type[Any], value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise ValueError(f"{value!a} is no path")
    return Path(value)
