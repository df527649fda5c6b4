"""The table behind the controls: for every field of a policy, whether it holds, by whom, and why.

A field that permits something and a field that restricts nothing are ``enforced`` when the run behaves as the policy
says. ``refused`` stands where the value asks for what this backend cannot give or hold: nothing runs. ``advisory``
fields reach X07's own libraries as variables, and bind only programs that ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from x07_sandbox.plan.confinement import entry_path, leading_into, names_everything
from x07_sandbox.plan.features import Features
from x07_sandbox.policy.environment import VARIABLES
from x07_sandbox.policy.model import SCHEMA_VERSION, Policy, paths

State = Literal["enforced", "advisory", "refused"]


class Answer(msgspec.Struct, frozen=True):
    """What a row of the table says about a value. instead: what to change in place of it: another field, its value."""

    state: State
    by: str
    why: str
    instead: tuple[str, object] | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows look at: the policy, all its values in force (leaf_values), and the backend's features."""

    policy: Policy
    values: Mapping[str, object]
    features: Features

    @property
    def boundary(self) -> str:
        """What keeps the program apart."""
        return self.features.words.boundary

    def own(self, what: str) -> str:
        """Whose something is that holds the program: the guest's control group, say."""
        return f"{self.features.words.inside} {what}"

    def entries(self, field: str) -> tuple[object, ...]:
        """A list field's entries."""
        value = self.values[field]
        return value if isinstance(value, tuple) else ()

    def number(self, field: str) -> int:
        """A number field's value."""
        value = self.values[field]
        return value if isinstance(value, int) else 0

    @property
    def files(self) -> bool:
        """Whether the policy gives files of the host."""
        roots = self.entries("fs.read_roots") or self.entries("fs.write_roots")
        return self.values["fs.enabled"] is True and bool(roots)

    @property
    def connections(self) -> bool:
        """Whether the policy asks for hosts of the network."""
        return self.policy.net.may_connect

    @property
    def servers(self) -> bool:
        """Whether the policy asks for databases that are reached over a network."""
        drivers = ("db.drivers.postgres", "db.drivers.mysql", "db.drivers.redis")
        return self.values["db.enabled"] is True and any(self.values[driver] is True for driver in drivers)


Row = Callable[[Asked, str], Answer]

_VARIABLES: Final = {field: variable for variable, field in VARIABLES}
_CGROUP: Final = "control group"
_RLIMIT: Final = "resource limits"
_SECCOMP: Final = "seccomp filter"
_NOBODY: Final = "nobody yet"
_PLAN: Final = "the plan"
_GATE: Final = "the egress gate"
_COPY: Final = "the copying of files"
_CHANGES: Final = "the check of changes"
_REQUIRES: Final = frozenset({"db.net.require_tls", "db.net.require_verify"})
# What the gate does with a switch that is off, and on; a list is never on.
_OF_NETWORK: Final = {
    "net.enabled": ("", "each connection is asked for by name, decided on the host, and dialled there"),
    "net.allow_dns": ("no name is looked up", "listed names only; no query of the program's leaves the sandbox"),
    "net.allow_tcp": ("no TCP connection is made", "to the hosts and ports of the list"),
    "net.allow_udp": ("no datagram is passed on", "to the hosts and ports of the list; port 443 (QUIC) is refused"),
    "net.allow_hosts": ("these hosts with these ports, and no others; special addresses stay refused", ""),
}
_OF_CHANGES: Final = frozenset({"fs.allow_mkdir", "fs.allow_remove", "fs.allow_rename", "fs.max_write_bytes"})
_FILE_RULES: Final = {
    "fs.enabled": "only what the roots name is there",
    "fs.deny_hidden": "if true, hidden names neither go in nor come back",
    "fs.allow_symlinks": "if false, links neither go in nor come back; none that leads out of its root ever does",
    "fs.allow_mkdir": "judged by what is new when the program has ended",
    "fs.allow_remove": "judged by what is gone when the program has ended",
    "fs.allow_rename": "judged by what has another name when the program has ended",
    "fs.max_read_bytes": "a larger file does not go in; 0 stands for 16 MiB",
    "fs.max_write_bytes": "a larger file does not come back; 0 stands for 16 MiB",
    "fs.max_entries": "more entries do not go in, nor come back; 0 stands for 10,000",
    "fs.max_depth": "what lies deeper neither goes in nor comes back; 0 stands for 64, and more than 256 for 256",
}


def _always(by: str, why: str) -> Row:
    return lambda _asked, _field: Answer("enforced", by, why)


def _limit(by: str, why: str) -> Row:
    def row(asked: Asked, field: str) -> Answer:
        if field in asked.features.can_enforce:
            return Answer("enforced", asked.own(by), why)
        return _not_held(asked, "this backend cannot hold this limit")

    return row


