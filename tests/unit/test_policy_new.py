"""`x07 policy new`, and the completing command that `x07 policy check` prints."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.policy_command import as_json, policy
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.from_flags import completion
from x07_sandbox.policy.limits import NAMES
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path

FLAGS = ("--memory", "1G", "--cpu-time", "20", "--timeout", "30", "--allow-host", "example.org:443", "--read", ".")


def made(where: Path, *words: str) -> dict[str, Any]:
    """The policy that `x07 policy new` prints."""
    code, out, err = policy(where, "new", *words)
    assert (code, err) == (0, "")
    decode_policy(out.encode(), source="printed")
    found: dict[str, Any] = json.loads(out)
    return found


def test_flags_make_a_complete_policy(tmp_path: Path) -> None:
    """`x07 policy new` prints a valid policy with the values of its flags."""
    found = made(tmp_path, *FLAGS, "--write", "build", "--id", "my.policy")
    default = json.loads(render_policy(TEMPLATES["default"]))
    assert found["policy_id"] == "my.policy"
    assert found["limits"] == default["limits"] | {"mem_bytes": 1 << 30, "cpu_ms": 20_000, "wall_ms": 30_000}
    assert (found["fs"]["read_roots"], found["fs"]["write_roots"]) == (["."], ["build"])
    assert found["net"]["allow_hosts"] == [{"host": "example.org", "ports": [443]}]
    assert (found["env"], found["process"]) == (default["env"], default["process"])


@pytest.mark.parametrize("template", ["cli", "worker"])
def test_a_closed_template_accepts_hosts_and_roots(tmp_path: Path, template: str) -> None:
    """Named hosts and roots are usable even if the template has none."""
    found = made(tmp_path, "--template", template, *FLAGS)
    assert found["policy_id"] == f"custom.{template}"
    assert found["fs"]["enabled"]
    assert found["net"]["enabled"]
    assert found["net"]["allow_tcp"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--memory", "99G"), "must be at least 1M and at most 16G"),
        (("--allow-host", "example.org"), "the port is missing"),
        (("--id", "a b"), "an id has 1 to 64 letters"),
        (("--build-timeout", "9"), "unrecognized arguments: --build-timeout"),
    ],
)
def test_invalid_values_are_refused(tmp_path: Path, words: tuple[str, ...], why: str) -> None:
    """Invalid values end with exit code 2 and print no policy."""
    code, out, err = policy(tmp_path, "new", *words)
    assert (code, out) == (2, "")
    assert why in err


def test_check_prints_the_command_that_completes_a_policy(tmp_path: Path) -> None:
    """`x07 policy check` prints a command that makes a valid policy from the fields of an incomplete one."""
    document: dict[str, Any] = {
        "policy_id": "mine",
        "limits": {"mem_bytes": 1 << 30, "wall_ms": 2500, "procs": 8},
        "fs": {"enabled": True, "read_roots": ["a b"], "write_roots": []},
        "net": {"allow_hosts": [{"host": "::1", "ports": [80, 81]}]},
        "env": {"allow_keys": ["LANG"], "deny_keys": []},
        "time": {"enabled": True},
    }
    (tmp_path / "part.json").write_text(json.dumps(document))
    code, found = as_json(tmp_path, "check", "part.json")
    command = found["files"][0]["completed_by"]
    *words, arrow, place = shlex.split(command)
    assert (code, words[:3], arrow, place) == (3, ["x07", "policy", "new"], ">", "part.complete.json")
    complete = made(tmp_path, *words[3:])
    assert complete["policy_id"] == "mine"
    assert complete["limits"] | document["limits"] == complete["limits"]
    assert complete["fs"]["read_roots"] == ["a b"]
    assert complete["net"]["allow_hosts"] == document["net"]["allow_hosts"]
    _, _, err = policy(tmp_path, "check", "part.json")
    assert f"To write a complete policy: {command}" in err
    assert "No flag sets env.allow_keys" in err


def test_a_policy_with_wrong_fields_gets_no_completing_command(tmp_path: Path) -> None:
    """A policy with a wrong or misspelt field gets no completing command."""
    for name in ("fds", "fdss"):
        document = json.loads(render_policy(TEMPLATES["default"]))
        del document["limits"]["fds"]
        document["limits"][name] = 9000
        (tmp_path / "wrong.json").write_text(json.dumps(document))
        code, found = as_json(tmp_path, "check", "wrong.json")
        assert (code, "completed_by" in found["files"][0]) == (3, False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 41) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["host", "ports", "x"]), inner),
    max_leaves=6,
)
FIELDS = ["policy_id", *NAMES, "read_roots", "write_roots", "allow_hosts", "other"]
SECTION = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)


@given(st.dictionaries(st.sampled_from(["policy_id", "limits", "fs", "net", "x"]), SECTION | VALUES, max_size=5))
def test_the_completing_command_is_safe_to_paste(document: dict[str, Any]) -> None:
    """The completing command is printable and parses in a shell as intended, whatever the document holds."""
    found = completion(json.dumps(document).encode())
    if found is not None:
        line = found.line("p.json")
        assert line.isprintable()
        assert shlex.split(line) == ["x07", "policy", "new", *found.words, ">", "p.json"]
        assert all("\n" not in name for name in found.left_out)


@pytest.mark.parametrize(
    ("document", "off"),
    [
        ('{"fs": {"enabled": false, "read_roots": ["/etc"]}}', "fs.enabled"),
        ('{"net": {"enabled": false, "allow_hosts": [{"host": "a.org", "ports": [443]}]}}', "net.enabled"),
        ('{"net": {"allow_tcp": false, "allow_hosts": [{"host": "a.org", "ports": [443]}]}}', "net.allow_tcp"),
    ],
)
def test_a_disabled_section_stays_disabled(document: str, off: str) -> None:
    """The completing command omits roots and hosts of a disabled section and names its switch."""
    found = completion(document.encode())
    assert found is not None
    assert found.words == ()
    assert off in found.left_out


def test_a_document_without_flags_is_completed_by_the_template() -> None:
    """A document without fields that flags can set is completed by the built-in policy."""
    found = completion(b'{"env": {}}')
    assert found is not None
    assert found.line("p.json") == "x07 policy new > p.json"
    assert completion(b"{}") is None
    assert completion(b"[1") is None
    assert completion(render_policy(TEMPLATES["cli"])) is None
