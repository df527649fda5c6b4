"""What one policy grants or withdraws compared to another: field by field, lists entry by entry.

Compared is what is in force; the order of a list and the case of a host do not count. A change is ``granted`` where the
second policy lets a program do more, ``withdrawn`` where it lets it do less, else ``changed``.
"""

from collections.abc import Iterator
from typing import Any, Final, Literal

import msgspec

from x07_sandbox.policy.model import HostPorts, Policy, leaf_values, paths

Effect = Literal["granted", "withdrawn", "changed"]
# What a larger number, true or a further entry does.
Direction = Literal["grants", "withdraws", "neither"]

_MIB: Final = 1 << 20


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One difference.

    field: its path. before, after: the values; of a list one entry, with None where it is not.
    """

    field: str
    effect: Effect
    before: Any
    after: Any


DIRECTIONS: Final[dict[str, Direction]] = {
    **dict.fromkeys(("schema_version", "policy_id", "notes"), "neither"),
    **dict.fromkeys(
        (
            *paths("limits", "cpu_ms wall_ms mem_bytes fds procs core_dumps"),
            *paths("fs", "enabled read_roots write_roots allow_symlinks allow_mkdir allow_remove allow_rename"),
            *paths("fs", "allow_walk allow_glob max_read_bytes max_write_bytes max_entries max_depth"),
            *paths("net", "enabled allow_dns allow_tcp allow_udp allow_hosts"),
            *paths("db", "enabled max_live_conns max_queries connect_timeout_ms query_timeout_ms"),
            *paths("db", "max_sql_bytes max_rows max_resp_bytes"),
            *paths("db.drivers", "sqlite postgres mysql redis"),
            *paths("db.sqlite", "allow_paths allow_create allow_in_memory"),
            *paths("db.net", "allow_dns allow_cidrs allow_ports"),
            *paths("env", "enabled allow_keys"),
            *paths("time", "enabled allow_monotonic allow_wall_clock allow_sleep max_sleep_ms allow_local_tzid"),
            *paths("language", "allow_unsafe allow_ffi"),
            *paths("threads", "enabled max_workers max_blocking max_queue"),
            *paths("process", "enabled allow_spawn max_live max_spawns allow_exec allow_exit allow_execs"),
            *paths("process", "allow_exec_prefixes allow_env_keys max_exe_bytes max_args max_arg_bytes max_env"),
            *paths("process", "max_env_key_bytes max_env_val_bytes max_runtime_ms max_stdout_bytes"),
            *paths("process", "max_stderr_bytes max_total_bytes max_stdin_bytes allow_cwd allow_cwd_roots"),
        ),
        "grants",
    ),
    **dict.fromkeys(("fs.deny_hidden", "db.sqlite.readonly_only", "env.deny_keys"), "withdraws"),
    **dict.fromkeys(paths("db.net", "require_tls require_verify"), "withdraws"),
    **dict.fromkeys(paths("process", "kill_on_drop kill_tree"), "withdraws"),
    # What no pattern at all means is X07's to know: the first one may allow something, or be the first restriction.
    "process.allow_args_regex_lite": "neither",
}
# Numbers for which X07 puts another one in place of 0; of threads.max_workers only the run-time knows which.
_ZERO_MEANS: Final[dict[str, int | None]] = {
    "fs.max_read_bytes": 16 * _MIB,
    "fs.max_write_bytes": 16 * _MIB,
    "fs.max_entries": 10_000,
    "fs.max_depth": 64,
    "threads.max_workers": None,
}


def differences(first: Policy, second: Policy) -> tuple[Change, ...]:
    """All that *second* grants, withdraws or changes, in the model's order; empty where they allow the same."""
    after = leaf_values(second)
    return tuple(
        change for field, before in leaf_values(first).items() for change in _changes(field, before, after[field])
    )


def _changes(field: str, before: object, after: object) -> Iterator[Change]:
    if isinstance(before, tuple) and isinstance(after, tuple):
        old, new = _entries(before), _entries(after)
        for entry in (entry for entry in old if entry not in new):
            yield Change(field=field, effect=_effect(field, more=False), before=entry, after=None)
        for entry in (entry for entry in new if entry not in old):
            yield Change(field=field, effect=_effect(field, more=True), before=None, after=entry)
        return
    old_size, new_size = _size(field, before), _size(field, after)
    if old_size != new_size:
        effect: Effect = "changed"
        if isinstance(old_size, int) and isinstance(new_size, int):
            effect = _effect(field, more=new_size > old_size)
        yield Change(field=field, effect=effect, before=before, after=after)


def _effect(field: str, *, more: bool) -> Effect:
    direction = DIRECTIONS[field]
    if direction == "neither":
        return "changed"
    return "granted" if more == (direction == "grants") else "withdrawn"


def _size(field: str, value: object) -> object:
    """What counts in a comparison: a number, or something that can only be the same or another."""
    return _ZERO_MEANS[field] if value == 0 and field in _ZERO_MEANS else value


def _entries(values: tuple[object, ...]) -> dict[object, None]:
    """The entries of a list in their order, each once; of hosts one for each port."""
    found: dict[object, None] = {}
    for value in values:
        if isinstance(value, HostPorts):
            found |= {f"{value.host.encode().lower().decode()}:{port}": None for port in value.ports}
        else:
            found[value] = None
    return found
