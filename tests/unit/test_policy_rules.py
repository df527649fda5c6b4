"""Policy rules beyond ranges; they hold whether or not their section is enabled."""

import json
from typing import Any

import pytest

from tests.policies import document_with
from x07_sandbox.policy.decode import RULES, decode_policy, regex_lite_fault
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


@pytest.mark.parametrize("name", ["max_live", "max_spawns", "max_runtime_ms"])
def test_spawning_needs_each_limit(name: str) -> None:
    """allow_spawn needs max_live, max_spawns and max_runtime_ms above zero."""
    assert faults(with_values(**{f"process__{name}": 0})) == [f"$.process.{name}"]
    assert faults(with_values(**{f"process__{name}": 0, "process__allow_spawn": False})) == []


def test_spawning_needs_a_program_to_start() -> None:
    """allow_spawn needs allow_execs or allow_exec_prefixes."""
    none: dict[str, object] = {"process__allow_execs": [], "process__allow_exec_prefixes": []}
    assert faults(with_values(**none)) == ["$.process.allow_execs"]
    assert faults(with_values(**{**none, "process__allow_execs": ["/bin/true"]})) == []
    assert faults(with_values(**none, process__allow_spawn=False)) == []


def test_spawning_rules_hold_for_fields_that_are_absent() -> None:
    """A missing field counts with its default."""
    made = with_values()
    for name in ("allow_execs", "allow_exec_prefixes", "max_runtime_ms"):
        del made["process"][name]
    assert faults(made) == ["$.process.allow_execs", "$.process.max_runtime_ms"]


def test_a_working_folder_needs_roots() -> None:
    """allow_cwd needs allow_cwd_roots."""
    assert faults(with_values(process__allow_cwd=True)) == ["$.process.allow_cwd_roots"]
    assert faults(with_values(process__allow_cwd=True, process__allow_cwd_roots=["/tmp"])) == []  # noqa: S108 - a text


def test_databases_need_a_driver() -> None:
    """db.enabled needs at least one driver."""
    assert faults(with_values(db=DB)) == ["$.db.drivers"]
    assert faults(with_values(db={**DB, "drivers": {**DB["drivers"], "redis": True}})) == []  # type: ignore[dict-item]


@pytest.mark.parametrize("host", ["a;b", "a b", "a\tb", "a\n", " ", "\0", "a\0", "a\u00a0b", "é" * 128])
def test_a_host_is_one_plain_word(host: str) -> None:
    """A host has no ';', blank or NUL, and at most 255 bytes."""
    made = with_values(net__allow_hosts=[{"host": "ok.example", "ports": [1]}, {"host": host, "ports": [1]}])
    assert faults(made) == ["$.net.allow_hosts[1].host"]


@pytest.mark.parametrize("host", ["example.org", "10.0.0.0/8", "::1", "[::1]", "10.0.0.1-10.0.0.9", "é" * 127])
def test_every_kind_of_host_is_accepted(host: str) -> None:
    """Names, addresses, networks and ranges are accepted as hosts."""
    assert faults(with_values(net__allow_hosts=[{"host": host, "ports": [443]}])) == []


@pytest.mark.parametrize(("ports", "place"), [([], ""), ([0], "[0]"), ([65536], "[0]"), ([1] * 65, "")])
def test_a_host_has_ports(ports: list[int], place: str) -> None:
    """A host has 1 to 64 ports from 1 to 65535."""
    made = with_values(net__allow_hosts=[{"host": "a", "ports": ports}])
    assert faults(made) == [f"$.net.allow_hosts[0].ports{place}"]


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("entry", ["a;b", ";", "a\0"])
def test_joined_lists_contain_no_separator(path: str, entry: str) -> None:
    """Lists that become one variable contain no ';' and no NUL."""
    made = with_values(**{path.replace(".", "__"): ["/good", entry]})
    assert faults(made) == [f"$.{path}[1]"]


@pytest.mark.parametrize("pattern", ["", ";", "a;b", "*", "*a", "a**", "a*b**", "a\\", "\\\\\\", "\0"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    """An invalid regex-lite pattern is refused."""
    assert faults(with_values(process__allow_args_regex_lite=["ok", pattern])) == ["$.process.allow_args_regex_lite[1]"]


@pytest.mark.parametrize("pattern", ["a", ".*", "a*b*", "\\*", "\\**", "a\\\\", "--x=.*", "\\."])
def test_valid_patterns_are_accepted(pattern: str) -> None:
    """A backslash escapes the next character of a regex-lite pattern."""
    assert regex_lite_fault(pattern) is None
    assert faults(with_values(process__allow_args_regex_lite=[pattern])) == []


@pytest.mark.parametrize("policy_id", ["", "a b", "a\n", "é", "a" * 65, "a/b"])
def test_the_id_is_a_plain_word(policy_id: str) -> None:
    """policy_id is 1 to 64 letters, digits, '_', '.' or '-'."""
    assert faults(with_values(policy_id=policy_id)) == ["$.policy_id"]


def test_every_rule_is_documented() -> None:
    """Each rule is documented."""
    assert len({rule.doc for rule in RULES}) == len(RULES)
    assert all(rule.check.__doc__ and rule.doc.endswith((".", ")")) for rule in RULES)
