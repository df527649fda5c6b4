"""The VM smoke gate: it passes if the promises hold, and fails if one is broken or none was checked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from x07_sandbox.images.build import build_image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from x07_sandbox.images.store import Image

ROOT: Final = Path(__file__).resolve().parents[2]
GATE: Final = ROOT / "scripts" / "ci" / "check_vm_sandbox_smoke.sh"
PASSED: Final = "ok: VM sandbox smoke passed"
CHECKS: Final = [
    "backend",
    "build",
    "mounts",
    "limits",
    "labels",
    "orphan",
    "sweep",
    "network",
    "weaker",
    "x07-program",
    "bundle",
]

# A stand-in for a broken x07: it runs the program on this host without policy or record, and reports success in a
# result like the real one. It has no other command, so their checks are skipped.
LYING: Final = """#!{python}
import json, os, re, subprocess, sys

if "--help" in sys.argv:
    sys.exit(print("    run         run a program in a throw-away virtual machine"))
words = sys.argv[2:]
at = max(at for at, word in enumerate(words) if word.endswith(".py") or word.endswith("/project"))
program, arguments = words[at], words[at + 2 :]
if program.endswith("/project"):
    done = subprocess.run(["make", "-s", "-C", program], check=True)
    argv = [program + "/smoke"]
else:
    argv = [sys.executable, program, *arguments]
if "--json" not in words:
    os.execv(argv[0], argv)
done = subprocess.run(argv, capture_output=True, text=True, check=False)
print(json.dumps({{
    "outcome": "ok", "reason": "the program exited with status 0", "exit_code": 0, "x07_exit_code": 0,
    "isolation": "vm-hardware", "backend": "qemu", "artifact_from": "build",
    "stdout": {{"text": done.stdout}}, "stderr": {{"text": done.stderr}}, "changes": {{"state": "applied"}},
    "phases": {{"build": {{"job_id": "1-1-1-build"}}, "run": {{"job_id": "1-1-1-run"}}}},
    "digests": {{"artifact": "sha256:" + "0" * 64}},
}}))
"""

pytestmark = pytest.mark.vm


def gate(
    tmp_path: Path, *words: str, env: Mapping[str, str] | None = None, path: Path | None = None
) -> tuple[int, list[str]]:
    """Run the gate with temporary files in *tmp_path* and *path* first in PATH; return exit code and lines."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = [str(path)] if path else []
    given = {
        name: text for name, text in os.environ.items() if not name.startswith("X07_") or name == "X07_VM_CACHE_DIR"
    }
    given |= {"TMPDIR": str(scratch), "PATH": os.pathsep.join([*before, str(ROOT / ".venv/bin"), os.environ["PATH"]])}
    done = subprocess.run(
        [GATE, *words],
        env=given | dict(env or {}),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=380,
    )
    assert list(scratch.iterdir()) == [], done.stdout
    return done.returncode, done.stdout.splitlines()


def states(lines: list[str]) -> dict[str, str]:
    """Return the state of each check by name: ok, skip or fail."""
    found = (re.match(r"(ok|skip|fail): ([a-z0-9-]+): ", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def stand_in(tmp_path: Path, text: str) -> Path:
    """Write an executable x07 with this text that replaces the real one, and return its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "x07").write_text(text)
    (folder / "x07").chmod(0o755)
    return folder


def test_the_gate_passes_on_this_machine(image: Image, tmp_path: Path) -> None:
    """The smoke gate prints one line per check, ends with `ok: VM sandbox smoke passed`, and exits with 0."""
    assert image.digest
    code, lines = gate(tmp_path)
    assert (code, lines[-1]) == (0, PASSED), "\n".join(lines)
    found = states(lines)
    assert list(found) == CHECKS
    assert len(lines) == len(CHECKS) + 1
    skipped = {name for name, state in found.items() if state == "skip"}
    assert skipped <= {"sweep", "x07-program"}
    assert lines[0] in {"ok: backend: qemu, vm-emulated", "ok: backend: qemu, vm-hardware"}


@pytest.mark.full("another whole gate, with an image of its own")
def test_the_gate_runs_an_x07_program(image: Image, tmp_path: Path) -> None:
    """The gate runs an X07 project with its profile `sandbox` if the image has X07's toolchain."""
    assert image.digest
    build_image(name="x07-tests", x07=Path(__file__).parent / "x07_toolchain", progress=lambda _text: None)
    code, lines = gate(tmp_path, env={"X07_VM_GUEST_IMAGE": "x07-tests"})
    found = states(lines)
    assert (code, found["x07-program"], found["bundle"]) == (0, "ok", "ok"), "\n".join(lines)


def test_the_gate_fails_if_promises_are_broken(tmp_path: Path) -> None:
    """The gate fails, and names each broken promise, if x07 runs programs on the host and claims a VM."""
    code, lines = gate(tmp_path, path=stand_in(tmp_path, LYING.format(python=sys.executable)))
    text = "\n".join(lines)
    assert code == 1, text
    assert PASSED not in text
    found = states(lines)
    assert {name for name in CHECKS if found[name] == "fail"} >= {
        "build",
        "mounts",
        "limits",
        "labels",
        "orphan",
        "network",
        "weaker",
    }, text
    assert lines[-1].startswith("fail: VM sandbox smoke: ")
    assert "127.0.0.1" in text  # what the build and the program could reach
    assert "ran the program" in text


def test_the_gate_fails_if_nothing_was_checked(tmp_path: Path) -> None:
    """A gate with all checks skipped fails."""
    code, lines = gate(tmp_path, path=stand_in(tmp_path, "#!/bin/sh\necho 'usage: x07'\n"))
    assert code == 1
    assert set(states(lines).values()) == {"skip"}
    assert lines[-1] == "fail: VM sandbox smoke: no check ran"


def test_a_selected_backend_that_cannot_run_fails_the_gate(tmp_path: Path) -> None:
    """The gate fails if the selected backend needs an acceptance that was not given."""
    code, lines = gate(tmp_path, env={"X07_VM_BACKEND": "docker"})
    assert code == 1
    assert states(lines)["backend"] == "fail"
    assert states(lines)["weaker"] == "ok"


@pytest.mark.parametrize(
    ("words", "env"), [(["--quick"], {}), ([], {"X07_SANDBOX_BACKEND": "none"}), ([], {"X07_SANDBOX_BACKEND": "os"})]
)
def test_the_gate_checks_virtual_machines_only(tmp_path: Path, words: list[str], env: dict[str, str]) -> None:
    """The gate rejects arguments, and a sandbox backend that is not a VM, before any check."""
    code, lines = gate(tmp_path, *words, env=env)
    assert code == 1
    assert states(lines) == {}


def test_the_how_to_shows_the_output_of_the_gate() -> None:
    """docs/how-to/run-in-ci.md shows a line for each check of the gate in order, and the last line."""
    page = (ROOT / "docs" / "how-to" / "run-in-ci.md").read_text(encoding="utf-8")
    block = re.search(r"(?s)```console\n\$ scripts/ci/check_vm_sandbox_smoke\.sh\n(.*?)```", page)
    assert block
    lines = block[1].splitlines()
    assert list(states(lines)) == CHECKS
    assert lines[-1] == PASSED
