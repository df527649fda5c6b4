"""Policy rules beyond ranges; they hold whether or not their section is enabled."""

import json
from typing import Any

import pytest

from tests.policies import document_with
from x07_sandbox.policy.decode import RULES, decode_policy
from x07_sandbox.policy.model import PolicyError

DB = {"enabled": True, "drivers": {"sqlite": False, "postgres": False, "mysql": False}}
LISTS = (
    "fs.read_roots",
    "fs.write_roots",
    "env.allow_keys",
    "env.deny_keys",
    "process.allow_execs",
    "process.allow_exec_prefixes",
    "process.allow_env_keys",
    "process.allow_cwd_roots",
    "db.sqlite.allow_paths",
    "db.net.allow_dns",
    "db.net.allow_cidrs",
)


def with_values(**values: object) -> dict[str, Any]:
    """The default document with all sections off and values set by path (two underscores for a dot)."""
    off = {f"{section}.enabled": False for section in ("fs", "net", "env", "process", "threads", "time")}
    drivers = {"sqlite": False, "postgres": False, "mysql": False}
    given = {path.replace("__", "."): value for path, value in values.items()}
    return document_with({"db.enabled": False, "db.drivers": drivers} | off | given)


def faults(made: dict[str, Any]) -> list[str]:
    """The paths for which a document is refused."""
    try:
        decode_policy(json.dumps(made).encode(), source="p")
    except PolicyError as error:
        return [problem.json_path for problem in error.problems]
    return []


SPAWN_LIMITS = ("max_live", "max_spawns", "max_runtime_ms")
NO_PROGRAM: dict[str, Any] = {"process__allow_execs": [], "process__allow_exec_prefixes": []}
NO_SPAWN: dict[str, Any] = {"process__allow_spawn": False}
HOSTS = ("a;b", "a b", "a\tb", "a\n", " ", "\0", "a\0", "a\u00a0b", "é" * 128)
GOOD_HOSTS = ("example.org", "10.0.0.0/8", "::1", "[::1]", "10.0.0.1-10.0.0.9", "é" * 127)
PATTERNS = ("", ";", "a;b", "*", "*a", "a**", "a*b**", "a\\", "\\\\\\", "\0")
GOOD_PATTERNS = ("a", ".*", "a*b*", "\\*", "\\**", "a\\\\", "--x=.*", "\\.")  # a backslash escapes the next character


def hosts(host: str, *ports: int) -> dict[str, Any]:
    """A list of hosts whose second entry is this one."""
    return {"net__allow_hosts": [{"host": "ok.example", "ports": [1]}, {"host": host, "ports": ports}]}


CASES: list[tuple[Any, str]] = [
    *(({f"process__{name}": 0}, f"process.{name}") for name in SPAWN_LIMITS),
    *(({f"process__{name}": 0} | NO_SPAWN, "") for name in SPAWN_LIMITS),
    (NO_PROGRAM, "process.allow_execs"),
    (NO_PROGRAM | {"process__allow_execs": ["/bin/true"]}, ""),
    (NO_PROGRAM | NO_SPAWN, ""),
    ({"process__allow_cwd": True}, "process.allow_cwd_roots"),
    ({"process__allow_cwd": True, "process__allow_cwd_roots": ["/tmp"]}, ""),  # noqa: S108 - a text
    ({"db": DB}, "db.drivers"),
    ({"db": DB | {"drivers": {"sqlite": False, "postgres": False, "mysql": False, "redis": True}}}, ""),
    *((hosts(host, 1), "net.allow_hosts[1].host") for host in HOSTS),
    *((hosts(host, 443), "") for host in GOOD_HOSTS),
    *((hosts("a", port), "net.allow_hosts[1].ports[0]") for port in (0, 65536)),
    *((hosts("a", *ports), "net.allow_hosts[1].ports") for ports in ([], [1] * 65)),
    *(
        ({path.replace(".", "__"): ["/good", entry]}, f"{path}[1]")
        for path in LISTS
        for entry in ("a;b", ";", "a\0")  # they are joined in one variable
    ),
    *(({"process__allow_args_regex_lite": ["ok", one]}, "process.allow_args_regex_lite[1]") for one in PATTERNS),
    *(({"process__allow_args_regex_lite": [one]}, "") for one in GOOD_PATTERNS),
    *(({"policy_id": name}, "policy_id") for name in ("", "a b", "a\n", "é", "a" * 65, "a/b")),
]


@pytest.mark.parametrize(("values", "place"), CASES)
def test_each_rule_refuses_what_breaks_it_by_its_place(values: dict[str, Any], place: str) -> None:
    """A policy that breaks a rule is refused with the path of the field, and one that keeps it is accepted."""
    assert faults(with_values(**values)) == ([f"$.{place}"] if place else [])


def test_spawning_rules_hold_for_fields_that_are_absent() -> None:
    """A missing field counts with its default."""
    made = with_values()
    for name in ("allow_execs", "allow_exec_prefixes", "max_runtime_ms"):
        del made["process"][name]
    assert faults(made) == ["$.process.allow_execs", "$.process.max_runtime_ms"]


def test_every_rule_is_documented() -> None:
    """Each rule is documented."""
    assert len({rule.doc for rule in RULES}) == len(RULES)
    assert all(rule.check.__doc__ and rule.doc.endswith((".", ")")) for rule in RULES)