def _not_held(asked: Asked, why: str) -> Answer:
    """What every policy asks for, and this backend cannot hold: refused, unless weaker isolation was accepted."""
    return (
        Answer("advisory", "nobody", why)
        if asked.features.weaker_isolation_accepted
        else Answer("refused", _NOBODY, why)
    )


def _advice(asked: Asked, field: str) -> Answer:
    del asked
    if variable := _VARIABLES.get(field):
        return Answer("advisory", "X07's libraries", f"told to the program as {variable}")
    why = "it holds X07 programs to this, and nobody else does; it concerns no others"
    return Answer("advisory", "X07's compiler", why)


def _label(_asked: Asked, _field: str) -> Answer:
    return Answer("advisory", "people", "it names or explains the policy and restricts nothing")


def _roots(asked: Asked, field: str) -> Answer:
    given = [str(root) for root in asked.entries(field)]
    if not given or not asked.files:
        return _no_files(asked, field)
    if "host-files" not in asked.features.can_enforce:
        return Answer("refused", _NOBODY, "this backend cannot give a program files of the host")
    from x07_sandbox.plan.guest_paths import PROGRAM, guest_path  # not on the way of a run without files

    hidden = asked.values["fs.deny_hidden"] is True
    for root in given:
        where, why = guest_path(root, PROGRAM, deny_hidden=hidden)
        if where is None:
            bare = guest_path(root, PROGRAM, deny_hidden=False)[0]
            instead = None if bare is None else ("fs.deny_hidden", False)
            return Answer("refused", _NOBODY, f"{ascii(root)[1:-1]} has no place in the machine ({why})", instead)
    if field == "fs.read_roots":
        why = "it gets copies of these, and can change them only where a write root holds them too"
        return Answer("enforced", _COPY, why)
    return Answer("enforced", _CHANGES, "it gets copies of these; changes come back only as a checked set")


def _copied(asked: Asked, field: str) -> Answer:
    """Fields that decide what is copied in, and what of changes may come back."""
    if not asked.files:
        return _no_files(asked, field)
    by = _CHANGES if field in _OF_CHANGES else _COPY
    return Answer("enforced", by, _FILE_RULES[field])


def _no_files(asked: Asked, _field: str) -> Answer:
    if "no-host-files" not in asked.features.can_enforce:
        return _not_held(asked, "this backend does not keep the host's files away")
    if asked.values["fs.enabled"] is True:
        why = f"{asked.features.words.no_files}, unless --out gives a folder: that is a write root like any other"
        return Answer("enforced", asked.boundary, why)
    return Answer("enforced", asked.boundary, asked.features.words.no_files)


def _network(asked: Asked, field: str) -> Answer:
    if not asked.connections:
        return _no_network(asked, field)
    if "network" not in asked.features.can_enforce:
        if field == "net.allow_hosts":
            return Answer("refused", _NOBODY, "this backend cannot hold a program to a list of hosts")
        return Answer("enforced", _PLAN, "nothing runs: net.allow_hosts is refused")
    why = _OF_NETWORK[field][asked.values[field] is True]
    if field == "net.allow_hosts" and "held-connections" not in asked.features.can_enforce:
        why += "; connect() succeeds at first where it is refused, and the connection is reset"
    return Answer("enforced", _GATE, why)


def _no_network(asked: Asked, _field: str) -> Answer:
    if "no-network" not in asked.features.can_enforce:
        return _not_held(asked, "this backend does not keep the network away")
    return Answer("enforced", asked.boundary, asked.features.words.no_network)


def _database(asked: Asked, field: str) -> Answer:
    if asked.servers and not asked.connections:
        why = "database servers are reached only where net.enabled is true and net.allow_hosts is not empty"
        return Answer("refused", _NOBODY, why)
    if asked.servers and "network" in asked.features.can_enforce:
        return _advice(asked, field)
    if _no_network(asked, field).state == "enforced":
        told = _advice(asked, field)
        why = f"{told.why}; no server can be reached, a file that it has can be used"
        return Answer("advisory", told.by, why)
    return _advice(asked, field)


def _database_net(asked: Asked, field: str) -> Answer:
    if not asked.servers or "network" not in asked.features.can_enforce:
        return _no_network(asked, field)
    if not asked.connections:
        return Answer("enforced", _PLAN, "nothing runs: db.enabled is refused")
    if field in _REQUIRES:
        return _advice(asked, field)
    return Answer("enforced", _GATE, "these hosts and ports join net.allow_hosts, for TCP")


