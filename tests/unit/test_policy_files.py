"""Promises about what the model makes: schema file, page, default policy, environment, and upstream's templates."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.default import default_policy, render_policy
from x07_sandbox.policy.environment import VARIABLES, program_environment
from x07_sandbox.policy.model import Policy, leaf_values
from x07_sandbox.policy.schema import fields, policy_schema, render_docs, render_schema

ROOT = Path(__file__).resolve().parents[2]
HINT = "run: python -m x07_sandbox.policy.schema schema > schemas/run-os-policy.schema.json (docs > docs/policy.md)"
MIB = 1 << 20


def test_the_schema_file_is_the_model() -> None:
    """schemas/run-os-policy.schema.json is what the model says."""
    assert (ROOT / "schemas/run-os-policy.schema.json").read_bytes() == render_schema(), HINT


def test_the_page_is_the_model() -> None:
    """docs/policy.md is what the model and the rules say."""
    assert (ROOT / "docs/policy.md").read_text(encoding="utf-8") == render_docs(), HINT


def test_the_schema_is_a_sound_schema_closed_everywhere() -> None:
    """The schema is valid JSON Schema 2020-12, and no object in it takes unknown keys."""
    schema = policy_schema()
    Draft202012Validator.check_schema(schema)
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


def test_every_field_is_documented() -> None:
    """Each field has one line of documentation, and the values in force name exactly the same fields."""
    assert all(field.doc.endswith(".") for field in fields())
    assert [field.path for field in fields()] == list(leaf_values(default_policy()))


def test_the_default_policy_is_what_the_format_page_says() -> None:
    """Without a policy: 60 s, 512 MiB, 64 tasks, no file, no host; spawn and exec allowed."""
    expected: dict[str, Any] = {
        "schema_version": "x07.run-os-policy@0.1.0",
        "policy_id": "sandbox.default.base",
        "limits": limits(60_000, 60_000, 512, 256, 64),
        "fs": fs([], [], allow_remove=True, max_read_bytes=256 * MIB, max_write_bytes=256 * MIB)
        | {"max_entries": 100_000, "max_depth": 128},
        "net": net(on=True),
        "env": {"enabled": True, "allow_keys": [], "deny_keys": []},
        "time": {
            "enabled": True,
            "allow_monotonic": True,
            "allow_wall_clock": True,
            "allow_sleep": True,
            "max_sleep_ms": 86_400_000,
            "allow_local_tzid": False,
        },
        "language": {"allow_unsafe": True, "allow_ffi": True},
        "threads": THREADS,
        "process": {
            **PROCESS,
            "allow_spawn": True,
            "allow_exec": True,
            "max_live": 64,
            "max_spawns": 1024,
            "max_runtime_ms": 60_000,
            "allow_exec_prefixes": ["/"],
        },
    }
    found = json.loads(render_policy(default_policy()))
    assert isinstance(found.pop("notes"), str)
    assert found == expected


def test_a_policy_file_has_one_form() -> None:
    """Keys sorted at all levels, two blanks deep, characters unescaped, one newline at the end."""
    text = render_policy({"b": {"z": [], "é": "é"}, "a": 1})
    assert text.decode() == '{\n  "a": 1,\n  "b": {\n    "z": [],\n    "é": "é"\n  }\n}\n'


def test_writing_and_reading_gives_the_same_policy() -> None:
    """A policy survives a round trip, and a section that was absent stays absent."""
    for name, made in TEMPLATES.items():
        policy = decode_policy(render_policy(made), source=name)
        again = decode_policy(render_policy(policy), source=name)
        assert again == policy
        assert ("db" in json.loads(render_policy(policy))) == ("db" in made)


# upstream's templates, from the table of facts/x07-formats.md 6.2

THREADS = {"enabled": True, "max_workers": 0, "max_blocking": 4, "max_queue": 1024}
PROCESS: dict[str, Any] = {
    "enabled": True,
    "allow_spawn": False,
    "max_live": 0,
    "max_spawns": 0,
    "allow_exec": False,
    "allow_exit": True,
    "allow_execs": [],
    "allow_exec_prefixes": [],
    "allow_args_regex_lite": [],
    "allow_env_keys": [],
    "max_exe_bytes": 4096,
    "max_args": 64,
    "max_arg_bytes": 4096,
    "max_env": 64,
    "max_env_key_bytes": 256,
    "max_env_val_bytes": 4096,
    "max_runtime_ms": 0,
    "max_stdout_bytes": 10_485_760,
    "max_stderr_bytes": 10_485_760,
    "max_total_bytes": 16_777_216,
    "max_stdin_bytes": 1_048_576,
    "kill_on_drop": True,
    "kill_tree": True,
    "allow_cwd": False,
    "allow_cwd_roots": [],
}
PARALLEL = {
    **PROCESS,
    "allow_spawn": True,
    "max_live": 16,
    "max_spawns": 64,
    "allow_exec": True,
    "allow_exec_prefixes": ["deps/x07/"],
    "max_runtime_ms": 60_000,
}
DB = {
    "enabled": True,
    "max_live_conns": 8,
    "max_queries": 10_000,
    "query_timeout_ms": 30_000,
    "max_sql_bytes": 1_048_576,
    "max_rows": 100_000,
    "max_resp_bytes": 16_777_216,
}
NO_DRIVER = {"sqlite": False, "postgres": False, "mysql": False, "redis": False}
SQLITE_DB = {
    **DB,
    "connect_timeout_ms": 2000,
    "drivers": {**NO_DRIVER, "sqlite": True},
    "sqlite": {
        "allow_paths": ["out/app.sqlite"],
        "readonly_only": False,
        "allow_create": True,
        "allow_in_memory": True,
    },
}
POSTGRES_DB = {
    **DB,
    "connect_timeout_ms": 5000,
    "drivers": {**NO_DRIVER, "postgres": True},
    "net": {"allow_dns": [], "allow_cidrs": [], "allow_ports": [], "require_tls": True, "require_verify": True},
}


def limits(cpu_ms: int, wall_ms: int, mem_mib: int, fds: int, procs: int) -> dict[str, Any]:
    """A limits section."""
    made = {"cpu_ms": cpu_ms, "wall_ms": wall_ms, "mem_bytes": mem_mib * MIB, "fds": fds, "procs": procs}
    return {**made, "core_dumps": False}


def fs(read: list[str], write: list[str], **more: object) -> dict[str, Any]:
    """An fs section as most templates have it."""
    made: dict[str, Any] = dict.fromkeys(("enabled", "allow_mkdir", "allow_rename", "allow_walk", "allow_glob"), True)
    made |= {"read_roots": read, "write_roots": write, "deny_hidden": True}
    made |= {"allow_symlinks": False, "allow_remove": False}
    made |= {"max_read_bytes": 64 * MIB, "max_write_bytes": 64 * MIB, "max_entries": 50_000, "max_depth": 64}
    return made | more


NO_FS = fs([], []) | dict.fromkeys(("enabled", "allow_mkdir", "allow_rename", "allow_walk", "allow_glob"), False)
NO_FS |= dict.fromkeys(("max_read_bytes", "max_write_bytes", "max_entries", "max_depth"), 0)


def net(*, on: bool) -> dict[str, Any]:
    """A net section without hosts."""
    return {"enabled": on, "allow_dns": on, "allow_tcp": on, "allow_udp": False, "allow_hosts": []}


def template(
    name: str,
    limited: dict[str, Any],
    files: dict[str, Any],
    *,
    unsafe: bool,
    wall: bool = True,
    sleep: int = 0,
    **more: object,
) -> dict[str, Any]:
    """One of upstream's templates; wall is its time.allow_wall_clock, sleep its longest sleep."""
    made = {
        "schema_version": "x07.run-os-policy@0.1.0",
        "policy_id": f"sandbox.{name}.base",
        "limits": limited,
        "fs": files,
        "net": net(on=False),
        "env": {"enabled": False, "allow_keys": [], "deny_keys": []},
        "time": {
            "enabled": True,
            "allow_monotonic": True,
            "allow_wall_clock": wall,
            "allow_sleep": sleep > 0,
            "max_sleep_ms": sleep,
            "allow_local_tzid": False,
        },
        "language": {"allow_unsafe": unsafe, "allow_ffi": unsafe},
        "threads": THREADS,
        "process": PROCESS,
    }
    return made | more


