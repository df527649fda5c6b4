"""`x07 doctor` starts what a run starts, and reports faults with advice."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from tests.command import X07
from tests.vm.conftest import usual_start
from x07_sandbox.backends.qemu.backend import known_verdict
from x07_sandbox.backends.registry import BY_NAME
from x07_sandbox.host.paths import cache_dir, cache_folder
from x07_sandbox.jail.bwrap import SETPRIV
from x07_sandbox.reports.schemas import schemas

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Need
    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]

DOCTOR = (*X07, "doctor", "--json")
SUBJECT = "VM start"


def _vm_start_finding(state: Path, *before: str, stderr: int = subprocess.DEVNULL) -> tuple[int, dict[str, Any]]:
    """Return the exit code, and the doctor's finding from starting a machine."""
    env = os.environ | {"X07_VM_STATE_DIR": str(state)}
    argv = [*before, *DOCTOR]
    done = subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, timeout=120, check=False
    )
    report = json.loads(done.stdout)
    jsonschema.validate(report, json.loads(schemas()["doctor.schema.json"]))
    findings = {finding["subject"]: finding for finding in report["findings"]}
    assert SUBJECT in findings, findings
    states = {state["name"]: state for state in report["backends"]}
    assert list(states) == list(BY_NAME)
    assert states["qemu"]["state"] == ("proven" if done.returncode == 0 else "failed")
    assert len(states["qemu"]["remedies"]) == (0 if done.returncode == 0 else 3)
    assert report["good"] == (done.returncode == 0)
    if report["good"] and usual_start() == "hot":
        assert "VMs are restored from saved processes" in findings["hot clones"]["text"]
    return done.returncode, findings[SUBJECT]


@pytest.fixture(scope="module")
def working_host(image: Image, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], bytes]:
    """Return the findings of a doctor on a working host, and its terminal output; it caches what it learns of KVM."""
    assert image.digest
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    with os.fdopen(ours, "rb", buffering=0) as terminal, os.fdopen(theirs, "wb") as stderr:
        code, found = _vm_start_finding(tmp_path_factory.mktemp("doctor") / "jobs", stderr=stderr.fileno())
        return code, found, terminal.read(4096) or b""


def test_doctor_starts_a_machine(working_host: tuple[int, dict[str, Any], bytes]) -> None:
    """On a working host the doctor starts a jailed machine, gets the agent's answer, and reports it."""
    code, found, shown = working_host
    assert (code, found["good"]) == (0, True)
    assert "the guest agent answered" in found["text"]
    assert b"starting a VM as a run does" in shown


@pytest.mark.root
@pytest.mark.parametrize(
    ("missing", "text", "fix"),
    [
        ("all", "root lacks CAP_KILL CAP_SETGID CAP_SETUID CAP_SETPCAP", "grant these capabilities"),
        ("setuid", "setresuid failed", "allow changing uids"),
    ],
)
@pytest.mark.usefixtures("working_host")
def test_doctor_reports_missing_rights(tmp_path: Path, need: Need, missing: str, text: str, fix: str) -> None:
    """If the jail lacks the rights for any of its steps, the doctor says BAD and why."""
    need(os.geteuid() == 0, "needs root, to take rights away from it", installable=False)
    code, found = _vm_start_finding(tmp_path / "jobs", SETPRIV, f"--bounding-set=-{missing}", f"--inh-caps=-{missing}")
    assert (code, found["good"]) == (1, False)
    assert text in found["text"]
    assert fix in found["fix"]


@pytest.mark.root
@pytest.mark.parametrize(("below", "text"), [("", "Read-only file system"), ("slots", "slots/turn: Read-only file")])
@pytest.mark.usefixtures("working_host")
def test_doctor_finds_a_read_only_cache(tmp_path: Path, need: Need, below: str, text: str) -> None:
    """If the cache or its queue is read-only, so that a run is refused, the doctor says BAD and what to set."""
    need(os.geteuid() == 0, "needs root, to mount", installable=False)
    place = cache_folder(below) if below else cache_dir()
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs")}
    code, findings = _findings(env, "unshare", "--mount", "/bin/bash", "-c", script, "mounted", str(place))
    bad = [finding for finding in findings.values() if finding["good"] is False]
    assert code == 1
    assert [finding for finding in bad if text in finding["text"] and "X07_VM_CACHE_DIR" in finding["fix"]], bad


