"""The policy document x07.run-os-policy@0.1.0 as one typed model.

Ranges, defaults and one-line descriptions are defined here. The decoder, schemas/run-os-policy.schema.json and
docs/reference/policy.md are made from them. decode.py contains the rules that a schema cannot express. An absent
section is ``UNSET``. OPTIONAL_SECTIONS and ``Policy.threads_in_force`` give the effective values of absent sections.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from x07_sandbox.errors import Command, Text, UsageError

SCHEMA_VERSION: Literal["x07.run-os-policy@0.1.0"] = "x07.run-os-policy@0.1.0"

Path = Annotated[str, Meta(min_length=1, max_length=4096)]
EnvKey = Annotated[str, Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=255)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Millis = Annotated[int, Meta(ge=0, le=600_000)]
U32 = Annotated[int, Meta(ge=0, le=4_294_967_295)]
Count1024 = Annotated[int, Meta(ge=0, le=1024)]
ArgBytes = Annotated[int, Meta(ge=0, le=1_048_576)]
StreamBytes = Annotated[int, Meta(ge=0, le=268_435_456)]
Million = Annotated[int, Meta(ge=0, le=1_000_000)]
Roots = Annotated[tuple[Path, ...], Meta(max_length=128)]
Paths = Annotated[tuple[Path, ...], Meta(max_length=256)]
EnvKeys = Annotated[tuple[EnvKey, ...], Meta(max_length=256)]
Names = Annotated[tuple[Name, ...], Meta(max_length=256)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every object in the document. It is immutable and rejects unknown fields."""


class Limits(Section, frozen=True, kw_only=True):
    """Resources that the program may use."""

    cpu_ms: Annotated[
        int, Meta(ge=1, le=600_000, description="CPU time of the program and its children, in milliseconds.")
    ]
    wall_ms: Annotated[
        int, Meta(ge=1, le=600_000, description="Time from the program's start to its end, in milliseconds.")
    ]
    mem_bytes: Annotated[
        int, Meta(ge=1_048_576, le=17_179_869_184, description="Memory of the program and its children, in bytes.")
    ]
    fds: Annotated[Count1024, Meta(description="Open file descriptors of one process.")]
    procs: Annotated[Count1024, Meta(description="Processes and threads besides the program's first thread.")]
    core_dumps: Annotated[bool, Meta(description="Whether a crash may leave a core file.")] = False


class Fs(Section, frozen=True, kw_only=True):
    """Host files. The program works on copies. Changes are copied back after the run."""

    enabled: Annotated[bool, Meta(description="Whether the program gets host files at all.")]
    read_roots: Annotated[Roots, Meta(description="Files and folders that the program may read.")]
    write_roots: Annotated[Roots, Meta(description="Files and folders that the program may read and modify.")]
    deny_hidden: Annotated[bool, Meta(description="Leave out files and folders whose name starts with a dot.")]
    allow_symlinks: Annotated[bool, Meta(description="Whether symbolic links may be followed and created.")] = False
    allow_mkdir: Annotated[bool, Meta(description="Whether folders may be created.")] = False
    allow_remove: Annotated[bool, Meta(description="Whether files and folders may be removed.")] = False
    allow_rename: Annotated[bool, Meta(description="Whether files and folders may be renamed.")] = False
    allow_walk: Annotated[bool, Meta(description="Whether a folder tree may be walked.")] = False
    allow_glob: Annotated[bool, Meta(description="Whether files may be found by pattern.")] = False
    max_read_bytes: Annotated[U32, Meta(description="Largest file to read, in bytes; 0 means 16 MiB.")] = 0
    max_write_bytes: Annotated[U32, Meta(description="Largest file to write, in bytes; 0 means 16 MiB.")] = 0
    max_entries: Annotated[U32, Meta(description="Maximum number of files and folders in a root; 0 means 10000.")] = 0
    max_depth: Annotated[U32, Meta(description="Depth limit of a walk; 0 means 64.")] = 0


class HostPorts(Section, frozen=True, kw_only=True):
    """One host and its ports."""

    host: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=255,
            pattern=r"^[^;\s]+$",
            description="A DNS name, an IP address, a CIDR network or a range of addresses.",
        ),
    ]
    ports: Annotated[tuple[Port, ...], Meta(max_length=64, description="Ports on that host; at least one.")]


class Net(Section, frozen=True, kw_only=True):
    """Network connections. The guest has no network card, and the host decides on each connection."""

    enabled: Annotated[bool, Meta(description="Whether the program may use the network at all.")]
    allow_dns: Annotated[bool, Meta(description="Whether names may be resolved.")]
    allow_tcp: Annotated[bool, Meta(description="Whether TCP connections may be made.")]
    allow_udp: Annotated[bool, Meta(description="Whether UDP may be used.")]
    allow_hosts: Annotated[
        tuple[HostPorts, ...],
        Meta(max_length=256, description='Hosts that the program may connect to, each {"host": ..., "ports": [...]}.'),
    ]