def _no_variables(asked: Asked, field: str) -> Answer:
    if "no-host-variables" not in asked.features.can_enforce:
        return _not_held(asked, "this backend does not keep the host's variables away")
    if field == "env.allow_keys" and asked.entries(field) and asked.values["env.enabled"] is True:
        own = sorted(str(key) for key in asked.entries(field) if str(key).startswith("X07_"))
        if own:
            why = f"the host's {', '.join(own)} never go in, since such names are X07's own"
            return Answer("refused", _NOBODY, why)
        why = "of the host's variables these go in, where they are set, and no others"
        return Answer("enforced", asked.boundary, why)
    if field == "env.deny_keys" and asked.entries(field):
        names = map(str, asked.entries(field))
        own = sorted(key for key in names if key == "X07_WORLD" or key.startswith("X07_OS_"))
        if own:
            return Answer("refused", _NOBODY, f"every program is told {', '.join(own)}, which are X07's own")
        return Answer("enforced", asked.boundary, "none of these is set, whoever asks for it")
    why = "only fixed ones and X07's own go in: who names another for it is refused"
    if asked.values["env.enabled"] is True:
        keys = asked.entries("env.allow_keys")
        of_host = "of the host's only those of env.allow_keys go" if keys else "none of the host goes"
        why = f"{of_host} in, beside fixed ones, X07's own, and what the caller names"
    return Answer("enforced", asked.boundary, why)


_UNCONFINED: Final = Answer("refused", _NOBODY, "this backend does not confine a program")


def _threads(asked: Asked, _field: str) -> Answer:
    if asked.values["threads.enabled"] is True:
        return _within_tasks(asked, "allowed, within limits.procs")
    if "confinement" not in asked.features.can_enforce:
        return _UNCONFINED
    return Answer("enforced", asked.own(_SECCOMP), "a second thread of a process is refused with EPERM")


def _within_tasks(asked: Asked, why: str) -> Answer:
    held = "limits.procs" in asked.features.can_enforce
    return Answer("enforced", asked.own(_CGROUP), why) if held else Answer("enforced", _PLAN, "allowed")


def _deadline(asked: Asked, _field: str) -> Answer:
    if asked.features.separates_program:
        return Answer("enforced", "the host's own clock", "the machine is ended at the deadline")
    return _not_held(asked, "the program is ended at the deadline, unless it ends first what watches it")


def _spawn(asked: Asked, _field: str) -> Answer:
    if asked.policy.process.may_spawn:
        return _within_tasks(asked, "allowed, within limits.procs and process.max_live")
    if "confinement" not in asked.features.can_enforce:
        return _UNCONFINED
    return Answer("enforced", asked.own(_SECCOMP), "a child process is refused with EPERM, however it is asked for")


def _allow_exec(asked: Asked, field: str) -> Answer:
    if asked.policy.process.may_execute:
        return Answer("enforced", asked.boundary, "allowed, inside a machine that is thrown away")
    if field == "process.enabled" and asked.values[field] is True:
        return Answer("enforced", asked.boundary, "the fields of this section say what is allowed")
    if "confinement" not in asked.features.can_enforce:
        return _UNCONFINED
    why = "after the program's own start every execution is EPERM, and nothing that is not of the image can be loaded"
    return Answer("enforced", asked.own(f"{_SECCOMP}, noexec"), why)


def _execs(asked: Asked, _field: str) -> Answer:
    if asked.policy.process.may_execute and names_everything(asked.entries("process.allow_exec_prefixes")):
        return Answer("enforced", asked.boundary, 'the prefix "/" allows every program in the machine')
    if "confinement" not in asked.features.can_enforce:
        return _UNCONFINED
    if not asked.policy.process.may_execute:
        return Answer("enforced", asked.own(_SECCOMP), "nothing may be executed, so no entry counts")
    why = "nothing that no entry names can be executed, nor a program of the image be read (EACCES)"
    if found := _written_and_executed(asked):
        entries = ", ".join(ascii(entry)[1:-1] for entry in found)
        why += f"; but, where an entry finds something when it starts, what it writes there may be: {entries}"
    if found := _perhaps_written_and_executed(asked, but=found):
        entries = ", ".join(ascii(entry)[1:-1] for entry in found)
        why += f"; where a write root holds the same folder of the host, there too: {entries}"
    return Answer("enforced", asked.own("Landlock rules, noexec"), why)


def _written_and_executed(asked: Asked) -> list[str]:
    """Entries of the lists that lead where the program can write; a file of a writable folder is kept as it is."""
    from x07_sandbox.plan.guest_paths import PROGRAM, WRITABLE, guest_path  # not on the way of a run without a list

    given = asked.entries("fs.write_roots") if asked.files else ()
    roots = [path for root in given if (path := guest_path(str(root), PROGRAM, deny_hidden=False)[0])]
    return _leading_into(asked, roots, (*WRITABLE, *roots))


