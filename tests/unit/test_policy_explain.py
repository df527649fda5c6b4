"""`x07 policy explain`: the plan of a run, in advance, with every field."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.command import X07 as COMMAND
from tests.unit.policy_command import as_json, policy
from x07_sandbox.backends.registry import backend_named
from x07_sandbox.policy.controls import make_plan
from x07_sandbox.policy.decode import render_policy
from x07_sandbox.policy.features import vm_features
from x07_sandbox.policy.model import leaf_values
from x07_sandbox.policy.schema import fields
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.programs.toolchains import TOOLCHAINS
from x07_sandbox.reports.commands import IN_SANDBOX
from x07_sandbox.x07.project import X07

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_explain_shows_the_plan_of_a_run(tmp_path: Path, name: str) -> None:
    """`x07 policy explain` lists every field with its value, control and refusals, as a run does."""
    code, found = as_json(tmp_path, "explain", f"built-in:{name}")
    values = leaf_values(TEMPLATES[name])
    assert [row["field"] for row in found["controls"]] == [field.path for field in fields()]
    assert {row["field"]: row.pop("value") for row in found["controls"]} == json.loads(msgspec.json.encode(values))
    assert {row.pop("in_sandbox") for row in found["controls"]} == {""}
    for isolation in found["isolation"]:
        plan = make_plan(TEMPLATES[name], vm_features(isolation))
        assert found["controls"] == list(msgspec.to_builtins(plan.controls))
        assert found["refusals"] == json.loads(msgspec.json.encode(plan.refusals))
        assert (code, found["carried_out"]) == ((125, False) if plan.refusals else (0, True))


def test_without_a_policy_the_built_in_one_is_explained(tmp_path: Path) -> None:
    """Without a policy `x07 policy explain` explains the built-in one."""
    code, found = as_json(tmp_path, "explain")
    assert (code, found["policy"], found["policy_id"]) == (0, "built-in:default", "sandbox.default.base")
    assert (found["backend"], found["isolation"]) == ("qemu", ["vm-hardware", "vm-emulated"])


def test_the_text_names_every_field_and_what_would_allow_a_run(tmp_path: Path) -> None:
    """The text lists refusals first, with the line to change, then every field."""
    document = json.loads(render_policy(TEMPLATES["cli"]))
    document["fs"]["read_roots"] = ["/usr"]
    (tmp_path / "p.json").write_text(json.dumps(document))
    code, out, err = policy(tmp_path, "explain", "p.json")
    assert (code, err) == (125, "")
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert {field.path for field in fields()} <= set(rows)
    assert rows[0] == "fs.read_roots"
    assert "    in the policy: $.fs.read_roots = []\n" in out


def test_a_policys_own_text_is_escaped(tmp_path: Path) -> None:
    """Control characters in a policy never reach the terminal."""
    document = json.loads(render_policy(TEMPLATES["worker"]))
    document["notes"] = "\x1b[2J\x9b"
    (tmp_path / "p.json").write_text(json.dumps(document))
    _, out, _ = policy(tmp_path, "explain", "p.json")
    assert "\\u001b[2J\\u009b" in out
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["vz", "Apple-Container"])
def test_an_unusable_backend_is_refused(tmp_path: Path, name: str) -> None:
    """An unusable backend is refused by name, as in a run."""
    code, out, err = policy(tmp_path, "explain", "--backend", name)
    assert (code, out) == (125, "")
    assert f"the backend {backend_named(name).name}" in err
    assert "Use --backend qemu." in err
    code, found = as_json(tmp_path, "explain", "--backend", name)
    assert (code, found["ok"]) == (125, False)


@pytest.mark.parametrize("name", ["podman", "docker", "os", "none"])
def test_a_weaker_backend_can_be_explained(tmp_path: Path, name: str) -> None:
    """Explaining a weaker backend needs no acceptance and says what it does not enforce."""
    code, found = as_json(tmp_path, "explain", "--backend", name)
    assert code == 0
    held = {control["field"] for control in found["controls"] if control["state"] == "enforced"}
    assert ({"net.enabled", "limits.wall_ms"} <= held) == (name != "none")
    assert bool(found["filters"]) == (name != "none")


@pytest.mark.parametrize(("variable", "word"), [("X07_VM_BACKEND", "podman"), ("X07_SANDBOX_BACKEND", "os")])
def test_the_backend_is_that_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, word: str
) -> None:
    """`x07 policy explain` selects its backend as a run does."""
    monkeypatch.setenv("X07_VM_BACKEND", "QEMU")
    assert as_json(tmp_path, "explain")[1]["backend"] == "qemu"
    monkeypatch.delenv("X07_VM_BACKEND")
    monkeypatch.setenv(variable, word)
    code, _, err = policy(tmp_path, "explain")
    assert (code, f"cannot use the backend {word}: it runs programs in" in err) == (125, True)
    assert as_json(tmp_path, "explain", "--backend", "qemu")[0] == 0


@pytest.mark.parametrize("toolchain", [toolchain.name for toolchain in (*TOOLCHAINS, X07)])
def test_a_toolchain_changes_no_control_and_is_named(tmp_path: Path, toolchain: str) -> None:
    """The plan is the same for every toolchain."""
    _, found = as_json(tmp_path, "explain", "--toolchain", toolchain)
    assert found["toolchain"] == toolchain
    assert found["controls"] == as_json(tmp_path, "explain")[1]["controls"]
    language = [row for row in found["controls"] if row["field"].startswith("language.")]
    assert {row["state"] for row in language} == {"advisory"}
    assert {row["by"] for row in language} == {"X07's compiler"}
    assert all("applies to X07 programs only" in row["why"] for row in language)


def test_explain_has_exit_codes_for_errors(tmp_path: Path) -> None:
    """Wrong usage ends with exit code 2, an invalid policy with 3."""
    (tmp_path / "bad.json").write_bytes(b"[]")
    assert policy(tmp_path, "explain", "--backend", "xen")[0] == 2
    assert policy(tmp_path, "explain", "--toolchain", "cobol")[0] == 2
    assert policy(tmp_path, "explain", "missing.json")[0] == 2
    assert policy(tmp_path, "explain", "bad.json")[0] == 3


def test_explaining_touches_nothing(tmp_path: Path) -> None:
    """`x07 policy explain` creates nothing and needs no image."""
    argv = [*COMMAND, "policy", "explain"]
    done = subprocess.run(argv, cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, check=False)
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (0, b"", [])  # noqa: PTH208 - names are wanted


def test_unreachable_hosts_are_listed(tmp_path: Path) -> None:
    """`x07 policy explain` lists the hosts that are always refused, with the reason."""
    hosts = ("example.org", "10.0.0.0/8", "0.0.0.0/0", "printer.local", "127.0.0.1", "8.8.8.8")
    document = json.loads(render_policy(TEMPLATES["http-client"]))
    document["net"]["allow_hosts"] = [{"host": host, "ports": [80]} for host in hosts]
    (tmp_path / "p.json").write_bytes(render_policy(document))
    code, found = as_json(tmp_path, "explain", "p.json")
    reasons = {row["field"]: row["why"] for row in found["never_reached"]}
    assert (code, sorted(reasons)) == (0, [f"net.allow_hosts[{index}]" for index in (1, 2, 3, 4)])
    assert reasons["net.allow_hosts[1]"] == "10.0.0.0/8 is a private address"
    why = "printer.local is a name of this host or a local network"
    assert reasons["net.allow_hosts[3]"].startswith(f'{why}; to allow it, set allow_local = ["ADDRESS:80"]')
    assert "the program's own" in reasons["net.allow_hosts[4]"]
    assert "  net.allow_hosts[1]  " in policy(tmp_path, "explain", "p.json")[1]


def test_explain_says_what_fields_mean_in_a_sandbox(tmp_path: Path) -> None:
    """With --sandbox, each field that means something else in a sandbox says so, and without it none does."""
    _, found = as_json(tmp_path, "explain", "--sandbox")
    assert {row["field"]: row["in_sandbox"] for row in found["controls"] if row["in_sandbox"]} == IN_SANDBOX
