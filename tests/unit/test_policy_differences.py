"""`x07 policy diff`: every difference with its direction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.policy_command import as_json, policy
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.default import default_policy, render_policy
from x07_sandbox.policy.differences import _NEUTRAL, _RESTRICTS, Effect, differences
from x07_sandbox.policy.model import Policy, leaf_values
from x07_sandbox.policy.schema import fields
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path

OPPOSITE: dict[Effect, Effect] = {"granted": "withdrawn", "withdrawn": "granted", "changed": "changed"}


def changed(**values: object) -> Policy:
    """The default policy with values set by path (two underscores for a dot)."""
    made: dict[str, Any] = json.loads(render_policy(default_policy()))
    made["db"] = {"enabled": False, "drivers": {"sqlite": False, "postgres": False, "mysql": False}}
    made["db"]["net"] = {"require_tls": False, "require_verify": False}
    for path, value in values.items():
        *sections, name = path.split("__")
        holder = made
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return decode_policy(render_policy(made), source="p")


def test_the_exceptions_are_fields() -> None:
    """Every policy field has a direction."""
    assert {field.path for field in fields()} >= _NEUTRAL | _RESTRICTS


def test_an_absent_section_equals_its_defaults() -> None:
    """An absent section equals its defaults."""
    assert differences(default_policy(), changed()) == ()


@pytest.mark.parametrize(
    ("field", "value", "effect"),
    [
        ("limits.wall_ms", 60_001, "granted"),
        ("limits.wall_ms", 59_999, "withdrawn"),
        ("limits.core_dumps", True, "granted"),
        ("fs.deny_hidden", False, "granted"),
        ("fs.allow_remove", False, "withdrawn"),
        ("fs.max_entries", 0, "withdrawn"),
        ("threads.max_workers", 8, "changed"),
        ("net.enabled", False, "withdrawn"),
        ("process.kill_tree", False, "granted"),
        ("db.net.require_tls", True, "withdrawn"),
        ("db.sqlite.readonly_only", True, "withdrawn"),
        ("time.allow_local_tzid", True, "granted"),
        ("policy_id", "other", "changed"),
        ("notes", "other", "changed"),
    ],
)
def test_a_changed_value_has_a_direction(field: str, value: object, effect: str) -> None:
    """A changed value is reported as granted, withdrawn or changed."""
    before = leaf_values(changed())[field]
    (change,) = differences(changed(), changed(**{field.replace(".", "__"): value}))
    assert (change.field, change.effect, change.before, change.after) == (field, effect, before, value)


def test_lists_are_compared_by_entry() -> None:
    """Lists are compared entry by entry, ignoring order and repetition."""
    hosts = [{"host": "A.example", "ports": [2, 1]}, {"host": "b.example", "ports": [3]}]
    more = [{"host": "b.example", "ports": [3, 4]}, {"host": "a.example", "ports": [1]}]
    first = changed(fs__read_roots=["a", "b"], env__deny_keys=["K"], net__allow_hosts=hosts)
    second = changed(fs__read_roots=["c", "b", "b"], env__deny_keys=["K", "L"], net__allow_hosts=more)
    found = [(change.field, change.effect, change.before, change.after) for change in differences(first, second)]
    assert found == [
        ("fs.read_roots", "withdrawn", "a", None),
        ("fs.read_roots", "granted", None, "c"),
        ("net.allow_hosts", "withdrawn", "a.example:2", None),
        ("net.allow_hosts", "granted", None, "b.example:4"),
        ("env.deny_keys", "withdrawn", None, "L"),
    ]


def test_zero_is_compared_as_its_meaning() -> None:
    """0 for fs.max_read_bytes is compared as the 16 MiB that it stands for."""
    none = changed(fs__max_read_bytes=0)
    assert differences(none, changed(fs__max_read_bytes=16 << 20)) == ()
    (change,) = differences(none, changed(fs__max_read_bytes=1 << 20))
    assert change.effect == "withdrawn"


POLICIES = st.builds(
    changed,
    limits__procs=st.integers(0, 3),
    fs__deny_hidden=st.booleans(),
    fs__max_depth=st.sampled_from([0, 1, 64]),
    threads__max_workers=st.integers(0, 2),
    env__deny_keys=st.lists(st.sampled_from("abc"), max_size=3),
    fs__read_roots=st.lists(st.sampled_from("abc"), max_size=3),
)


@given(POLICIES, POLICIES)
def test_the_reverse_diff_is_the_opposite(first: Policy, second: Policy) -> None:
    """The reverse comparison reports the opposite."""
    assert differences(first, first) == ()
    there = [(change.field, change.effect, change.before, change.after) for change in differences(first, second)]
    back = [
        (change.field, OPPOSITE[change.effect], change.after, change.before) for change in differences(second, first)
    ]
    assert sorted(there, key=repr) == sorted(back, key=repr)


def test_diff_reports_as_text_and_json(tmp_path: Path) -> None:
    """`x07 policy diff` reports differences as text and JSON, and by its exit code."""
    assert policy(tmp_path, "diff", "built-in:cli", "built-in:cli") == (0, "", "")
    code, out, err = policy(tmp_path, "diff", "built-in:worker", "built-in:worker-parallel")
    assert (code, err) == (1, "")
    granted, _, changed_part = out.partition("the second policy changes:\n")
    lines = granted.splitlines()
    assert lines[:2] == [
        "the second policy grants:",
        "  limits.fds (open file descriptors of one process): 128 instead of 64",
    ]
    (prefixes,) = (line for line in lines if line.startswith("  process.allow_exec_prefixes ("))
    assert prefixes.endswith('): "deps/x07/" added')
    assert changed_part.startswith("  policy_id (")
    code, found = as_json(tmp_path, "diff", "built-in:worker", "built-in:worker-parallel")
    assert (code, found["same"]) == (1, False)
    assert found["changes"][1] == {"field": "notes", "effect": "changed"} | {
        "before": TEMPLATES["worker"].notes,
        "after": TEMPLATES["worker-parallel"].notes,
    }
    assert as_json(tmp_path, "diff", "built-in:cli", "built-in:cli")[1]["same"] is True


def test_diff_has_exit_codes_for_errors(tmp_path: Path) -> None:
    """`x07 policy diff` ends with 2 for an unreadable and with 3 for an invalid policy."""
    (tmp_path / "bad.json").write_bytes(b"{}")
    assert policy(tmp_path, "diff", "built-in:cli", "missing.json")[0] == 2
    assert policy(tmp_path, "diff", "bad.json", "built-in:cli")[0] == 3
    assert as_json(tmp_path, "diff", "built-in:cli", "bad.json")[1]["problems"]