def _perhaps_written_and_executed(asked: Asked, but: Sequence[str]) -> list[str]:
    """Entries that lead where it can write if two roots are one folder: not told by names, where one is relative."""
    from x07_sandbox.plan.guest_paths import PROGRAM, guest_path

    if not asked.files:
        return []
    written = {str(root).startswith("/") for root in asked.entries("fs.write_roots")}
    given = [root for root in map(str, asked.entries("fs.read_roots")) if (not root.startswith("/")) in written]
    roots = [path for root in given if (path := guest_path(root, PROGRAM, deny_hidden=False)[0])]
    return [entry for entry in _leading_into(asked, roots, roots) if entry not in but]


def _leading_into(asked: Asked, roots: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Beginnings that lead into one of the folders, and files that are one of the roots."""
    from x07_sandbox.plan.guest_paths import PROGRAM

    prefixes = [str(entry) for entry in asked.entries("process.allow_exec_prefixes")]
    files = [str(entry) for entry in asked.entries("process.allow_execs")]
    return [*leading_into(prefixes, folders, PROGRAM), *(file for file in files if entry_path(file, PROGRAM) in roots)]


def _max_live(asked: Asked, field: str) -> Answer:
    if "limits.procs" in asked.features.can_enforce and asked.number("limits.procs") <= asked.number(field):
        return Answer("enforced", asked.own(_CGROUP), "limits.procs is not larger, and holds for children too")
    if "confinement" not in asked.features.can_enforce:
        return _not_held(asked, "this backend does not confine a program")
    if not asked.policy.process.may_spawn:
        return Answer("enforced", asked.own(_SECCOMP), "no child may be started at all")
    why = "stands in place of the larger limits.procs, so that threads count as children"
    return Answer("enforced", asked.own(_CGROUP), why)


def _kill(asked: Asked, field: str) -> Answer:
    if asked.values[field] is True:
        return Answer("enforced", asked.boundary, "whatever the program started ends with the run")
    return Answer("advisory", "X07's libraries", "false asks for no restriction; what is started ends with the run")


# One row for each field: first those that something enforces, with their sections, then the advisory ones.
TABLE: Final[dict[str, Row]] = {
    "schema_version": _always("the check of the policy", f"every other format than {SCHEMA_VERSION} is refused"),
    "policy_id": _label,
    "notes": _label,
    "limits.wall_ms": _deadline,
    "limits.cpu_ms": _limit(_CGROUP, "the kernel counts the CPU time of the program and its children"),
    "limits.mem_bytes": _limit(_CGROUP, "memory of the program and its children, without swap"),
    "limits.fds": _limit(_RLIMIT, "open descriptors of each process"),
    "limits.procs": _limit(_CGROUP, "processes and threads beyond the program's first thread"),
    "limits.core_dumps": _limit(_RLIMIT, "the size of a core file is zero unless core dumps are allowed"),
    "fs.read_roots": _roots,
    "fs.write_roots": _roots,
    **dict.fromkeys(_FILE_RULES, _copied),
    **dict.fromkeys(paths("net", "enabled allow_dns allow_tcp allow_udp allow_hosts"), _network),
    "db.enabled": _database,
    **dict.fromkeys(paths("db.net", "allow_dns allow_cidrs allow_ports require_tls require_verify"), _database_net),
    **dict.fromkeys(paths("env", "enabled allow_keys deny_keys"), _no_variables),
    "threads.enabled": _threads,
    "process.allow_spawn": _spawn,
    "process.enabled": _allow_exec,
    "process.allow_exec": _allow_exec,
    "process.allow_execs": _execs,
    "process.allow_exec_prefixes": _execs,
    "process.max_live": _max_live,
    "process.kill_on_drop": _kill,
    "process.kill_tree": _kill,
    **dict.fromkeys(
        (
            *paths("fs", "allow_walk allow_glob"),
            *paths("language", "allow_unsafe allow_ffi"),
            *paths("threads", "max_workers max_blocking max_queue"),
            *paths("time", "enabled allow_monotonic allow_wall_clock allow_sleep max_sleep_ms allow_local_tzid"),
            *paths("process", "allow_exit max_spawns max_runtime_ms allow_args_regex_lite allow_env_keys"),
            *paths("process", "allow_cwd allow_cwd_roots max_args max_env max_exe_bytes max_arg_bytes"),
            *paths("process", "max_env_key_bytes max_env_val_bytes"),
            *paths("process", "max_stdout_bytes max_stderr_bytes max_total_bytes max_stdin_bytes"),
            *paths("db.drivers", "sqlite postgres mysql redis"),
            *paths("db", "max_live_conns max_queries connect_timeout_ms query_timeout_ms"),
            *paths("db", "max_sql_bytes max_rows max_resp_bytes"),
            *paths("db.sqlite", "allow_paths readonly_only allow_create allow_in_memory"),
        ),
        _advice,
    ),
}