class Env(Section, frozen=True, kw_only=True):
    """Environment variables that an X07 program may read. Only the variables in allow_keys are passed from the host."""

    enabled: Annotated[bool, Meta(description="Whether environment variables may be read.")]
    allow_keys: Annotated[EnvKeys, Meta(description="Variables that may be read.")]
    deny_keys: Annotated[EnvKeys, Meta(description="Variables that may not be read, even if allow_keys lists them.")]


class Time(Section, frozen=True, kw_only=True):
    """Clocks and sleeping."""

    enabled: Annotated[bool, Meta(description="Whether clocks may be used.")]
    allow_monotonic: Annotated[bool, Meta(description="Whether the monotonic clock may be read.")]
    allow_wall_clock: Annotated[bool, Meta(description="Whether the time of day may be read.")]
    allow_sleep: Annotated[bool, Meta(description="Whether the program may sleep.")]
    max_sleep_ms: Annotated[int, Meta(ge=0, le=86_400_000, description="Longest sleep, in milliseconds.")]
    allow_local_tzid: Annotated[bool, Meta(description="Whether the name of the time zone may be read.")]


class Language(Section, frozen=True, kw_only=True):
    """Language features that X07's compiler accepts."""

    allow_unsafe: Annotated[bool, Meta(description="Whether unsafe code compiles.")]
    allow_ffi: Annotated[bool, Meta(description="Whether calls into foreign code compile.")]


class Threads(Section, frozen=True, kw_only=True):
    """Threads of the program."""

    enabled: Annotated[bool, Meta(description="Whether the program may start threads.")]
    max_workers: Annotated[int, Meta(ge=0, le=256, description="Worker threads; 0 lets the runtime choose.")]
    max_blocking: Annotated[int, Meta(ge=0, le=4096, description="Threads for blocking calls.")]
    max_queue: Annotated[Million, Meta(description="Tasks that may wait for a thread.")]


class Process(Section, frozen=True, kw_only=True):
    """Processes that the program starts."""

    enabled: Annotated[bool, Meta(description="Whether the program may use processes at all.")]
    allow_spawn: Annotated[bool, Meta(description="Whether child processes may be started.")]
    max_live: Annotated[Count1024, Meta(description="Children alive at the same time.")]
    max_spawns: Annotated[Count1024, Meta(description="Children started in total.")]
    allow_exec: Annotated[bool, Meta(description="Whether other programs may be executed.")]
    allow_exit: Annotated[bool, Meta(description="Whether the program may choose its exit status.")]
    allow_execs: Annotated[Paths, Meta(description="Programs that may be executed, by path.")] = ()
    allow_exec_prefixes: Annotated[Paths, Meta(description="Path prefixes below which programs may be executed.")] = ()
    allow_args_regex_lite: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...],
        Meta(max_length=128, description="Patterns that a child's arguments must match."),
    ] = ()
    allow_env_keys: Annotated[EnvKeys, Meta(description="Variables that may be passed to a child.")] = ()
    max_exe_bytes: Annotated[ArgBytes, Meta(description="Longest path of a program to execute, in bytes.")] = 4096
    max_args: Annotated[Count1024, Meta(description="Arguments of a child.")] = 64
    max_arg_bytes: Annotated[ArgBytes, Meta(description="Longest argument of a child, in bytes.")] = 4096
    max_env: Annotated[Count1024, Meta(description="Variables of a child.")] = 64
    max_env_key_bytes: Annotated[
        int, Meta(ge=0, le=4096, description="Longest name of a child's variable, in bytes.")
    ] = 256
    max_env_val_bytes: Annotated[ArgBytes, Meta(description="Longest value of a child's variable, in bytes.")] = 4096
    max_runtime_ms: Annotated[Millis, Meta(description="Time that a child may run, in milliseconds.")] = 0
    max_stdout_bytes: Annotated[StreamBytes, Meta(description="Standard output of a child, in bytes.")] = 0
    max_stderr_bytes: Annotated[StreamBytes, Meta(description="Standard error of a child, in bytes.")] = 0
    max_total_bytes: Annotated[
        int, Meta(ge=0, le=536_870_912, description="Standard output and error of a child together, in bytes.")
    ] = 0
    max_stdin_bytes: Annotated[StreamBytes, Meta(description="Standard input of a child, in bytes.")] = 0
    kill_on_drop: Annotated[bool, Meta(description="Whether a child is killed when the program drops its handle.")] = (
        True
    )
    kill_tree: Annotated[bool, Meta(description="Whether a child's own children are killed with it.")] = True
    allow_cwd: Annotated[bool, Meta(description="Whether a child may start in another folder.")] = False
    allow_cwd_roots: Annotated[Roots, Meta(description="Folders in which a child may start.")] = ()

    @property
    def may_spawn(self) -> bool:
        """Whether child processes may be started."""
        return self.enabled and self.allow_spawn and self.max_live > 0

    @property
    def may_execute(self) -> bool:
        """Whether other programs may be executed."""
        return self.enabled and self.allow_exec


