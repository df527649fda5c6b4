"""The files generated from the policy model: schema, templates, digest and environment."""

import hashlib
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from x07_sandbox.policy.decode import (
    VARIABLES,
    canonical_json,
    decode_policy,
    default_policy,
    policy_digest,
    program_environment,
    render_policy,
)
from x07_sandbox.policy.model import Policy, leaf_values
from x07_sandbox.policy.schema import fields, policy_schema, render_schema
from x07_sandbox.policy.templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
HINT = "run: x07 policy schema > schemas/run-os-policy.schema.json"
MIB = 1 << 20


def test_the_schema_file_is_the_model() -> None:
    """schemas/run-os-policy.schema.json matches the model."""
    assert (ROOT / "schemas/run-os-policy.schema.json").read_bytes() == render_schema(), HINT


def test_the_schema_is_a_sound_schema_closed_everywhere() -> None:
    """The schema is valid JSON Schema 2020-12 and allows no unknown keys."""
    schema = policy_schema()
    Draft202012Validator.check_schema(schema)
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


def test_every_field_is_documented() -> None:
    """Each policy field has one line of documentation."""
    assert all(field.schema["description"].endswith(".") for field in fields())
    assert [field.path for field in fields()] == list(leaf_values(default_policy()))


def test_the_default_policy_is_the_documented_one() -> None:
    """The default policy allows 60 s, 512 MiB and 64 tasks, no file and no host, but spawn and exec."""
    found = json.loads(render_policy(default_policy()))
    assert isinstance(found.pop("notes"), str)
    assert found["limits"] == {
        "cpu_ms": 60_000,
        "wall_ms": 60_000,
        "mem_bytes": 512 * MIB,
        "fds": 1024,
        "procs": 64,
        "core_dumps": False,
    }
    assert found["fs"]["read_roots"] == found["fs"]["write_roots"] == found["net"]["allow_hosts"] == []
    assert (found["process"]["allow_spawn"], found["process"]["allow_exec_prefixes"]) == (True, ["/"])
    assert hashlib.sha256(canonical_json(found)).hexdigest()[:8] == "ede17850"  # everything else


def test_a_policy_file_has_one_form() -> None:
    """A policy file has one canonical form."""
    text = render_policy({"b": {"z": [], "é": "é"}, "a": 1})
    assert text.decode() == '{\n  "a": 1,\n  "b": {\n    "z": [],\n    "é": "é"\n  }\n}\n'


def test_writing_and_reading_gives_the_same_policy() -> None:
    """A policy survives encoding and decoding."""
    for name, made in TEMPLATES.items():
        assert decode_policy(render_policy(made), source=name) == made
    assert "db" not in json.loads(render_policy(TEMPLATES["cli"]))


# upstream's templates: their check sums stand in its own format page

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


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_templates_are_x07s(name: str) -> None:
    """The X07 templates are identical to X07's own."""
    document = json.loads(render_policy(TEMPLATES[name]))
    assert document.pop("notes").count(".") == 1
    assert document["policy_id"] == f"sandbox.{name}.base"
    assert hashlib.sha256(canonical_json(document)).hexdigest()[:8] == CHECKS[name]


def test_there_are_the_templates_of_x07_and_our_default() -> None:
    """The templates are those of X07 and our default."""
    assert set(TEMPLATES) == {*CHECKS, "default"}
    assert TEMPLATES["default"] == default_policy()


# the digest


def test_equivalent_documents_have_one_digest() -> None:
    """Equivalent documents have the same digest; any changed value changes it."""
    whole = json.loads(render_policy(TEMPLATES["cli"]))
    short = {key: whole[key] for key in reversed(whole)}
    short["limits"] = {key: value for key, value in whole["limits"].items() if key != "core_dumps"}
    digest = policy_digest(TEMPLATES["cli"])
    assert policy_digest(decode_policy(json.dumps(short).encode(), source="short")) == digest
    assert digest.startswith("sha256:")
    assert len({policy_digest(policy) for policy in TEMPLATES.values()}) == len(TEMPLATES)
    short["limits"]["core_dumps"] = True
    assert policy_digest(decode_policy(json.dumps(short).encode(), source="short")) != digest


# the environment


def test_variables_and_fields_match() -> None:
    """Each environment variable carries one policy field, and none is missing."""
    names = [name for name, _ in VARIABLES]
    listed = [field for _, field in VARIABLES]
    assert len(set(names)) == len(names)
    assert len(set(listed)) == len(listed)
    unlisted = {field.path for field in fields()} - set(listed)
    assert {path for path in unlisted if not path.startswith(("limits.", "language."))} == {
        "schema_version",
        "policy_id",
        "notes",
    }


def test_threads_are_allowed_when_their_section_is_absent() -> None:
    """Absent sections have X07's defaults: threads on, unsafe language features off."""
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
    assert leaf_values(policy)["language.allow_unsafe"] is False
