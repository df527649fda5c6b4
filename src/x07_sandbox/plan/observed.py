"""What was observed of a program, as denials: the policy's field, who held it, and what would allow it.

Pure. What the guest saw comes as bodies of DENIED (docs/guest-channel.md): any text may stand in them.
"""

from __future__ import annotations

import errno
import posixpath
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from x07_sandbox.plan.confinement import names_everything
from x07_sandbox.plan.denials import Denial, HowToAllow
from x07_sandbox.plan.places import OUT, PROGRAM, WRITABLE, inside, place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from x07_sandbox.plan.denials import Area
    from x07_sandbox.policy.model import Policy

PERMISSIONS: Final = "permissions"  # stands for a field where no field decides
SYSTEM_CALLS: Final = "system-calls"
_FDS_MAX: Final = 1024
_TASKS_MAX: Final = 1024
# What ends a program for a limit: the field, what it did, who saw it, and the most that a policy can say.
_LIMITS: Final[dict[str, tuple[str, str, str, Literal["host", "guest"], int]]] = {
    "timeout": ("limits.wall_ms", "run", "for longer", "host", 600_000),
    "cpu-limit": ("limits.cpu_ms", "use", "more processor time", "guest", 600_000),
    "oom": ("limits.mem_bytes", "use", "more memory", "guest", 17_179_869_184),
}
_TASKS: Final = frozenset({"clone", "clone3", "fork", "vfork"})
_EXECUTES: Final = frozenset({"execve", "execveat"})
_PROGRAM_FOLDERS: Final = frozenset({"bin", "sbin", "games", "libexec"})
_SECCOMP: Final = "the guest's seccomp filter"
_LANDLOCK: Final = "the guest's Landlock rules"


def denials(refused: Iterable[Mapping[str, Any]], policy: Policy, areas: Sequence[Area]) -> list[Denial]:
    """What was refused, each once. refused: bodies of DENIED."""
    found: dict[tuple[str, str, str], Denial] = {}
    for body in refused:
        if body["by"] == "seccomp":
            denial = _call(body, policy)
        elif body["errno"] == errno.EMFILE:
            denial = _descriptors(body, policy)
        elif body["call"] in _EXECUTES:
            denial = _execution(body, policy, areas)
        else:
            denial = _file(body, policy, areas)
        key = denial.field, denial.action, denial.subject
        if (before := found.get(key)) is not None:
            denial = msgspec.structs.replace(denial, count=denial.count + before.count)
        found[key] = denial
    return list(found.values())


def more_tasks(policy: Policy, max_live: int | None, count: int) -> Denial:
    """New tasks were refused at the limit. max_live: the policy's, where that is the limit."""
    field, held = ("limits.procs", policy.limits.procs) if max_live is None else ("process.max_live", max_live)
    return _seen(field, "start", "a new task", "the guest's control group", count, _more(field, held, _TASKS_MAX))


def limit_hit(outcome: str, policy: Policy) -> Denial | None:
    """What the program did to end so; None where no limit of the policy ended it."""
    if outcome not in _LIMITS:
        return None
    field, action, what, observer, most = _LIMITS[outcome]
    how = _more(field, int(getattr(policy.limits, field.removeprefix("limits."))), most)
    seen = _seen(field, action, what, "the deadline" if observer == "host" else "the guest's control group", 1, how)
    return msgspec.structs.replace(seen, observed_by=observer)


def disk_full() -> Denial:
    """The scratch disk was full at the end."""
    return _seen("scratch", "write", "the scratch disk (8 GiB) is full", "the size of the disk", 1, None)


def _more(field: str, held: int, most: int) -> HowToAllow | None:
    """A larger number, if a policy can say one."""
    return HowToAllow(json_path=f"$.{field}", value=min(most, max(2 * held, held + 1))) if held < most else None


def _seen(field: str, action: str, subject: str, by: str, count: int, how: HowToAllow | None) -> Denial:
    return Denial(
        field=field,
        action=action,
        subject=subject,
        enforced_by=by,
        observed_by="guest",
        count=count,
        how_to_allow=how,
    )


