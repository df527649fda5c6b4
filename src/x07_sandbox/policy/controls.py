"""The plan of a job: one control per field of the policy, the effective limits, and refusals. Pure.

A table decides on every field whether it is enforced, by what, and why. ``enforced``: the run behaves as the policy
says. This includes fields that permit or restrict nothing. ``refused``: this backend cannot provide or enforce the
value, so nothing runs. ``advisory``: X07's own libraries get the value in a variable; other programs ignore the
variable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.channel.messages import CWD
from x07_sandbox.errors import Flag, RefusedError, Text, listed
from x07_sandbox.policy.decode import VARIABLES, program_environment
from x07_sandbox.policy.denials import Control, HowToAllow, State
from x07_sandbox.policy.features import Features
from x07_sandbox.policy.guest import (
    WRITABLE,
    command_limits,
    entry_path,
    guest_path,
    names_everything,
    prefixes_into,
    ram_class_bytes,
)
from x07_sandbox.policy.model import SCHEMA_VERSION, Limits, Policy, leaf_values, paths

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import CommandLimits

# MAX_ARG_STRLEN: execve(2) rejects a longer variable, counting name, '=' and NUL.
VARIABLE_MAX_BYTES: Final = 131_072
# Flags of x07 run that add to a field.
_FLAGS: Final = {
    "fs.read_roots": ("--allow-read-root",),
    "fs.write_roots": ("--allow-write-root",),
    "net.allow_hosts": ("--allow-host", "--allow-host-file"),
}


class Refusal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a policy cannot be enforced here. field: the path of the field that is refused, such as "fs.read_roots"."""

    field: str
    why: str
    how_to_allow: HowToAllow


class RunLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of the run job: the policy's limits, and the VM's RAM, which x07 derives from them."""

    ram_bytes: int
    max_live: int | None = None  # if it is less than procs, and children are allowed

    @property
    def tasks(self) -> int:
        """Maximum number of processes and threads, including the program's first thread."""
        return (self.procs if self.max_live is None else self.max_live) + 1

    def of_policy(self) -> Limits:
        """Return the limits in the form that a policy has."""
        return Limits(**{field: getattr(self, field) for field in Limits.__struct_fields__})

    def for_guest(self) -> CommandLimits:
        """Return the limits of the program's command."""
        return command_limits(self, self.tasks)


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plan of a job, which may start only if the plan contains no refusals."""

    controls: tuple[Control, ...]
    refusals: tuple[Refusal, ...]
    limits: RunLimits

    def require(self, given: Collection[str] = ()) -> None:
        """Raise RefusedError with all refusals, if there are any. given: the flags that changed the policy."""
        if self.refusals:
            why = "; ".join(refusal.why for refusal in self.refusals)
            fields = dict.fromkeys(refusal.field for refusal in self.refusals)
            changed = dict.fromkeys(str(refusal.how_to_allow.json_path)[2:] for refusal in self.refusals)
            fix: Text = f"Change {', '.join(changed)} in the policy"
            if flags := [flag for field in fields for flag in _FLAGS.get(field, ()) if flag in given]:
                named = listed(list(map(Flag, flags)), ", ")
                fix = ("Omit ", *named, f", or change {', '.join(changed)} in the policy")
            raise RefusedError("the policy cannot be enforced", why, fix, code="policy-not-enforced")


def make_plan(policy: Policy, features: Features, *, cpu_ms: int | None = None, proxy_resolves: bool = False) -> Plan:
    """Return the plan for *policy* on a backend with *features*. cpu_ms: an additional limit on CPU time.

    proxy_resolves: whether the user's proxy resolves the names.
    """
    given = PlanInput(policy=policy, values=leaf_values(policy), features=features, proxy_resolves=proxy_resolves)
    answers = {field: TABLE[field](given, field) for field in given.values}
    controls = tuple(Control(field=field, state=to.state, by=to.by, why=to.why) for field, to in answers.items())
    refusals = (*_refusals(answers, given.values), *_too_long(policy))
    return Plan(controls=controls, refusals=refusals, limits=run_limits(policy, cpu_ms))


def run_limits(policy: Policy, cpu_ms: int | None = None) -> RunLimits:
    """Return the limits of a run with *policy*. cpu_ms: an additional limit on CPU time."""
    limits, process = policy.limits, policy.process
    if cpu_ms is not None:
        limits = msgspec.structs.replace(limits, cpu_ms=min(limits.cpu_ms, cpu_ms))
    return RunLimits(
        **msgspec.structs.asdict(limits),
        ram_bytes=ram_class_bytes(limits.mem_bytes),
        max_live=process.max_live if process.may_spawn and process.max_live < limits.procs else None,
    )


def _refusals(answers: Mapping[str, Answer], values: Mapping[str, object]) -> Iterator[Refusal]:
    for field, answer in answers.items():
        if answer.state == "refused":
            value = values[field]
            # A number stays as it is: only another backend can enforce it.
            without: object = [] if isinstance(value, tuple) else not value if isinstance(value, bool) else value
            path, value = (field, without) if answer.instead is None else answer.instead
            how = HowToAllow(json_path=f"$.{path}", value=value)
            yield Refusal(field=field, why=f"{answer.why} ({field})", how_to_allow=how)


def _too_long(policy: Policy) -> Iterator[Refusal]:
    environment = program_environment(policy)
    for variable, field in VARIABLES:
        size = len(variable) + len(environment[variable].encode()) + 2
        if size > VARIABLE_MAX_BYTES:
            why = f"{field} makes {variable} {size} bytes long; Linux allows at most {VARIABLE_MAX_BYTES}"
            yield Refusal(field=field, why=why, how_to_allow=HowToAllow(json_path=f"$.{field}", value=[]))


# the table


class Answer(msgspec.Struct, frozen=True):
    """The table's decision on a field with its value."""

    state: State
    by: str
    why: str
    instead: tuple[str, object] | None = None  # the field and value to change in place of this field