class Drivers(Section, frozen=True, kw_only=True):
    """Kinds of database."""

    sqlite: Annotated[bool, Meta(description="Whether SQLite may be used.")]
    postgres: Annotated[bool, Meta(description="Whether PostgreSQL may be used.")]
    mysql: Annotated[bool, Meta(description="Whether MySQL may be used.")]
    redis: Annotated[bool, Meta(description="Whether Redis may be used.")] = False


class Sqlite(Section, frozen=True, kw_only=True):
    """SQLite files."""

    allow_paths: Annotated[Paths, Meta(description="Database files to open.")] = ()
    readonly_only: Annotated[bool, Meta(description="Open databases for reading only.")] = False
    allow_create: Annotated[bool, Meta(description="Whether database files may be created.")] = False
    allow_in_memory: Annotated[bool, Meta(description="Whether in-memory databases may be used.")] = False


class DbNet(Section, frozen=True, kw_only=True):
    """Database servers."""

    allow_dns: Annotated[Names, Meta(description="Servers by name.")] = ()
    allow_cidrs: Annotated[Names, Meta(description="Servers by network.")] = ()
    allow_ports: Annotated[tuple[Port, ...], Meta(max_length=256, description="Ports of servers.")] = ()
    require_tls: Annotated[bool, Meta(description="Refuse servers without TLS (false if db.net is absent).")] = True
    require_verify: Annotated[
        bool, Meta(description="Refuse servers with an invalid certificate (false if db.net is absent).")
    ] = True


class Db(Section, frozen=True, kw_only=True):
    """Databases."""

    enabled: Annotated[bool, Meta(description="Whether databases may be used.")]
    drivers: Drivers
    max_live_conns: Annotated[Count1024, Meta(description="Connections open at the same time.")] = 0
    max_queries: Annotated[Million, Meta(description="Queries in total.")] = 0
    connect_timeout_ms: Annotated[Millis, Meta(description="Time to connect, in milliseconds.")] = 0
    query_timeout_ms: Annotated[Millis, Meta(description="Time of one query, in milliseconds.")] = 0
    max_sql_bytes: Annotated[int, Meta(ge=0, le=10_485_760, description="Longest statement, in bytes.")] = 0
    max_rows: Annotated[Million, Meta(description="Rows of one result.")] = 0
    max_resp_bytes: Annotated[int, Meta(ge=0, le=134_217_728, description="Largest result, in bytes.")] = 0
    sqlite: Sqlite | UnsetType = UNSET
    net: DbNet | UnsetType = UNSET


class Policy(Section, frozen=True, kw_only=True):
    """What a program may access, and its limits."""

    schema_version: Annotated[
        Literal["x07.run-os-policy@0.1.0"], Meta(description="Format of the document; exactly this value.")
    ]
    policy_id: Annotated[
        str,
        Meta(
            pattern=r"^[a-zA-Z0-9_.-]{1,64}$",
            description="An id that appears in records: letters, digits, '_', '.', '-'.",
        ),
    ]
    notes: Annotated[str, Meta(max_length=4096, description="Free text.")] | UnsetType = UNSET
    limits: Limits
    fs: Fs
    net: Net
    db: Db | UnsetType = UNSET
    env: Env
    time: Time
    language: Language | UnsetType = UNSET
    threads: Threads | UnsetType = UNSET
    process: Process

    @property
    def database_servers(self) -> DbNet | None:
        """The servers in db.net, if databases on servers are enabled."""
        if not isinstance(self.db, Db) or not isinstance(self.db.net, DbNet) or not self.db.enabled:
            return None
        drivers = self.db.drivers
        return self.db.net if drivers.postgres or drivers.mysql or drivers.redis else None

    @property
    def may_connect(self) -> bool:
        """Whether the program may connect to any host."""
        servers = self.database_servers
        listed = self.net.allow_hosts or (servers and (servers.allow_dns or servers.allow_cidrs))
        return self.net.enabled and bool(listed)

    @property
    def notes_in_force(self) -> str:
        """The notes, or "" if there are none."""
        return "" if isinstance(self.notes, UnsetType) else self.notes

    @property
    def threads_in_force(self) -> Threads:
        """The threads section. If the section is absent, threads are allowed."""
        return ABSENT_THREADS if isinstance(self.threads, UnsetType) else self.threads


