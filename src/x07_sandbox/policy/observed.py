"""Denials observed in a run: the policy field, what enforced it, and advice on how to allow the action.

The guest reports denials in bodies of DENIED (docs/guest-channel.md), which are hostile data.
"""

import errno
import posixpath
import shlex
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from x07_sandbox.channel.messages import OUT, Denied
from x07_sandbox.host.documents import prepared
from x07_sandbox.policy.changes import NAMES, FlagReach
from x07_sandbox.policy.decode import rule_problems
from x07_sandbox.policy.denials import STARTS, Denial, GuestMount, HowToAllow
from x07_sandbox.policy.guest import WRITABLE, confinement, guest_path, is_below
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.schema import largest

PERMISSIONS: Final = "permissions"  # in place of a field if no field controls it
SYSTEM_CALLS: Final = "system-calls"
OUTPUT: Final = "output"
NETWORK: Final = "network"  # in `Denied.by`
_COUNT_MAX: Final = 2**63 - 1  # as DENIED carries it
_CGROUP: Final = "the guest's cgroup"
_SECCOMP: Final = "the guest's seccomp filter"
_RLIMITS: Final = "the guest's resource limits"
_MOUNTS: Final = "the guest's mounts"
_LANDLOCK: Final = "the guest's Landlock rules"
# What a rule (policy/decode) may require first, and the value to suggest.
_REQUIRED_FIRST: Final[dict[str, tuple[str, object]]] = {
    "$.process.allow_execs": ("$.process.allow_exec_prefixes", ["/usr/bin/"]),
    "$.process.max_live": ("$.process.max_live", 16),
    "$.process.max_spawns": ("$.process.max_spawns", 64),
    "$.process.max_runtime_ms": ("$.process.max_runtime_ms", 60_000),
}
# Limits that end a program, by outcome: field, action, subject, enforced by, observed by.
_LIMITS: Final[dict[str, tuple[str, str, str, str, Literal["host", "guest"]]]] = {
    "timeout": ("limits.wall_ms", "run", "for longer", "the deadline", "host"),
    "cpu-limit": ("limits.cpu_ms", "use", "more CPU time", _CGROUP, "guest"),
    "oom": ("limits.mem_bytes", "use", "more memory", _CGROUP, "guest"),
}
_TASKS: Final = frozenset({"clone", "clone3", "fork", "vfork"})
_EXECUTES: Final = frozenset({"execve", "execveat"})
_RAISES_LIMIT: Final = frozenset({"setrlimit", "prlimit64"})
_MAKES_FOLDERS: Final = frozenset({"mkdir", "mkdirat"})
_REPLACES: Final = ("rename", "unlink", "rmdir")  # prefixes of call names
_NO_FLAGS: Final = FlagReach()
_PROGRAM_FOLDERS: Final = frozenset({"bin", "sbin", "games", "libexec"})


def denials(
    refused: Iterable[Denied],
    policy: Policy,
    areas: Sequence[GuestMount],
    cwd: str,
    reach: FlagReach = _NO_FLAGS,
) -> list[Denial]:
    """Return the distinct denials in *refused*, which the guest reported. cwd: the program's start folder.

    Those of connections have a function of their own (`sessions/egress`).
    """
    found: dict[tuple[str, str, str], Denial] = {}
    for denied in refused:
        if denied.by == NETWORK:
            continue
        if denied.by == "seccomp":
            denial = _call(denied, policy)
        elif denied.errno == errno.EMFILE:
            how = _advise_higher(policy, "limits.fds", policy.limits.fds, reach)
            denial = _denial("limits.fds", "open", "another file", _RLIMITS, denied.times, how)
        elif denied.call in _RAISES_LIMIT:
            denial = _limit(denied, policy, reach)
        elif denied.call in _EXECUTES:
            denial = _execution(denied, policy, areas, cwd)
        else:
            denial = _file(denied, policy, areas, cwd)
        key = denial.field, denial.action, denial.subject
        if (earlier := found.get(key)) is not None:
            denial = msgspec.structs.replace(denial, count=min(denial.count + earlier.count, _COUNT_MAX))
        found[key] = denial
    return list(found.values())