class PlanInput(msgspec.Struct, frozen=True, kw_only=True):
    """Input of the table's rows: the policy, its effective values (leaf_values), and the backend's features.

    proxy_resolves: whether the user's proxy resolves the names.
    """

    policy: Policy
    values: Mapping[str, object]
    features: Features
    proxy_resolves: bool = False

    @property
    def boundary(self) -> str:
        """The name of the boundary between the program and the host."""
        return self.features.words.boundary

    def own(self, what: str) -> str:
        """Return *what* with its owner, such as "the guest's cgroup"."""
        return f"{self.features.words.inside} {what}"

    def entries(self, field: str) -> tuple[object, ...]:
        """Return the entries of a field that is a list."""
        value = self.values[field]
        return value if isinstance(value, tuple) else ()

    @property
    def files(self) -> bool:
        """Whether the policy provides host files."""
        return self.policy.fs.enabled and bool(self.policy.fs.read_roots or self.policy.fs.write_roots)

    @property
    def servers(self) -> bool:
        """Whether the policy allows database servers."""
        drivers = ("db.drivers.postgres", "db.drivers.mysql", "db.drivers.redis")
        return self.values["db.enabled"] is True and any(self.values[driver] is True for driver in drivers)


Row = Callable[[PlanInput, str], Answer]

_VARIABLES: Final = {field: variable for variable, field in VARIABLES}
_CGROUP: Final = "cgroup"
_RLIMIT: Final = "resource limits"
_SECCOMP: Final = "seccomp filter"
_NOBODY: Final = "nobody"
_PLAN: Final = "the plan"
_GATE: Final = "the egress gate"
_COPY: Final = "the copy of host files"
_CHANGES: Final = "the change check"
_REQUIRES: Final = frozenset({"db.net.require_tls", "db.net.require_verify"})
# What the gate does if the field is false, and if it is true. A list counts as false.
_NETWORK_RULES: Final = {
    "net.enabled": ("", "the host decides on each connection and makes it"),
    "net.allow_dns": (
        "no names are resolved",
        "listed names are resolved; the program's own DNS queries never leave the sandbox",
    ),
    "net.allow_tcp": ("no TCP connections", "allowed to the listed hosts and ports"),
    "net.allow_udp": ("no UDP", "allowed to the listed hosts and ports; port 443 (QUIC) is denied"),
    "net.allow_hosts": ("only these hosts and ports; special addresses are always denied", ""),
}
_CHANGE_FIELDS: Final = frozenset({"fs.allow_mkdir", "fs.allow_remove", "fs.allow_rename", "fs.max_write_bytes"})
_FILE_RULES: Final = {
    "fs.enabled": "of the host's files, only those in fs.read_roots and fs.write_roots are visible",
    "fs.deny_hidden": "if true, files with hidden names are copied neither into the sandbox nor back",
    "fs.allow_symlinks": "if false, symbolic links are not copied; links to paths outside the folder are never copied",
    "fs.allow_mkdir": "if false, new folders are refused when the program has ended",
    "fs.allow_remove": "if false, deletions are refused when the program has ended",
    "fs.allow_rename": "if false, renames are refused when the program has ended",
    "fs.max_read_bytes": "larger files are not copied into the sandbox; 0 means 16 MiB",
    "fs.max_write_bytes": "larger files are not copied back; 0 means 16 MiB",
    "fs.max_entries": "a folder with more refuses the run; if more change, all changes are discarded; 0 means 10,000",
    "fs.max_depth": "deeper entries are copied neither into the sandbox nor back; 0 means 64, more than 256 means 256",
}