@pytest.mark.root
def test_doctor_tries_to_create_control_groups(tmp_path: Path, need: Need) -> None:
    """Where root cannot create control groups, as in a container, the doctor says that there are none."""
    need(os.geteuid() == 0, "needs root, to mount", installable=False)
    script = 'mount -t tmpfs -o ro tmpfs /sys/fs/cgroup && exec "$@"'
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    _code, findings = _findings(env, "unshare", "--mount", "/bin/sh", "-ec", script, "mounted")
    assert "no host control groups" in findings["control groups"]["text"]


@pytest.mark.skipif((verdict := known_verdict()) is None or verdict.works, reason="KVM works here, or may work")
def test_doctor_says_that_runs_are_refused_without_hardware(tmp_path: Path) -> None:
    """If X07_VM_REQUIRE_HARDWARE is set and KVM does not work, the doctor says BAD, as a run is refused."""
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_VM_REQUIRE_HARDWARE": "1"}
    code, findings = _findings(env)
    assert (code, findings[SUBJECT]["good"]) == (1, False)
    assert "hardware virtualisation is required" in findings[SUBJECT]["text"]
    assert "unset X07_VM_REQUIRE_HARDWARE" in findings[SUBJECT]["fix"]


def _findings(env: dict[str, str], *before: str) -> tuple[int, dict[str, Any]]:
    """Return exit code and findings of a doctor in this environment, started by the command *before*."""
    argv = [*before, *DOCTOR]
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.returncode, {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_doctor_names_another_x07_on_path(tmp_path: Path) -> None:
    """The doctor names another program called x07 that comes first on PATH, and does not start it."""
    other = tmp_path / "bin" / "x07"
    other.parent.mkdir()
    other.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    other.chmod(0o755)
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    _code, findings = _findings(env | {"PATH": f"{other.parent}:/usr/bin:/bin"})
    assert f"{other} is another program" in findings["x07 on PATH"]["text"]
    assert "x07-sandbox" in findings["x07 on PATH"]["fix"]
    assert not (tmp_path / "started").exists()
    _code, findings = _findings(env | {"PATH": "/nowhere"})
    assert (findings["x07 on PATH"]["good"], findings["x07 on PATH"]["text"]) == (None, "not found")


def test_doctor_shows_our_variables_and_no_secret(tmp_path: Path) -> None:
    """The doctor shows x07's variables with their values, and only the names of similar ones."""
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    code, findings = _findings(env | {"X07_VM_TOKEN": "hunter2", "X07_VM_MAX_RUNNING": "3"})
    assert code == 1  # there is no image in that cache
    assert "X07_VM_MAX_RUNNING=3" in findings["variables"]["text"]
    assert "X07_VM_TOKEN" in findings["variables"]["text"]
    assert "hunter2" not in json.dumps(findings)


def test_doctor_reports_variables_that_refuse_every_run(tmp_path: Path, image: Image) -> None:
    """An unavailable backend or an image pin that does not match is BAD with a run's message and exit code 1."""
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_SANDBOX_BACKEND": "os"}
    code, findings = _findings(env | {"X07_VM_GUEST_IMAGE_DIGEST": "sha256:" + "a" * 64})
    wish, pinned = findings["requested backend"], findings["this guest image is not allowed to run"]
    assert (code, wish["good"], pinned["good"]) == (1, False, False)
    assert "cannot use the backend os: it runs programs in" in wish["text"]
    assert wish["fix"] == "Use X07_SANDBOX_BACKEND=vm, or unset it, or set X07_I_ACCEPT_WEAKER_ISOLATION=1"
    assert image.digest in pinned["text"]
    assert "isolation" not in findings  # no machine was started for it