def advise(policy: Policy, field: str, value: object, flag: str | None = None) -> HowToAllow | None:
    """Return the advice to set *field* (first a field that a rule requires), or None if no policy allows the value."""
    document = msgspec.json.decode(msgspec.json.encode(policy))  # rules expect lists
    section, _, name = field.partition(".")
    document.setdefault(section, {})[name] = value
    for problem in rule_problems(document):
        if problem.json_path not in _REQUIRED_FIRST:
            return None
        path, value = _REQUIRED_FIRST[problem.json_path]
        return HowToAllow(json_path=path, value=value)
    try:
        msgspec.convert(document, prepared(Policy))
    except msgspec.ValidationError:
        return None
    return HowToAllow(json_path=f"$.{field}", value=value, flag=flag)


def more_tasks(policy: Policy, max_live: int | None, count: int, reach: FlagReach = _NO_FLAGS) -> Denial:
    """Return the denial of new tasks at the limit. max_live: the policy's process.max_live, if that is the limit."""
    field, current = ("limits.procs", policy.limits.procs) if max_live is None else ("process.max_live", max_live)
    how = _advise_higher(policy, field, current, reach)
    return _denial(field, STARTS, "a new process or thread", _CGROUP, count, how)


def limit_hit(
    outcome: str, policy: Policy, reach: FlagReach = _NO_FLAGS, *, cpu_ms: int | None = None
) -> Denial | None:
    """Return the denial behind an outcome, or None if no limit ended the program. cpu_ms: X07's own CPU time limit."""
    if outcome not in _LIMITS:
        return None
    field, action, what, by, observer = _LIMITS[outcome]
    current = int(getattr(policy.limits, field.removeprefix("limits.")))
    how: HowToAllow | None
    if field == "limits.cpu_ms" and cpu_ms is not None and cpu_ms < current:
        how = _advise_flag(f"--cpu-time-limit-seconds {cpu_ms // 500}")
    else:
        how = _advise_higher(policy, field, current, reach)
    return msgspec.structs.replace(_denial(field, action, what, by, 1, how), observed_by=observer)


def too_much_output(stream: str, most: int | None) -> Denial:
    """Return the denial of output beyond the limit. most: the limit in bytes; None if no flag changes it."""
    how = None if most is None else _advise_flag(f"--max-output-bytes {max(2 * most, 1)}")
    denial = _denial(OUTPUT, "write", f"more to {stream}", "the output limit", 1, how)
    return msgspec.structs.replace(denial, observed_by="host")


def disk_full() -> Denial:
    """Return the denial for a scratch disk that was full at the end of the run."""
    return _denial("scratch", "write", "the scratch disk (8 GiB) is full", "the size of the disk", 1, None)


def memory_full(policy: Policy, reach: FlagReach = _NO_FLAGS) -> Denial:
    """Return the denial for a /tmp or /dev/shm that was full at the end of the run."""
    what = "an in-memory folder (/tmp or /dev/shm) is full; its size is a quarter of limits.mem_bytes"
    how = _advise_higher(policy, "limits.mem_bytes", policy.limits.mem_bytes, reach)
    return _denial("limits.mem_bytes", "write", what, "the size of the in-memory folders", 1, how)


def _advise_flag(flag: str) -> HowToAllow:
    """Return the advice to use a flag, for an action that no policy field controls."""
    return HowToAllow(json_path=None, value=None, flag=flag)


def _advise_higher(policy: Policy, field: str, current: int, reach: FlagReach) -> HowToAllow | None:
    """Return the advice to raise a limit by its flag (if the flag cannot, in the policy), or None at the maximum."""
    named = "limits.procs" if field == "process.max_live" else field  # --procs raises both
    most, top = largest(field), reach.tops.get(named, 0)
    if current >= most:
        return None
    value = min(most, max(2 * current, current + 1), *([top] if top > current else []))
    flag = NAMES[named.removeprefix("limits.")].flag_text(value) if top > current else None
    if flag is not None and not reach.policy_too:
        return _advise_flag(flag)
    return advise(policy, field, value, flag)


def _denial(field: str, action: str, subject: str, by: str, count: int, how: HowToAllow | None) -> Denial:
    return Denial(
        field=field, action=action, subject=subject, enforced_by=by, observed_by="guest", count=count, how_to_allow=how
    )