def _call(body: Mapping[str, Any], policy: Policy) -> Denial:
    """A filter refused the call itself; it knows no arguments."""
    process, count = policy.process, body["count"]
    if body["call"] in _EXECUTES:
        if not process.enabled:
            how = HowToAllow(json_path="$.process.enabled", value=True)
        else:
            how = HowToAllow(json_path="$.process.allow_exec", value=True)
        return _seen("process.allow_exec", "execute", "a program", _SECCOMP, count, how)
    if body["call"] in _TASKS:
        if not (process.enabled and process.allow_spawn):
            what = "a new process" if policy.threads_in_force.enabled else "a new process or thread"
            return _seen("process.allow_spawn", "start", what, _SECCOMP, count, _children(policy))
        if not policy.threads_in_force.enabled:
            how = HowToAllow(json_path="$.threads.enabled", value=True)
            return _seen("threads.enabled", "start", "a new thread", _SECCOMP, count, how)
    return _seen(SYSTEM_CALLS, "call", str(body["call"]), _SECCOMP, count, None)


def _children(policy: Policy) -> HowToAllow:
    name = "allow_spawn" if policy.process.enabled else "enabled"
    return HowToAllow(json_path=f"$.process.{name}", value=True)


def _descriptors(body: Mapping[str, Any], policy: Policy) -> Denial:
    how = _more("limits.fds", policy.limits.fds, _FDS_MAX)
    by = "the guest's resource limits"
    return _seen("limits.fds", "open", "one more descriptor", by, body["count"], how)


def _execution(body: Mapping[str, Any], policy: Policy, areas: Sequence[Area]) -> Denial:
    process, path, count = policy.process, body["path"], body["count"]
    if not _listed(policy) or body["errno"] != errno.EACCES:
        return _seen(PERMISSIONS, "execute", path, "the file's mode", count, None)
    writable = [folder for folder in (*WRITABLE, *(area.at for area in areas if area.write)) if inside(path, folder)]
    if writable:
        # The folder that is there when the program starts: an entry counts for what it finds then.
        prefix = f"{max(writable, key=len)}/"
        how = HowToAllow(json_path="$.process.allow_exec_prefixes", value=[*process.allow_exec_prefixes, prefix])
        return _seen("process.allow_exec_prefixes", "execute", path, "noexec", count, how)
    return _seen("process.allow_execs", "execute", path, _LANDLOCK, count, _on_list(policy, path))


def _on_list(policy: Policy, path: str) -> HowToAllow:
    return HowToAllow(json_path="$.process.allow_execs", value=[*policy.process.allow_execs, path])


def _listed(policy: Policy) -> bool:
    process = policy.process
    return process.enabled and process.allow_exec and not names_everything(process.allow_exec_prefixes)


def _file(body: Mapping[str, Any], policy: Policy, areas: Sequence[Area]) -> Denial:
    path, count = body["path"] or f"({body['call']})", body["count"]
    action = "write" if body["write"] else "read"
    folder = path.rstrip("/") if path.endswith("/") else posixpath.dirname(path)
    area = max((area for area in areas if f"{path}/".startswith(f"{area.at}/")), key=_depth, default=None)
    if action == "read":
        if area is None and _listed(policy) and _PROGRAM_FOLDERS & set(path.split("/")):
            return _seen("process.allow_execs", action, path, _LANDLOCK, count, _on_list(policy, path))
        return _seen(PERMISSIONS, action, path, "the file's mode and owner", count, None)
    if body["errno"] == errno.EPERM or (area is not None and area.write):
        return _seen(PERMISSIONS, body["call"], path, "the file's mode and owner", count, None)
    by = "the guest's mounts"
    if f"{path}/".startswith(f"{OUT}/"):
        how = HowToAllow(json_path=None, value=None, flag="--out DIR")
        return _seen("fs.write_roots", action, path, by, count, how)
    given = folder if area is None else area.given
    if place(given, PROGRAM, deny_hidden=policy.fs.deny_hidden)[0] is None:
        return _seen(PERMISSIONS, action, path, by, count, None)
    return _seen("fs.write_roots", action, path, by, count, root_to_allow(policy, "write_roots", given))


def _depth(area: Area) -> int:
    return area.at.count("/")


def root_to_allow(policy: Policy, name: Literal["read_roots", "write_roots"], given: str) -> HowToAllow:
    """What would make *given* a root."""
    flag = f"--allow-{name.replace('_roots', '-root')} {given}"
    if not policy.fs.enabled:
        return HowToAllow(json_path="$.fs.enabled", value=True, flag=flag)
    return HowToAllow(json_path=f"$.fs.{name}", value=[*getattr(policy.fs, name), given], flag=flag)
