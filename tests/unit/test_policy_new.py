"""`x07 policy new`: a complete policy from flags."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.policy_command import policy
from x07_sandbox.policy.decode import decode_policy, render_policy
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
