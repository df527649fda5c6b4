"""Rules that decide whether a job may be ended by a process that did not start the job."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from x07_sandbox.host import linux, processes, settings
from x07_sandbox.host.processes import Identity
from x07_sandbox.records.reader import StoredJob

# live: the job's x07 process may still need the job. dead: the job's x07 process is gone. expired: the job's deadline
# has passed. ended: the job is over. kept: this user's x07 cannot use the job's record.
Fate = Literal["live", "dead", "expired", "ended", "kept"]


class Now(NamedTuple):
    """The time, boot and pid namespace for which `judge` decides. alive: tells whether a process in it is alive."""

    boot_id: str
    pid_namespace: str
    boot_ms: int
    alive: Callable[[Identity], bool] = processes.is_alive


class Judgement(NamedTuple):
    """A decision about a job (*fate*), and the reason as a clause about the job."""

    fate: Fate
    why: str


def here_and_now() -> Now:
    """Return the current time, boot and pid namespace. Raises HostError if /proc does not show them."""
    return Now(linux.boot_id(), linux.pid_namespace(), linux.boot_ms())


def judge(stored: StoredJob, now: Now) -> Judgement:
    """Decide whether to end a job. A job whose x07 process is alive is never ended before its deadline."""
    if stored.ended is not None:
        return Judgement("ended", f"its folder contains the file {stored.ended}")
    owner, record = stored.owner, stored.record
    if owner is None or record is None or stored.job is None:
        return Judgement("kept", stored.why)
    if owner.boot_id != now.boot_id:
        return Judgement("dead", "this host was rebooted after the job started")
    # The runner's pid means nothing in another pid namespace, so only the deadline counts there.
    here = owner.pid_namespace == now.pid_namespace
    if here and not now.alive(owner.runner):
        return Judgement("dead", "the x07 process that started it is dead")
    allowed_ms = stored.job.grace_ms + settings.CLEANUP_MS
    if overdue_ms(stored, now) > allowed_ms:
        return Judgement("expired", f"its deadline passed {overdue_ms(stored, now) // 1000} s ago")
    return Judgement("live", f"the x07 process that started it is {'alive' if here else 'in another pid namespace'}")


def overdue_ms(stored: StoredJob, now: Now) -> int:
    """Return the milliseconds since a job's deadline, negative before it. The job must have started in this boot."""
    return 0 if stored.record is None else now.boot_ms - stored.record.deadline_boot_ms


def state_of(stored: StoredJob, now: Now) -> str:
    """Return the job's state as one word, for `x07 ps`."""
    fate = judge(stored, now).fate
    if fate in {"ended", "dead", "expired"}:
        return stored.ended or {"dead": "orphaned"}.get(fate, fate)
    owner = stored.owner
    if fate == "kept" or owner is None:
        return stored.standing
    if not owner.processes:
        return "starting"
    here = owner.pid_namespace == now.pid_namespace
    return "ending" if here and not any(map(now.alive, owner.processes.values())) else "running"
