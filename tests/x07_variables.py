"""The variables that an X07 policy sets for its program: each with its field, a value of that field, and its text.

Written by hand from X07's own runner; no two numbers and no two lists are the same.
"""

from __future__ import annotations

from typing import Any, Final

from tests.policies import document_with

TOLD: Final[tuple[tuple[str, str, object, str], ...]] = (
    ("X07_OS_FS", "fs.enabled", True, "1"),
    ("X07_OS_NET", "net.enabled", False, "0"),
    ("X07_OS_DB", "db.enabled", True, "1"),
    ("X07_OS_ENV", "env.enabled", False, "0"),
    ("X07_OS_TIME", "time.enabled", True, "1"),
    ("X07_OS_PROC", "process.enabled", True, "1"),
    ("X07_OS_THREADS", "threads.enabled", True, "1"),
    ("X07_OS_THREADS_MAX_WORKERS", "threads.max_workers", 11, "11"),
    ("X07_OS_THREADS_MAX_BLOCKING", "threads.max_blocking", 12, "12"),
    ("X07_OS_THREADS_MAX_QUEUE", "threads.max_queue", 13, "13"),
    ("X07_OS_DENY_HIDDEN", "fs.deny_hidden", False, "0"),
    ("X07_OS_FS_READ_ROOTS", "fs.read_roots", ["given", "also given"], "given;also given"),
    ("X07_OS_FS_WRITE_ROOTS", "fs.write_roots", ["written"], "written"),
    ("X07_OS_FS_ALLOW_SYMLINKS", "fs.allow_symlinks", True, "1"),
    ("X07_OS_FS_ALLOW_MKDIR", "fs.allow_mkdir", False, "0"),
    ("X07_OS_FS_ALLOW_REMOVE", "fs.allow_remove", True, "1"),
    ("X07_OS_FS_ALLOW_RENAME", "fs.allow_rename", False, "0"),
    ("X07_OS_FS_ALLOW_WALK", "fs.allow_walk", True, "1"),
    ("X07_OS_FS_ALLOW_GLOB", "fs.allow_glob", False, "0"),
    ("X07_OS_FS_MAX_READ_BYTES", "fs.max_read_bytes", 2001, "2001"),
    ("X07_OS_FS_MAX_WRITE_BYTES", "fs.max_write_bytes", 2002, "2002"),
    ("X07_OS_FS_MAX_ENTRIES", "fs.max_entries", 2003, "2003"),
    ("X07_OS_FS_MAX_DEPTH", "fs.max_depth", 24, "24"),
    ("X07_OS_ENV_ALLOW_KEYS", "env.allow_keys", ["ONE", "TWO"], "ONE;TWO"),
    ("X07_OS_ENV_DENY_KEYS", "env.deny_keys", ["THREE"], "THREE"),
    ("X07_OS_DB_SQLITE", "db.drivers.sqlite", True, "1"),
    ("X07_OS_DB_PG", "db.drivers.postgres", False, "0"),
    ("X07_OS_DB_MYSQL", "db.drivers.mysql", False, "0"),
    ("X07_OS_DB_REDIS", "db.drivers.redis", False, "0"),
    ("X07_OS_DB_SQLITE_READONLY_ONLY", "db.sqlite.readonly_only", True, "1"),
    ("X07_OS_DB_SQLITE_ALLOW_CREATE", "db.sqlite.allow_create", False, "0"),
    ("X07_OS_DB_SQLITE_ALLOW_IN_MEMORY", "db.sqlite.allow_in_memory", True, "1"),
    ("X07_OS_DB_SQLITE_ALLOW_PATHS", "db.sqlite.allow_paths", ["a.db", "b.db"], "a.db;b.db"),
    ("X07_OS_DB_MAX_LIVE_CONNS", "db.max_live_conns", 31, "31"),
    ("X07_OS_DB_MAX_QUERIES", "db.max_queries", 32, "32"),
    ("X07_OS_DB_MAX_CONNECT_TIMEOUT_MS", "db.connect_timeout_ms", 33, "33"),
    ("X07_OS_DB_MAX_QUERY_TIMEOUT_MS", "db.query_timeout_ms", 34, "34"),
    ("X07_OS_DB_MAX_SQL_BYTES", "db.max_sql_bytes", 35, "35"),
    ("X07_OS_DB_MAX_ROWS", "db.max_rows", 36, "36"),
    ("X07_OS_DB_MAX_RESP_BYTES", "db.max_resp_bytes", 37, "37"),
    ("X07_OS_DB_NET_ALLOW_DNS", "db.net.allow_dns", ["db.example", "db2.example"], "db.example;db2.example"),
    ("X07_OS_DB_NET_ALLOW_CIDRS", "db.net.allow_cidrs", ["10.0.0.0/8", "::1/128"], "10.0.0.0/8;::1/128"),
    ("X07_OS_DB_NET_ALLOW_PORTS", "db.net.allow_ports", [5432, 5433], "5432,5433"),
    ("X07_OS_DB_NET_REQUIRE_TLS", "db.net.require_tls", False, "0"),
    ("X07_OS_DB_NET_REQUIRE_VERIFY", "db.net.require_verify", True, "1"),
    ("X07_OS_TIME_ALLOW_WALL_CLOCK", "time.allow_wall_clock", False, "0"),
    ("X07_OS_TIME_ALLOW_MONOTONIC", "time.allow_monotonic", True, "1"),
    ("X07_OS_TIME_ALLOW_SLEEP", "time.allow_sleep", True, "1"),
    ("X07_OS_TIME_MAX_SLEEP_MS", "time.max_sleep_ms", 41, "41"),
    ("X07_OS_TIME_ALLOW_LOCAL_TZID", "time.allow_local_tzid", False, "0"),
    ("X07_OS_PROC_ALLOW_EXIT", "process.allow_exit", False, "0"),
    ("X07_OS_PROC_ALLOW_SPAWN", "process.allow_spawn", True, "1"),
    ("X07_OS_PROC_ALLOW_EXEC", "process.allow_exec", True, "1"),
    ("X07_OS_PROC_ALLOW_EXECS", "process.allow_execs", ["/usr/bin/env", "tool"], "/usr/bin/env;tool"),
    ("X07_OS_PROC_ALLOW_EXEC_PREFIXES", "process.allow_exec_prefixes", ["/usr/bin/p"], "/usr/bin/p"),
    ("X07_OS_PROC_ALLOW_ARGS_REGEX_LITE", "process.allow_args_regex_lite", ["ab*", "c.d"], "ab*;c.d"),
    ("X07_OS_PROC_ALLOW_ENV_KEYS", "process.allow_env_keys", ["FOUR", "FIVE"], "FOUR;FIVE"),
    ("X07_OS_PROC_ALLOW_CWD", "process.allow_cwd", True, "1"),
    ("X07_OS_PROC_ALLOW_CWD_ROOTS", "process.allow_cwd_roots", ["here", "there"], "here;there"),
    ("X07_OS_PROC_MAX_LIVE", "process.max_live", 51, "51"),
    ("X07_OS_PROC_MAX_SPAWNS", "process.max_spawns", 52, "52"),
    ("X07_OS_PROC_MAX_EXE_BYTES", "process.max_exe_bytes", 53, "53"),
    ("X07_OS_PROC_MAX_ARGS", "process.max_args", 54, "54"),
    ("X07_OS_PROC_MAX_ARG_BYTES", "process.max_arg_bytes", 55, "55"),
    ("X07_OS_PROC_MAX_ENV", "process.max_env", 56, "56"),
    ("X07_OS_PROC_MAX_ENV_KEY_BYTES", "process.max_env_key_bytes", 57, "57"),
    ("X07_OS_PROC_MAX_ENV_VAL_BYTES", "process.max_env_val_bytes", 58, "58"),
    ("X07_OS_PROC_MAX_RUNTIME_MS", "process.max_runtime_ms", 59, "59"),
    ("X07_OS_PROC_MAX_STDOUT_BYTES", "process.max_stdout_bytes", 60, "60"),
    ("X07_OS_PROC_MAX_STDERR_BYTES", "process.max_stderr_bytes", 61, "61"),
    ("X07_OS_PROC_MAX_TOTAL_BYTES", "process.max_total_bytes", 62, "62"),
    ("X07_OS_PROC_MAX_STDIN_BYTES", "process.max_stdin_bytes", 63, "63"),
    ("X07_OS_PROC_KILL_ON_DROP", "process.kill_on_drop", False, "0"),
    ("X07_OS_PROC_KILL_TREE", "process.kill_tree", True, "1"),
    ("X07_OS_NET_ALLOW_TCP", "net.allow_tcp", True, "1"),
    ("X07_OS_NET_ALLOW_UDP", "net.allow_udp", False, "0"),
    ("X07_OS_NET_ALLOW_DNS", "net.allow_dns", True, "1"),
    (
        "X07_OS_NET_ALLOW_HOSTS",
        "net.allow_hosts",
        [{"host": "a.example", "ports": [80, 443]}, {"host": "::1", "ports": [1]}],
        "a.example:80,443;::1:1",
    ),
)
ALWAYS: Final = {"X07_WORLD": "run-os-sandboxed", "X07_OS_SANDBOXED": "1"}
EXPECTED: Final = ALWAYS | {variable: text for variable, _, _, text in TOLD}


def policy_document(changes: dict[str, object] | None = None) -> dict[str, Any]:
    """Return a policy with all of these values, and *changes* to them by path."""
    return document_with({field: value for _, field, value, _ in TOLD} | (changes or {}))
