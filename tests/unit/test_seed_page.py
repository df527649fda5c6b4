"""The page that compares this project with X07's description: complete, and with proofs that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from x07_sandbox.host.variables import VARIABLES

ROOT: Final = Path(__file__).resolve().parents[2]
STATES: Final = {"works", "stand-in", "refused", "differs"}
# What X07's description names: flags, variables, backends, labels, files, scripts and runners.
DESCRIBED: Final = (
    *("sandbox_backend=vm", "--sandbox-backend auto", "vm", "os", "none", "--i-accept-weaker-isolation"),
    *("X07_SANDBOX_BACKEND", "X07_I_ACCEPT_WEAKER_ISOLATION", "X07_I_ACCEPT_WEAKER_ISOLATION=1", "X07_VM_BACKEND"),
    *("apple-container", "container", "vz", "x07-vz-helper", "podman", "docker", "firecracker-ctr"),
    *("X07_VM_FIRECRACKER_CTR_BIN", "X07_VM_FIRECRACKER_CONTAINERD_SOCK", "X07_VM_FIRECRACKER_SNAPSHOTTER"),
    *("/run/firecracker-containerd/containerd.sock", "devmapper", "X07_VM_CONTAINERD_NAMESPACE", "x07"),
    *("X07_VM_STATE_DIR", "$HOME/.x07/vm/jobs", "job.json", "done"),
    *("io.x07.schema=1", "io.x07.run_id", "io.x07.runner_instance", "io.x07.deadline_unix_ms", "io.x07.backend"),
    *("io.x07.created_unix_ms", "io.x07.image_digest", "/x07/out/compiled-out", "compile", "solve"),
    *("net.enabled", "net.allow_hosts", "nftables", "/x07/in/policy.json", "x07-os-runner"),
    *("ghcr.io/x07lang/x07-guest-runner:<x07-version>", "X07_VM_GUEST_IMAGE", "X07_VM_VZ_GUEST_BUNDLE"),
    *("scripts/build_guest_runner_image.sh", "scripts/build_vz_guest_bundle.sh", "scripts/build_vz_helper.sh"),
    *("scripts/ci/check_vm_sandbox_smoke.sh", ".github/workflows/ci-vm.yml", "/dev/kvm"),
    *("x07-vm-macos", "x07-vm-linux-firecracker"),
)
# The tests of a backend come with it.


class Row(NamedTuple):
    """One row of the page."""

    what: str
    state: str
    proof: str


def rows() -> list[Row]:
    """The rows of all tables of the page."""
    lines = (ROOT / "docs" / "reference" / "seed.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [Row(*row) for row in cells if row[0] != "what" and not row[0].startswith("---")]


def test_every_row_has_a_state_and_a_proof_or_reason() -> None:
    """Each row has one of four states; what works or has a stand-in names a test."""
    found = rows()
    assert {row.state for row in found} == STATES
    assert len({row.what for row in found}) == len(found)
    tested = re.compile(r"`tests/[\w/]+\.py|the same tests?\b")
    for row in found:
        assert tested.search(row.proof) or (row.state in {"differs", "refused"} and "](" in row.proof), row


def test_everything_that_is_described_has_a_row() -> None:
    """Each name and default of X07's description is in the first column."""
    named = " ".join(row.what for row in rows())
    absent = [word for word in DESCRIBED if not re.search(rf"`{re.escape(word)}[`, ]", named)]
    assert absent == []


@pytest.mark.parametrize(
    "named", sorted({name for row in rows() for name in re.findall(r"tests/[\w/:]+(?:\.py)?[\w:]*", row.proof)})
)
def test_each_named_test_exists(named: str) -> None:
    """Each test file and test that the page names exists."""
    file, _, function = named.partition("::")
    tree = ast.parse((ROOT / file).read_bytes())
    tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not function or function in tests


def test_each_variable_exists_with_its_default() -> None:
    """Each variable that works, or has a stand-in, is one of x07's, with the default that the page states."""
    for row in rows():
        for name in re.findall(r"`(X07_\w+)", row.what):
            assert name in VARIABLES or row.state in {"differs", "refused"}, row
            if stated := re.search(r"\(default: `([^`]+)`\)", row.what):
                assert VARIABLES[name].default == f"`{stated[1]}`"


def test_each_script_and_workflow_exists() -> None:
    """Each script and workflow that the page names exists."""
    text = " ".join(f"{row.what} {row.proof}" for row in rows())
    named = set(re.findall(r"(?:scripts|\.github)/[\w/.-]+\.(?:sh|yml)", text))
    assert len(named) == 5
    assert [name for name in named if not (ROOT / name).is_file()] == []