def _call(denied: Denied, policy: Policy) -> Denial:
    """Return the denial of a system call by a seccomp filter. The filter does not report the call's arguments."""
    process, count = policy.process, denied.times
    # The base filter, which every program has, denies execveat of a bare descriptor.
    if denied.call in _EXECUTES and not process.may_execute:
        how = _advise_process(policy, "allow_exec")
        return _denial("process.allow_exec", "execute", "a program", _SECCOMP, count, how)
    if denied.call in _TASKS:
        if not process.may_spawn:
            what = "a new process" if policy.threads_in_force.enabled else "a new process or thread"
            how = _advise_process(policy, "allow_spawn")
            return _denial("process.allow_spawn", STARTS, what, _SECCOMP, count, how)
        if not policy.threads_in_force.enabled:
            how = advise(policy, "threads.enabled", value=True)
            return _denial("threads.enabled", STARTS, "a new thread", _SECCOMP, count, how)
    return _denial(SYSTEM_CALLS, "call", denied.call, _SECCOMP, count, None)


def _advise_process(policy: Policy, name: str) -> HowToAllow | None:
    """Return the advice to set a switch of `process`, or to enable the section first."""
    return advise(policy, f"process.{name if policy.process.enabled else 'enabled'}", value=True)


def _limit(denied: Denied, policy: Policy, reach: FlagReach) -> Denial:
    """Return the denial of a higher resource limit (ulimit)."""
    field, what, how = PERMISSIONS, f"({denied.call})", None
    if denied.path == "nofile":
        field, what = "limits.fds", "the open file limit"
        how = _advise_higher(policy, field, policy.limits.fds, reach)
    elif denied.path == "cpu":
        field, what = "limits.cpu_ms", "the CPU time limit"
        how = _advise_higher(policy, field, policy.limits.cpu_ms, reach)
    elif denied.path == "core":
        field, what = "limits.core_dumps", "the core file size limit"
        how = None if policy.limits.core_dumps else advise(policy, field, value=True)
    return _denial(field, "raise", what, _RLIMITS, denied.times, how)


def _execution(denied: Denied, policy: Policy, areas: Sequence[GuestMount], cwd: str) -> Denial:
    path, count = denied.path, denied.times
    lists = confinement(policy, cwd)
    if not path.startswith("/") or lists.programs is None or denied.errno != errno.EACCES:
        return _denial(PERMISSIONS, "execute", path, "the file's mode", count, None)
    listed = not _is_unlisted(path, policy, cwd)
    root = _root_of(path, areas)
    folder = root.at if root is not None else next((own for own in WRITABLE if is_below(path, own)), None)
    if folder is None or (root is not None and not root.write):
        if listed:
            return _denial(PERMISSIONS, "execute", path, "the file's mode", count, None)
        return _denial("process.allow_execs", "execute", path, _LANDLOCK, count, _advise_entry(policy, path))
    if f"{folder}/".startswith(tuple(lists.prefixes)):
        return _denial(PERMISSIONS, "execute", path, "the file's mode", count, None)
    # An entry applies to files that exist at the start; a file created later needs a prefix for the whole folder.
    # Whether a file of a listed root existed at the start is not known here.
    by = "noexec, or the file's mode" if listed and root is not None else "noexec"
    how = advise(policy, "process.allow_exec_prefixes", [*policy.process.allow_exec_prefixes, f"{folder}/"])
    return _denial("process.allow_exec_prefixes", "execute", path, by, count, how)


def advise_loading(path: str, policy: Policy, areas: Sequence[GuestMount], cwd: str) -> HowToAllow | None:
    """Return the advice to allow loading a library from an absolute path. The same change allows executing the file."""
    if not policy.process.may_execute:
        return _advise_process(policy, "allow_exec")
    denied = Denied(0, "kernel", "openat", errno.EACCES, path, write=False, times=1)
    return _execution(denied, policy, areas, cwd).how_to_allow


def _advise_entry(policy: Policy, path: str) -> HowToAllow | None:
    return advise(policy, "process.allow_execs", [*policy.process.allow_execs, path])


def _is_unlisted(path: str, policy: Policy, cwd: str) -> bool:
    """Return whether the policy lists allowed programs, but *path* is not among them."""
    lists = confinement(policy, cwd)
    return lists.programs is not None and path not in lists.programs and not path.startswith(tuple(lists.prefixes))