def _always(by: str, why: str) -> Row:
    return lambda _asked, _field: Answer("enforced", by, why)


def _limit(by: str, why: str) -> Row:
    def row(given: PlanInput, field: str) -> Answer:
        if field in given.features.can_enforce:
            return Answer("enforced", given.own(by), why)
        return _not_enforced(given, "this backend cannot enforce this limit")

    return row


def _not_enforced(given: PlanInput, why: str) -> Answer:
    """Return the answer for an unenforceable value: refused, unless the user accepted weaker isolation."""
    return Answer("advisory" if given.features.weaker_isolation_accepted else "refused", _NOBODY, why)


def _advice(given: PlanInput, field: str) -> Answer:
    del given
    if variable := _VARIABLES.get(field):
        return Answer("advisory", "X07's libraries", f"passed to the program as {variable}")
    return Answer("advisory", "X07's compiler", "applies to X07 programs only")


def _label(_asked: PlanInput, _field: str) -> Answer:
    return Answer("advisory", "people", "a description for people; it restricts nothing")


def _roots(given: PlanInput, field: str) -> Answer:
    roots = [str(root) for root in given.entries(field)]
    if not roots or not given.files:
        return _no_files(given, field)
    if "host-files" not in given.features.can_enforce:
        return Answer("refused", _NOBODY, "this backend cannot provide host files")
    hidden = given.values["fs.deny_hidden"] is True
    for root in roots:
        where, why = guest_path(root, CWD, deny_hidden=hidden)
        if where is None:
            bare = guest_path(root, CWD, deny_hidden=False)[0]
            instead = None if bare is None else ("fs.deny_hidden", False)
            what = f"{ascii(root)[1:-1]} cannot be copied into the sandbox, because {why}"
            return Answer("refused", _NOBODY, what, instead)
    if field == "fs.read_roots":
        return Answer(
            "enforced", _COPY, "copied into the sandbox; changes are copied back only from a folder in fs.write_roots"
        )
    return Answer("enforced", _CHANGES, "copied into the sandbox; changes are copied back only after a check")


def _copied(given: PlanInput, field: str) -> Answer:
    """Return the answer for a field that controls which files are copied in and back."""
    if not given.files:
        return _no_files(given, field)
    by = _CHANGES if field in _CHANGE_FIELDS else _COPY
    return Answer("enforced", by, _FILE_RULES[field])


def _no_files(given: PlanInput, field: str) -> Answer:
    if "no-host-files" not in given.features.can_enforce:
        return _not_enforced(given, "this backend does not hide host files")
    why = given.features.words.no_files
    folders = field in {"fs.enabled", "fs.read_roots", "fs.write_roots"}
    if not folders:
        why += ", so there is nothing to limit"
    if given.values["fs.enabled"] is True and "host-files" in given.features.can_enforce:
        why += "; only --out adds a folder" if folders else ", except in the folder of --out"
    if given.values["fs.enabled"] is False and given.entries(field):
        why += ", because fs.enabled is false"
    return Answer("enforced", given.boundary, why)


