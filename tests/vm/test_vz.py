"""The vz backend, with a stand-in for its helper (tests/vz_helper.py): QEMU instead of Apple's framework.

So these tests prove what x07 does with a helper that keeps to docs/backends/vz.md, and nothing about a Mac. In full
runs tests/contract checks the whole contract in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import overwrite, vz_on_linux
from x07_sandbox import Sandbox, exec_command
from x07_sandbox.backends.registry import create
from x07_sandbox.conformance.harness import remaining
from x07_sandbox.errors import ImageError
from x07_sandbox.library.cleanup import sweep

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = pytest.mark.vm
RUNNER = """
import os
from msgspec.structs import replace
from x07_sandbox import exec_command
from x07_sandbox.backends.registry import BY_NAME
BY_NAME["vz"] = replace(BY_NAME["vz"], linux=True)
exec_command(["sh", "-c", "echo here; sleep 600"], on_output=lambda _name, data: os.write(1, data))
"""


@pytest.fixture
def vz(vz_stand_in: Mapping[str, str], state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The state folder. Selects the backend, with its stand-in. Each job must leave nothing but its record."""
    monkeypatch.setenv("X07_VM_BACKEND", "vz")
    with vz_on_linux(vz_stand_in):
        yield state
    left = {path.name for job in state.glob("*-*-*-*") for path in job.iterdir()}
    assert left <= {"job.json", "owner.json", "done", "reaped"}


def test_a_command_runs_in_a_vm_of_the_helper(vz_stand_in: Mapping[str, str], vz: Path, tmp_path: Path) -> None:
    """A command has its input, folder and network as in any VM, and the result names the helper and its bundle."""
    folder = tmp_path / "folder"
    folder.mkdir()
    text = "cat; echo new > made; getent hosts unlisted.example || exit 3"
    found = exec_command(["sh", "-c", text], folder, input=b"in", allow_hosts=["listed.example:443"])
    assert (found.outcome, found.exit_code, found.stdout.text) == ("failed", 3, "in"), found.reason
    assert (folder / "made").read_text(encoding="ascii") == "new\n"
    assert [one.subject for one in found.denials] == ["unlisted.example"]
    (owner,) = vz.glob("*-run/owner.json")
    assert json.loads(owner.read_bytes())["processes"].keys() == {"helper"}
    assert "macOS stand-in" in create("vz").probe(None).proof
    assert vz_stand_in["X07_VM_VZ_HELPER_BIN"] in json.dumps(found.document())
    manifest = Path(vz_stand_in["X07_VM_VZ_GUEST_BUNDLE"], "manifest.json").read_bytes()
    assert found.digests.image == f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def test_a_killed_runner_and_its_sweep_leave_nothing(vz: Path) -> None:
    """If the runner is killed, the helper ends its VM; one sweep records that and removes the scratch disk."""
    with subprocess.Popen([sys.executable, "-c", RUNNER], stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"here\n"
        (job,) = vz.glob("*-run")
        owner = json.loads((job / "owner.json").read_bytes())
        mark = owner["instance"]
        assert (job / f"scratch-{mark}").exists()
        # Stopped: it sees neither the end of its input nor that of its parent.
        os.kill(owner["processes"]["helper"]["pid"], signal.SIGSTOP)
        runner.kill()
    swept = sweep(dry_run=False, progress=lambda _text: None)
    assert [(row.kind, row.id, row.failed) for row in swept.removed] == [("job", job.name, False)]
    assert remaining(mark) == []
    assert {path.name for path in job.iterdir()} == {"job.json", "owner.json", "reaped"}


def test_a_killed_helper_ends_a_sandbox(vz: Path) -> None:
    """Commands share a sandbox; a killed helper takes the VM with it, and leaves a lost run and no scratch disk."""
    with contextlib.closing(Sandbox(backend="vz")) as sandbox:
        sandbox.files.write("a", b"1")
        assert sandbox.exec(["sh", "-c", "cat a; echo 2 >> a; exit 4"]).stdout == b"1"
        assert sandbox.files.read("a") == b"12\n"
        (job,) = vz.glob("*-run")
        owner = json.loads((job / "owner.json").read_bytes())
        os.kill(owner["processes"]["helper"]["pid"], signal.SIGKILL)
        result = sandbox.close()
    assert (result.outcome, result.reason_code) == ("guest-lost", "supervisor-killed")
    assert remaining(owner["instance"]) == []


def test_a_damaged_bundle_starts_nothing(
    vz: Path, vz_stand_in: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle with one changed bit is refused, and a refused job has no record."""
    copy = tmp_path / "copy"
    shutil.copytree(vz_stand_in["X07_VM_VZ_GUEST_BUNDLE"], copy)
    overwrite(copy / "initrd")
    monkeypatch.setenv("X07_VM_VZ_GUEST_BUNDLE", str(copy))
    with pytest.raises(ImageError, match="initrd has changed"):
        exec_command(["true"])
    assert list(vz.glob("*-run")) == []