TEMPLATES: dict[str, dict[str, Any]] = {
    "cli": template("cli", limits(60_000, 120_000, 512, 128, 16), fs(["."], ["out"]), unsafe=False),
    "http-client": template(
        "http-client",
        limits(180_000, 300_000, 1024, 256, 32),
        fs(["."], ["out"], allow_glob=False, max_write_bytes=256 * MIB, max_entries=20_000, max_depth=32),
        unsafe=True,
        net=net(on=True),
        sleep=5000,
    ),
    "web-service": template(
        "web-service",
        limits(180_000, 600_000, 1024, 512, 64),
        fs(["."], ["out"], max_write_bytes=128 * MIB),
        unsafe=True,
        net=net(on=True),
        env={"enabled": True, "allow_keys": ["PORT", "HOST", "LOG_LEVEL"], "deny_keys": []},
        sleep=1000,
    ),
    "fs-tool": template(
        "fs-tool",
        limits(90_000, 180_000, 512, 256, 16),
        fs(["."], ["src", "out"], max_read_bytes=256 * MIB, max_write_bytes=256 * MIB)
        | {"max_entries": 200_000, "max_depth": 128},
        unsafe=False,
    ),
    "sqlite-app": template(
        "sqlite-app",
        limits(120_000, 300_000, 1024, 256, 32),
        fs(["."], ["out"], max_read_bytes=128 * MIB, max_write_bytes=256 * MIB, max_entries=100_000),
        unsafe=True,
        db=SQLITE_DB,
    ),
    "postgres-client": template(
        "postgres-client", limits(120_000, 300_000, 1024, 256, 32), fs(["."], ["out"]), unsafe=True, db=POSTGRES_DB
    ),
    "worker": template("worker", limits(300_000, 300_000, 1024, 64, 16), NO_FS, unsafe=False, wall=False, sleep=5000),
    "worker-parallel": template(
        "worker-parallel",
        limits(300_000, 300_000, 1024, 128, 1024),
        NO_FS,
        unsafe=False,
        wall=False,
        sleep=5000,
        process=PARALLEL,
    ),
}
CHECKS = {
    "cli": "6785fdac",
    "http-client": "66b2ae67",
    "web-service": "551947c4",
    "fs-tool": "4d42254f",
    "sqlite-app": "2ae13095",
    "postgres-client": "d6c06057",
    "worker": "ce208030",
    "worker-parallel": "915eb1fb",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_upstreams_templates_are_accepted_and_written_back_unchanged(name: str) -> None:
    """Every template of X07 (known by its check sum) decodes, and its policy has the same content when written."""
    policy = decode_policy(render_policy(TEMPLATES[name]), source=name)
    written = json.dumps(json.loads(render_policy(policy)), sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(written.encode()).hexdigest()[:8] == CHECKS[name]


# the environment


def test_each_variable_carries_one_field_and_each_told_field_has_one() -> None:
    """No variable and no field stands twice, and only fields that concern no library have none."""
    names = [name for name, _ in VARIABLES]
    told = [field for _, field in VARIABLES]
    assert len(set(names)) == len(names)
    assert len(set(told)) == len(told)
    untold = {field.path for field in fields()} - set(told)
    assert {path for path in untold if not path.startswith(("limits.", "language."))} == {
        "schema_version",
        "policy_id",
        "notes",
    }


def test_the_default_environment_says_what_the_default_policy_says() -> None:
    """Booleans are 1 and 0, numbers decimal, lists joined; databases are off when their section is absent."""
    env = program_environment(default_policy())
    assert env["X07_WORLD"] == "run-os-sandboxed"
    assert env["X07_OS_SANDBOXED"] == "1"
    assert env["X07_OS_FS"] == "1"
    assert env["X07_OS_TIME_ALLOW_LOCAL_TZID"] == "0"
    assert env["X07_OS_PROC_MAX_RUNTIME_MS"] == "60000"
    assert env["X07_OS_PROC_ALLOW_EXEC_PREFIXES"] == "/"
    assert env["X07_OS_NET_ALLOW_HOSTS"] == ""
    assert env["X07_OS_DB"] == "0"
    assert env["X07_OS_DB_NET_REQUIRE_TLS"] == "0"
    assert len(env) == len(VARIABLES) + 2


def test_lists_are_joined_as_x07_reads_them() -> None:
    """Lists by ';', ports by ',', hosts as host:ports."""
    made = json.loads(render_policy(TEMPLATES["postgres-client"]))
    made["fs"]["read_roots"] = ["a", "b c"]
    made["net"]["allow_hosts"] = [{"host": "a.example", "ports": [80, 443]}, {"host": "::1", "ports": [1]}]
    made["db"]["net"] = {"allow_ports": [5432, 5433], "allow_dns": ["db.example", "db2.example"]}
    env = program_environment(decode_policy(render_policy(made), source="p"))
    assert env["X07_OS_FS_READ_ROOTS"] == "a;b c"
    assert env["X07_OS_NET_ALLOW_HOSTS"] == "a.example:80,443;::1:1"
    assert env["X07_OS_DB_NET_ALLOW_PORTS"] == "5432,5433"
    assert env["X07_OS_DB_NET_ALLOW_DNS"] == "db.example;db2.example"
    assert env["X07_OS_DB_NET_REQUIRE_TLS"] == "1"
    assert env["X07_OS_DB_MAX_CONNECT_TIMEOUT_MS"] == "5000"


def test_threads_are_allowed_when_their_section_is_absent() -> None:
    """Absent sections count as upstream's runner has it: threads on with defaults, language off."""
    made = json.loads(render_policy(default_policy()))
    del made["threads"], made["language"]
    policy: Policy = decode_policy(render_policy(made), source="p")
    env = program_environment(policy)
    assert [env[f"X07_OS_THREADS{name}"] for name in ("", "_MAX_WORKERS", "_MAX_BLOCKING", "_MAX_QUEUE")] == [
        "1",
        "0",
        "4",
        "1024",
    ]
    assert policy.language_in_force.allow_unsafe is False