def _network(given: PlanInput, field: str) -> Answer:
    if not given.policy.may_connect:
        return _no_network(given, field)
    if "network" not in given.features.can_enforce:
        if field == "net.allow_hosts" and given.policy.net.allow_hosts:
            return Answer("refused", _NOBODY, "this backend cannot enforce a list of hosts")
        return Answer("enforced", _PLAN, "nothing runs: the list of hosts is refused")
    why = _NETWORK_RULES[field][given.values[field] is True]
    if field == "net.allow_hosts" and "held-connections" not in given.features.can_enforce:
        why += "; a denied connection is reset after connect() succeeded"
    if field == "net.allow_hosts" and given.proxy_resolves:
        why += "; your proxy resolves the names, so the addresses of names are its choice and not checked"
    return Answer("enforced", _GATE, why)


def _no_network(given: PlanInput, _field: str) -> Answer:
    if "no-network" not in given.features.can_enforce:
        return _not_enforced(given, "this backend does not block the network")
    seen = "" if "observed-connections" in given.features.can_enforce else "; attempts are not observed"
    return Answer("enforced", given.boundary, f"no hosts are allowed, and {given.features.words.no_network}{seen}")


def _database(given: PlanInput, field: str) -> Answer:
    if given.servers and not given.policy.may_connect:
        why = "database servers need net.enabled, and entries in db.net or net.allow_hosts"
        return Answer("refused", _NOBODY, why)
    if given.servers and "network" in given.features.can_enforce:
        return _advice(given, field)
    if given.policy.database_servers and not given.policy.net.allow_hosts:
        return Answer("refused", _NOBODY, "this backend cannot enforce a list of servers")
    if _no_network(given, field).state == "enforced":
        advice = _advice(given, field)
        return Answer(
            "advisory", advice.by, f"{advice.why}; the program reaches no database server, but can open database files"
        )
    return _advice(given, field)


def _database_net(given: PlanInput, field: str) -> Answer:
    if not given.servers or "network" not in given.features.can_enforce:
        return _no_network(given, field)
    if not given.policy.may_connect:
        return Answer("enforced", _PLAN, "nothing runs: db.enabled is refused")
    if field in _REQUIRES:
        return _advice(given, field)
    return Answer("enforced", _GATE, "allowed for TCP, in addition to net.allow_hosts")


def _no_variables(given: PlanInput, field: str) -> Answer:
    if "no-host-variables" not in given.features.can_enforce:
        return _not_enforced(given, "this backend does not hide the host's variables")
    if field == "env.allow_keys" and given.entries(field) and given.values["env.enabled"] is True:
        own = sorted(str(key) for key in given.entries(field) if str(key).startswith("X07_"))
        if own:
            why = f"{', '.join(own)} cannot be passed from the host, because these names are reserved for X07"
            return Answer("refused", _NOBODY, why)
        return Answer("enforced", given.boundary, "of the host's variables, only these are passed, if they are set")
    if field == "env.deny_keys" and given.entries(field):
        names = map(str, given.entries(field))
        own = sorted(key for key in names if key == "X07_WORLD" or key.startswith("X07_OS_"))
        if own:
            return Answer("refused", _NOBODY, f"{', '.join(own)} are set for every program")
        return Answer("enforced", given.boundary, "these are never set")
    why = "only fixed variables and X07's own are set; a run that sets others is refused"
    if given.values["env.enabled"] is True:
        keys = given.entries("env.allow_keys")
        of_host = "the host's variables in env.allow_keys" if keys else "none of the host's variables"
        why = f"{of_host}; also fixed ones, X07's own, and those that the caller sets"
    return Answer("enforced", given.boundary, why)


_UNCONFINED: Final = Answer("refused", _NOBODY, "this backend does not confine programs")


def _threads(given: PlanInput, _field: str) -> Answer:
    if given.values["threads.enabled"] is True:
        return _within_tasks(given, "allowed, within limits.procs")
    if "confinement" not in given.features.can_enforce:
        return _UNCONFINED
    return Answer("enforced", given.own(_SECCOMP), "creating a second thread fails with EPERM")


def _within_tasks(given: PlanInput, why: str) -> Answer:
    limited = "limits.procs" in given.features.can_enforce
    return Answer("enforced", given.own(_CGROUP), why) if limited else Answer("enforced", _PLAN, "allowed")


def _deadline(given: PlanInput, _field: str) -> Answer:
    if given.features.separates_program:
        return Answer("enforced", "the host's clock", "everything that the program started is killed at the deadline")
    return _not_enforced(given, "the program is stopped at the deadline, unless it kills its supervisor first")


