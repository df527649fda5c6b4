"""The X07_OS_* variables by which a policy reaches X07's own run-time libraries inside the guest.

They bind only programs that ask them; what an untrusted program cannot escape is elsewhere (see the plan).
"""

from x07_sandbox.policy.model import HostPorts, Policy, leaf_values

# Variable, and the field that it carries; in the order of the model.
VARIABLES: tuple[tuple[str, str], ...] = (
    ("X07_OS_FS", "fs.enabled"),
    ("X07_OS_FS_READ_ROOTS", "fs.read_roots"),
    ("X07_OS_FS_WRITE_ROOTS", "fs.write_roots"),
    ("X07_OS_DENY_HIDDEN", "fs.deny_hidden"),
    ("X07_OS_FS_ALLOW_SYMLINKS", "fs.allow_symlinks"),
    ("X07_OS_FS_ALLOW_MKDIR", "fs.allow_mkdir"),
    ("X07_OS_FS_ALLOW_REMOVE", "fs.allow_remove"),
    ("X07_OS_FS_ALLOW_RENAME", "fs.allow_rename"),
    ("X07_OS_FS_ALLOW_WALK", "fs.allow_walk"),
    ("X07_OS_FS_ALLOW_GLOB", "fs.allow_glob"),
    ("X07_OS_FS_MAX_READ_BYTES", "fs.max_read_bytes"),
    ("X07_OS_FS_MAX_WRITE_BYTES", "fs.max_write_bytes"),
    ("X07_OS_FS_MAX_ENTRIES", "fs.max_entries"),
    ("X07_OS_FS_MAX_DEPTH", "fs.max_depth"),
    ("X07_OS_NET", "net.enabled"),
    ("X07_OS_NET_ALLOW_DNS", "net.allow_dns"),
    ("X07_OS_NET_ALLOW_TCP", "net.allow_tcp"),
    ("X07_OS_NET_ALLOW_UDP", "net.allow_udp"),
    ("X07_OS_NET_ALLOW_HOSTS", "net.allow_hosts"),
    ("X07_OS_DB", "db.enabled"),
    ("X07_OS_DB_SQLITE", "db.drivers.sqlite"),
    ("X07_OS_DB_PG", "db.drivers.postgres"),
    ("X07_OS_DB_MYSQL", "db.drivers.mysql"),
    ("X07_OS_DB_REDIS", "db.drivers.redis"),
    ("X07_OS_DB_MAX_LIVE_CONNS", "db.max_live_conns"),
    ("X07_OS_DB_MAX_QUERIES", "db.max_queries"),
    ("X07_OS_DB_MAX_CONNECT_TIMEOUT_MS", "db.connect_timeout_ms"),
    ("X07_OS_DB_MAX_QUERY_TIMEOUT_MS", "db.query_timeout_ms"),
    ("X07_OS_DB_MAX_SQL_BYTES", "db.max_sql_bytes"),
    ("X07_OS_DB_MAX_ROWS", "db.max_rows"),
    ("X07_OS_DB_MAX_RESP_BYTES", "db.max_resp_bytes"),
    ("X07_OS_DB_SQLITE_ALLOW_PATHS", "db.sqlite.allow_paths"),
    ("X07_OS_DB_SQLITE_READONLY_ONLY", "db.sqlite.readonly_only"),
    ("X07_OS_DB_SQLITE_ALLOW_CREATE", "db.sqlite.allow_create"),
    ("X07_OS_DB_SQLITE_ALLOW_IN_MEMORY", "db.sqlite.allow_in_memory"),
    ("X07_OS_DB_NET_ALLOW_DNS", "db.net.allow_dns"),
    ("X07_OS_DB_NET_ALLOW_CIDRS", "db.net.allow_cidrs"),
    ("X07_OS_DB_NET_ALLOW_PORTS", "db.net.allow_ports"),
    ("X07_OS_DB_NET_REQUIRE_TLS", "db.net.require_tls"),
    ("X07_OS_DB_NET_REQUIRE_VERIFY", "db.net.require_verify"),
    ("X07_OS_ENV", "env.enabled"),
    ("X07_OS_ENV_ALLOW_KEYS", "env.allow_keys"),
    ("X07_OS_ENV_DENY_KEYS", "env.deny_keys"),
    ("X07_OS_TIME", "time.enabled"),
    ("X07_OS_TIME_ALLOW_MONOTONIC", "time.allow_monotonic"),
    ("X07_OS_TIME_ALLOW_WALL_CLOCK", "time.allow_wall_clock"),
    ("X07_OS_TIME_ALLOW_SLEEP", "time.allow_sleep"),
    ("X07_OS_TIME_MAX_SLEEP_MS", "time.max_sleep_ms"),
    ("X07_OS_TIME_ALLOW_LOCAL_TZID", "time.allow_local_tzid"),
    ("X07_OS_THREADS", "threads.enabled"),
    ("X07_OS_THREADS_MAX_WORKERS", "threads.max_workers"),
    ("X07_OS_THREADS_MAX_BLOCKING", "threads.max_blocking"),
    ("X07_OS_THREADS_MAX_QUEUE", "threads.max_queue"),
    ("X07_OS_PROC", "process.enabled"),
    ("X07_OS_PROC_ALLOW_SPAWN", "process.allow_spawn"),
    ("X07_OS_PROC_MAX_LIVE", "process.max_live"),
    ("X07_OS_PROC_MAX_SPAWNS", "process.max_spawns"),
    ("X07_OS_PROC_ALLOW_EXEC", "process.allow_exec"),
    ("X07_OS_PROC_ALLOW_EXIT", "process.allow_exit"),
    ("X07_OS_PROC_ALLOW_EXECS", "process.allow_execs"),
    ("X07_OS_PROC_ALLOW_EXEC_PREFIXES", "process.allow_exec_prefixes"),
    ("X07_OS_PROC_ALLOW_ARGS_REGEX_LITE", "process.allow_args_regex_lite"),
    ("X07_OS_PROC_ALLOW_ENV_KEYS", "process.allow_env_keys"),
    ("X07_OS_PROC_MAX_EXE_BYTES", "process.max_exe_bytes"),
    ("X07_OS_PROC_MAX_ARGS", "process.max_args"),
    ("X07_OS_PROC_MAX_ARG_BYTES", "process.max_arg_bytes"),
    ("X07_OS_PROC_MAX_ENV", "process.max_env"),
    ("X07_OS_PROC_MAX_ENV_KEY_BYTES", "process.max_env_key_bytes"),
    ("X07_OS_PROC_MAX_ENV_VAL_BYTES", "process.max_env_val_bytes"),
    ("X07_OS_PROC_MAX_RUNTIME_MS", "process.max_runtime_ms"),
    ("X07_OS_PROC_MAX_STDOUT_BYTES", "process.max_stdout_bytes"),
    ("X07_OS_PROC_MAX_STDERR_BYTES", "process.max_stderr_bytes"),
    ("X07_OS_PROC_MAX_TOTAL_BYTES", "process.max_total_bytes"),
    ("X07_OS_PROC_MAX_STDIN_BYTES", "process.max_stdin_bytes"),
    ("X07_OS_PROC_KILL_ON_DROP", "process.kill_on_drop"),
    ("X07_OS_PROC_KILL_TREE", "process.kill_tree"),
    ("X07_OS_PROC_ALLOW_CWD", "process.allow_cwd"),
    ("X07_OS_PROC_ALLOW_CWD_ROOTS", "process.allow_cwd_roots"),
)


def program_environment(policy: Policy) -> dict[str, str]:
    """Every X07 variable of a sandboxed program; nothing of the host's environment is among them."""
    values = leaf_values(policy)
    carried = {variable: _text(values[field]) for variable, field in VARIABLES}
    return {"X07_WORLD": "run-os-sandboxed", "X07_OS_SANDBOXED": "1", **carried}


def _text(value: object) -> str:
    match value:
        case bool():
            return "1" if value else "0"
        case tuple():
            # Ports are joined by commas, everything else by semicolons.
            return ("," if value and isinstance(value[0], int) else ";").join(_entry(entry) for entry in value)
        case _:
            return str(value)


def _entry(entry: object) -> str:
    if isinstance(entry, HostPorts):
        return f"{entry.host}:{','.join(str(port) for port in entry.ports)}"
    return str(entry)
