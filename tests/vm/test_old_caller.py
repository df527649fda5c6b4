"""A caller written for X07's own runner, and everything such callers rely on."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from x07_sandbox.policy.decode import default_policy, render_policy

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

RUNNER = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "x07-os-runner"
JOB_KEYS = {
    "schema_version",
    "run_id",
    "backend",
    "container_id",
    "pid",
    "created_unix_ms",
    "deadline_unix_ms",
    "grace_ms",
    "cleanup_ms",
    "ctr",
}
# Prints OK if the guest is laid out as X07 lays it out, or else the differences.
LOOK = """\
import hashlib, os, socket, sys
wrong = [path for path in ("/x07/in/policy.json", "/x07/in/program") if not os.path.exists(path)]
digest = hashlib.sha256(open("/x07/in/policy.json", "rb").read()).hexdigest()
if digest != sys.stdin.read():
    wrong.append("policy.json is another one")
if os.environ.get("X07_WORLD") != "run-os-sandboxed" or os.environ.get("X07_OS_SANDBOXED") != "1":
    wrong.append("the variables of the world are not set")
if sorted(name for _, name in socket.if_nameindex()) not in ([], ["lo"]):
    wrong.append("there is a network card")
print(" ".join(wrong) or "OK", end="")
"""


@pytest.fixture
def called(image: Image, state: Path, tmp_path: Path) -> tuple[subprocess.CompletedProcess[bytes], Path]:
    """One call as an existing script makes it: variables choose the backend, and stderr is separate."""
    assert image.digest
    policy = render_policy(default_policy())
    (tmp_path / "policy.json").write_bytes(policy)
    (tmp_path / "look.py").write_text(f"{LOOK}# {os.urandom(4).hex()}\n")  # not in the build cache
    (tmp_path / "input.bin").write_text(hashlib.sha256(policy).hexdigest())
    line = "--world run-os-sandboxed --policy policy.json --program look.py --input input.bin --attest-runtime att.json"
    done = subprocess.run(
        [RUNNER, *line.split()],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | {"X07_SANDBOX_BACKEND": "vm", "X07_I_ACCEPT_WEAKER_ISOLATION": "0"},
        check=False,
    )
    return done, state


def test_an_existing_x07_caller_is_served(called: tuple[subprocess.CompletedProcess[bytes], Path]) -> None:
    """Report, versions, guest paths, attestation and job records match what a caller of X07's runner expects."""
    done, state = called
    assert done.returncode == 0, done.stderr.decode()
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.stdout.startswith(b"{\n")
    assert done.stdout.endswith(b"}\n")
    assert report["schema_version"] == "x07-os-runner.report@0.5.0"
    assert report["sandbox_backend"] == "vm"
    assert report["exit_code"] == 0
    assert base64.b64decode(report["solve"]["solve_output_b64"], validate=True) == b"OK"
    assert report["runtime_attestation"]["path"] == "att.json"

    phases = set()
    for folder in state.iterdir():
        if not (folder / "job.json").is_file():
            continue
        job = json.loads((folder / "job.json").read_bytes())
        assert set(job) == JOB_KEYS
        assert job["schema_version"] == "x07.vm.job@0.1.0"
        assert (folder / "done").read_bytes() == b"done\n"
        assert folder.name == job["run_id"]
        # The run may first have asked another test's pool, which did not answer in time.
        phases.add(folder.name.removesuffix("-clone").rpartition("-")[2])
    # The first run that needs a snapshot of that size creates it.
    assert phases - {"template"} == {"build", "run"}
