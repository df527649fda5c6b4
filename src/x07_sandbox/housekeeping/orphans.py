"""Instances of an engine without a record: found by their labels, removed by a strict rule."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.base import HoldsInstances
from x07_sandbox.backends.registry import built
from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.paths import state_dir
from x07_sandbox.host.processes import identify
from x07_sandbox.jobs.record import runner_instance

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from x07_sandbox.housekeeping.sweep import Sweeper

_UNIX_MS: Final = re.compile(r"[0-9]{1,16}")
_ORPHANS_MAX: Final = 4096
_PID_DIGITS: Final = 10


def why_not(labels: Mapping[str, str], *, instance: str, live: Collection[str], now_unix_ms: int) -> str:
    """Return why an instance with these labels stays, "" if it can go. live: the names of live recorded jobs.

    Anyone with access to the engine can set these labels.
    """
    if labels.get("io.x07.schema") != "1":
        return "it has no io.x07.schema label of this version"
    if labels.get("io.x07.runner_instance") != instance:
        return "it belongs to another runner"
    if labels.get("io.x07.job_id") in live or labels.get("io.x07.run_id") in live:
        return "its job is recorded as live"
    deadline = labels.get("io.x07.deadline_unix_ms", "")
    if not _UNIX_MS.fullmatch(deadline):
        return "its deadline label is damaged"
    if now_unix_ms <= int(deadline) + settings.CLEANUP_MS:
        return "its deadline has not passed"
    return ""


def runner_lives(labels: Mapping[str, str]) -> bool:
    """Whether there is a process with the pid in the run's name; the instance then stays."""
    runner = labels.get("io.x07.run_id", "").split("-")[1:2]
    return (
        bool(runner) and runner[0].isdigit() and len(runner[0]) <= _PID_DIGITS and identify(int(runner[0])) is not None
    )


def sweep_orphans(sweeper: Sweeper, live: Collection[str]) -> None:
    """Remove the instances with our labels that can go, from every backend with an engine."""
    instance = runner_instance(state_dir())
    for name in built():
        backend: object = sweeper.backend(name)
        if not isinstance(backend, HoldsInstances):
            continue
        try:
            for orphan in list(backend.orphans())[:_ORPHANS_MAX]:
                called = f"{name}:{orphan.id}"
                if problem := why_not(orphan.labels, instance=instance, live=live, now_unix_ms=unix_ms()):
                    sweeper.kept("instance", called, problem)
                elif runner_lives(orphan.labels):
                    sweeper.kept("instance", called, "its runner may be alive, and its record in another folder")
                elif sweeper.dry_run or backend.remove(orphan):
                    sweeper.removed("instance", called, "it has no record, and its deadline has passed")
                else:
                    sweeper.kept("instance", called, "it was removed, but still exists", failed=True)
        except SandboxError as exc:
            sweeper.kept("instance", name, f"{exc.what}: {exc.why}")