ABSENT_LANGUAGE = Language(allow_unsafe=False, allow_ffi=False)  # without the section, both are forbidden
ABSENT_THREADS = Threads(enabled=True, max_workers=0, max_blocking=4, max_queue=1024)
FILE_BYTES = 16 << 20  # in place of 0 in max_read_bytes and max_write_bytes
# Effective values of absent sections.
OPTIONAL_SECTIONS = {
    "db": Db(enabled=False, drivers=Drivers(sqlite=False, postgres=False, mysql=False)),
    "db.sqlite": Sqlite(),
    # Not the fields' defaults: X07's own runner requires neither if the section is absent.
    "db.net": DbNet(require_tls=False, require_verify=False),
    "language": ABSENT_LANGUAGE,
    "threads": ABSENT_THREADS,
}


def paths(section: str, names: str) -> tuple[str, ...]:
    """Return the paths of fields of a section. names: the fields' names, separated by blanks."""
    return tuple(f"{section}.{name}" for name in names.split())


def leaf_values(policy: Policy) -> dict[str, object]:
    """Return every field's effective value by path ("limits.wall_ms"), in the model's order; a list is one field."""
    return dict(_leaves(policy, ""))


def _leaves(section: Section, prefix: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if value is UNSET:
            value = OPTIONAL_SECTIONS.get(f"{prefix}{name}", "")  # only the notes are neither
        if isinstance(value, Section):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


HUGE: int = 10**20  # replaces every larger number in a document; outside the range of every field
MISSING = "is missing"  # the message for a required field that is absent
ADVICE = "Correct the policy. docs/reference/policy.md describes every field"
_SHOWN_CHARS = 80  # of an untrusted key, in a message


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One problem at one place of the document.

    json_path: the place, such as ``$.limits.cpu_ms`` or ``$.net.allow_hosts[2].ports``. message: without a full stop.
    suggestion: the key or value that the author probably meant.
    """

    json_path: str
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        """Return one line of a list: place, colon, message, suggestion."""
        return self._line("the document" if self.json_path == "$" else f"{self.json_path}:")

    @property
    def sentence(self) -> str:
        """One sentence: place, message, suggestion."""
        return self._line("the document" if self.json_path == "$" else self.json_path)

    def _line(self, place: str) -> str:
        hint = f"; did you mean {self.suggestion}?" if self.suggestion else ""
        return f"{place} {self.message}{hint}"


class EffectivePolicy(NamedTuple):
    """The policy that applies to a run. base: the policy's path, `built-in:TEMPLATE` or id.

    denied: denied ports by host, from --deny-host; None stands for all ports.
    own: the limits before the request changed any; None if the request changed none. may_raise: whether flags may raise
    the limits. file_name: the usual name of its file, if flags changed the policy.
    """

    policy: Policy
    data: bytes
    base: str
    denied: Mapping[str, set[int] | None] = MappingProxyType({})
    own: Limits | None = None
    may_raise: bool = False
    file_name: str = ""


class PolicyError(UsageError):
    """A policy document is invalid. ``problems`` lists all its problems.

    in_schema: whether the document matches the schema and violates only rules that a schema cannot express.
    """

    code = "policy"
    before_fix = "\n  "

    def __init__(
        self, what: str, why: str, fix: Text, problems: Iterable[Problem] = (), *, in_schema: bool = False
    ) -> None:
        super().__init__(what, why, fix)
        # Not in args: pickle rebuilds from args and then restores these attributes.
        self.problems: tuple[Problem, ...] = tuple(problems)
        self.in_schema = in_schema

    @classmethod
    def of(cls, source: str, problems: Sequence[Problem], *, in_schema: bool = False) -> "PolicyError":
        """Return the error for *problems* (at least one) in the document called *source*."""
        why = "\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)])
        if len(problems) == 1:
            why = problems[0].sentence
        fix: Text = ADVICE
        if any(problem.message == MISSING for problem in problems):
            fix = (f"{ADVICE}. To write a complete policy: ", Command("x07 policy new"))
        return cls(f"policy {source} is invalid", why, fix, problems, in_schema=in_schema)


def json_path(parts: Iterable[str | int]) -> str:
    """Return a path like ``$.a.b[3]``. A key that is not an identifier is quoted, escaped and truncated."""
    text = "$"
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part.isascii() and len(part) <= _SHOWN_CHARS:
            text += f".{part}"
        else:
            shown = part if len(part) <= _SHOWN_CHARS else part[:_SHOWN_CHARS] + "..."
            text += f"[{json.dumps(shown)}]"
    return text