def _spawn(given: PlanInput, _field: str) -> Answer:
    if given.policy.process.may_spawn:
        return _within_tasks(given, "allowed, within limits.procs and process.max_live")
    if "confinement" not in given.features.can_enforce:
        return _UNCONFINED
    return Answer("enforced", given.own(_SECCOMP), "creating a child process fails with EPERM")


def _allow_exec(given: PlanInput, field: str) -> Answer:
    if given.policy.process.may_execute:
        why = "allowed for the programs in process.allow_execs and process.allow_exec_prefixes"
        return Answer("enforced", given.boundary, why)
    if field == "process.enabled" and given.values[field] is True:
        return Answer("enforced", given.boundary, "see the other fields of this section")
    if "confinement" not in given.features.can_enforce:
        return _UNCONFINED
    why = "after the program's start, execve fails with EPERM and only the image's code can be loaded"
    return Answer("enforced", given.own(f"{_SECCOMP}, noexec"), why)


def _execs(given: PlanInput, _field: str) -> Answer:
    if given.policy.process.may_execute and names_everything(given.entries("process.allow_exec_prefixes")):
        return Answer("enforced", given.boundary, 'the prefix "/" allows every program')
    if "confinement" not in given.features.can_enforce:
        return _UNCONFINED
    if not given.policy.process.may_execute:
        return Answer("enforced", given.own(_SECCOMP), "nothing may be executed")
    why = "unlisted programs cannot be executed, and unlisted programs of the image cannot be read (EACCES)"
    if entries := ", ".join(ascii(entry)[1:-1] for entry in _writable_entries(given)):
        why += f"; the program may write and then execute files below: {entries}"
    return Answer("enforced", given.own("Landlock rules, noexec"), why)


def _writable_entries(given: PlanInput) -> list[str]:
    """Return those entries of process.allow_execs and allow_exec_prefixes that match files which the program can write.

    An absolute read root counts as writable if it may be the same host folder as a relative write root, and vice versa.
    """
    named = [str(root) for root in given.entries("fs.write_roots")] if given.files else []
    forms = {root.startswith("/") for root in named}
    named += [root for root in map(str, given.entries("fs.read_roots")) if (not root.startswith("/")) in forms]
    roots = [path for root in named if (path := guest_path(root, CWD, deny_hidden=False)[0])]
    prefixes = [str(entry) for entry in given.entries("process.allow_exec_prefixes")]
    files = [str(entry) for entry in given.entries("process.allow_execs")]
    found = prefixes_into(prefixes, (*WRITABLE, *roots), CWD)
    return [*found, *(file for file in files if entry_path(file, CWD) in roots)]


def _max_live(given: PlanInput, _field: str) -> Answer:
    not_larger = given.policy.limits.procs <= given.policy.process.max_live
    if not_larger and "limits.procs" in given.features.can_enforce:
        return Answer("enforced", given.own(_CGROUP), "limits.procs is not larger, and it counts children too")
    if "confinement" not in given.features.can_enforce:
        return _not_enforced(given, "this backend does not confine programs")
    if not given.policy.process.may_spawn:
        return Answer("enforced", given.own(_SECCOMP), "no child may be started")
    return Answer("enforced", given.own(_CGROUP), "used in place of the larger limits.procs; threads count as children")


def _kill(given: PlanInput, field: str) -> Answer:
    if given.values[field] is True:
        return Answer("enforced", given.boundary, "everything that the program started ends with the run")
    return Answer("advisory", "X07's libraries", "processes end with the run in any case")


# One row per field: enforced ones first, then advisory ones.
TABLE: Final[dict[str, Row]] = {
    "schema_version": _always("the policy check", f"formats other than {SCHEMA_VERSION} are rejected"),
    "policy_id": _label,
    "notes": _label,
    "limits.wall_ms": _deadline,
    "limits.cpu_ms": _limit(_CGROUP, "CPU time of the program and its children"),
    "limits.mem_bytes": _limit(_CGROUP, "memory of the program and its children, without swap"),
    "limits.fds": _limit(_RLIMIT, "open file descriptors of each process"),
    "limits.procs": _limit(_CGROUP, "processes and threads besides the program's first thread"),
    "limits.core_dumps": _limit(_RLIMIT, "without core dumps, the maximum size of a core file is 0"),
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