def _file(denied: Denied, policy: Policy, areas: Sequence[GuestMount], cwd: str) -> Denial:
    path, count = denied.path, denied.times
    action = "write" if denied.write else "read"
    if not path.startswith("/"):  # relative to a descriptor, or unknown: no advice
        return _denial(PERMISSIONS, action, path or f"({denied.call})", "the guest's kernel", count, None)
    area = _root_of(path, areas)
    # The kernel may report the mode of the parent folder before it reports that a mount point is busy.
    whole = area is not None and area.at == path and denied.call.startswith(_REPLACES)
    if denied.errno == errno.EBUSY or whole:
        return _denial("fs.write_roots", "replace", path, _MOUNTS, count, _advise_replacing(path, areas, policy, cwd))
    if action == "read":
        if area is None and _PROGRAM_FOLDERS & set(path.split("/")) and _is_unlisted(path, policy, cwd):
            return _denial("process.allow_execs", action, path, _LANDLOCK, count, _advise_entry(policy, path))
        return _denial(PERMISSIONS, action, path, "the file's mode and owner", count, None)
    if denied.errno == errno.EPERM or (area is not None and area.write):
        action = denied.call if denied.errno == errno.EPERM else action
        return _denial(PERMISSIONS, action, path, "the file's mode and owner", count, None)
    folder = denied.call in _MAKES_FOLDERS
    field, how = _write_denial(path, area, policy, cwd, folder=folder)
    return _denial(field, action, path, _MOUNTS, count, how)


def _write_denial(
    path: str, area: GuestMount | None, policy: Policy, cwd: str, *, folder: bool
) -> tuple[str, HowToAllow | None]:
    """Return the field that denies a write, and advice. area: the read root around *path*. folder: mkdir was denied."""
    if f"{path}/".startswith(f"{OUT}/"):
        out = _advise_flag("--out DIR")
        return "fs.write_roots", out if policy.fs.enabled else advise(policy, "fs.enabled", value=True)
    around = path.rstrip("/") if path.endswith("/") else posixpath.dirname(path)
    if area is not None:
        given = area.given
    elif around == cwd or is_below(around, cwd):  # belongs to a relative root
        given = posixpath.relpath(around, cwd)
    else:
        given = around
    if guest_path(given, cwd, deny_hidden=policy.fs.deny_hidden)[0] is None:
        # / and /opt cannot be roots, but folders in them can; the guest does not report the new name (guest/audit).
        new = posixpath.join(path, "FOLDER")
        if not (folder and path.endswith("/")) or guest_path(new, cwd, deny_hidden=policy.fs.deny_hidden)[0] is None:
            return PERMISSIONS, None
        how = _advise_flag(f"--allow-write-root {shlex.quote(new)}")
        return "fs.write_roots", how if policy.fs.enabled else advise(policy, "fs.enabled", value=True)
    return "fs.write_roots", advise_root(policy, "write_roots", given)


def _advise_replacing(path: str, areas: Sequence[GuestMount], policy: Policy, cwd: str) -> HowToAllow | None:
    """Return the advice to make a mount's parent folder a root, so that the program may replace or remove the mount."""
    area = _root_of(path, areas)
    if area is None or area.at != path or path == OUT:
        return None
    if any(other.write and is_below(path, other.at) for other in areas):  # there already is one
        return None
    given = posixpath.normpath(area.given)
    folder = posixpath.dirname(given) or "."
    if given == "." or guest_path(folder, cwd, deny_hidden=policy.fs.deny_hidden)[0] is None:
        return None
    return advise_root(policy, "write_roots", folder)


def _root_of(path: str, areas: Sequence[GuestMount]) -> GuestMount | None:
    """Return the innermost root that contains *path*."""
    around = (area for area in areas if path == area.at or is_below(path, area.at))
    return max(around, key=lambda area: area.at.count("/"), default=None)


def advise_root(policy: Policy, name: Literal["read_roots", "write_roots"], given: str) -> HowToAllow | None:
    """Return the advice to add *given* as a root. The path may be hostile, so it is quoted in the flag."""
    if not policy.fs.enabled:
        return advise(policy, "fs.enabled", value=True)
    word = f"./{given}" if given.startswith("-") else given
    # Terminals may interpret control characters when they are pasted.
    flag = f"--allow-{name.replace('_roots', '-root')} {shlex.quote(word)}" if given.isprintable() else None
    return advise(policy, f"fs.{name}", [*getattr(policy.fs, name), given], flag)
