"""Bundles, started by their launcher as a user does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import jsonschema
import pytest

from tests.command import X07, x07
from tests.vm.conftest import left_behind
from x07_sandbox.conformance.harness import caller, request
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.policy.decode import render_policy
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.reports.schemas import schemas
from x07_sandbox.sessions.run import attempt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image", "state")]

ECHO: Final = """\
#include <stdio.h>
int main(int argc, char **argv) {
  int c;
  for (int at = 1; at < argc; at++) printf("[%s]", argv[at]);
  while ((c = getchar()) != EOF) putchar(c);
  fputs("warned\\n", stderr);
  return 7;
}
"""
WORDS: Final = ("--json", "a b", "--", "", "--help")


def bundled(place: Path, *words: str, env: Mapping[str, str] | None = None) -> bytes:
    """Make the bundle `prog` in *place*, and return what the command printed."""
    done = x07(place, "bundle", "--out", "prog", *words, env=env)
    assert done.code == 0, done.err
    return done.out


def start(
    place: Path, *words: str, stdin: bytes = b"", env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Start the bundle with more variables."""
    argv = [str(place / "prog"), *words]
    return subprocess.run(
        argv, cwd=cwd or place, env=os.environ | dict(env or {}), input=stdin, capture_output=True, check=False
    )


def test_a_bundled_c_program_runs_like_a_command(tmp_path: Path, state: Path) -> None:
    """Arguments, input, both outputs and the exit code pass through; the report matches its schema."""
    (tmp_path / "echo.c").write_text(ECHO)
    out = bundled(tmp_path, "--json", "--report-out", "report.json", "--emit-dir", "emitted", "echo.c")
    report = json.loads(out)
    jsonschema.validate(report, json.loads(schemas()["x07-bundle.report.schema.json"]))
    assert (tmp_path / "report.json").read_bytes() == (tmp_path / "emitted" / "report.json").read_bytes() == out
    assert report["bundle"]["policy"]["base_policy"] == "built-in:default"
    assert (tmp_path / "emitted" / "policy.used.json").read_bytes() == (tmp_path / "prog.vm/policy.json").read_bytes()
    (tmp_path / "echo.c").unlink()
    done = start(tmp_path, *WORDS, stdin=bytes(range(256)))
    assert (done.returncode, done.stderr) == (7, b"warned\n")
    assert done.stdout == b"".join(b"[%s]" % word.encode() for word in WORDS) + bytes(range(256))
    assert left_behind(state) == []


def test_a_bundled_project_has_its_arguments_variables_and_limits(tmp_path: Path) -> None:
    """A Python project keeps its modules, arguments, variables and policy; folders are below the current folder."""
    project, here = tmp_path / "project", tmp_path / "here"
    project.mkdir()
    (here / "out").mkdir(parents=True)
    (project / "main.py").write_text(
        "import os, sys, time, more\n"
        "print(sys.argv[1:], os.environ['LEVEL'], more.NAME, flush=True)\n"
        "open('out/made', 'w').write('made')\n"
        "if 'sleep' in sys.argv: time.sleep(60)\n"
    )
    (project / "more.py").write_text("NAME = 'more'\n")
    (project / "x07-sandbox.toml").write_text(
        'schema_version = "x07.sandbox.project@0.1.0"\n'
        'toolchain = "python"\nentry = "main.py"\nfiles = ["*.py"]\n\n[run]\nargs = ["own"]\nenv = { LEVEL = "3" }\n'
    )
    bundled(tmp_path, "--timeout", "5", "--allow-write-root", "out", "project")
    done = start(tmp_path, cwd=here)
    assert (done.returncode, done.stdout) == (0, b"['own'] 3 more\n"), done.stderr
    assert (here / "out" / "made").read_text() == "made"
    done = start(tmp_path, "sleep", cwd=here)
    assert (done.returncode, done.stdout) == (124, b"['sleep'] 3 more\n")


def test_a_run_that_is_bound_to_another_image_is_refused() -> None:
    """A run that may use only one image, as of a bundle with --pin-image, is refused with another one."""
    with contextlib.closing(Cancel()) as cancel:
        bound = caller("qemu", cancel, image_digest=f"sha256:{'0' * 64}")
        result, _ = attempt(request("print('ran')"), bound)
    assert (result.outcome, "the program may use only the image sha256:0000" in result.reason) == ("refused", True)


def test_a_changed_or_weakened_bundle_starts_nothing(tmp_path: Path, state: Path) -> None:
    """A changed payload or policy, another backend without consent and a wrong image digest start no VM."""
    (tmp_path / "echo.py").write_text("print('ran')\n")
    bundled(tmp_path, "--pin-image", "echo.py")
    assert start(tmp_path).stdout == b"ran\n"
    consent = {"X07_I_ACCEPT_WEAKER_ISOLATION": "1"}
    for env, why in (
        ({"X07_VM_BACKEND": "podman"}, b"weaker isolation"),
        ({"X07_SANDBOX_BACKEND": "os", **consent}, b"uses none"),
        ({"X07_VM_GUEST_IMAGE_DIGEST": f"sha256:{'0' * 64}", **consent}, b"is not allowed to run"),
    ):
        done = start(tmp_path, env=env)
        assert (done.returncode, done.stdout) == (125, b"")
        assert why in done.stderr
    jobs = sorted(state.iterdir())
    for name in ("payload", "policy.json"):
        path = tmp_path / "prog.vm" / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        done = start(tmp_path, env=consent)
        assert (done.returncode, done.stdout) == (125, b"")
        assert f"{path} was changed".encode() in done.stderr
        path.write_bytes(before)
    assert sorted(state.iterdir()) == jobs
    assert start(tmp_path).stdout == b"ran\n"


def test_a_program_that_cannot_be_built_leaves_no_bundle(tmp_path: Path) -> None:
    """If the build fails, the compiler's messages are shown and nothing is written."""
    (tmp_path / "bad.c").write_text("int main( {")
    before = sorted(tmp_path.iterdir())
    done = x07(tmp_path, "bundle", "--out", "prog", "bad.c")
    assert (done.code, done.out) == (125, b"")
    assert "bad.c:1:11: error:" in done.err
    assert "x07: cannot bundle bad.c: the compiler exited with status 1" in done.err
    assert not [path for path in tmp_path.iterdir() if path not in before and path.name.startswith(("prog", ".x07"))]


def test_a_cancelled_bundle_leaves_nothing(tmp_path: Path, state: Path) -> None:
    """Ctrl-C during the build ends `x07 bundle` with exit code 130, and leaves no file and no job."""
    place = tmp_path / "place"
    (place / "project").mkdir(parents=True)
    (place / "project" / "Makefile").write_text("prog:\n\tsleep 100\n")
    manifest = (
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "make"\nartifact = "prog"\nfiles = ["Makefile"]\n'
    )
    (place / "project" / "x07-sandbox.toml").write_text(manifest)
    argv = [*X07, "bundle", "--no-cache", "--out", "prog", "project"]
    with subprocess.Popen(argv, cwd=place, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as command:
        deadline = time.monotonic() + 60
        while not list(state.glob("*-build/job.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    assert [path.name for path in place.iterdir()] == ["project"]
    assert left_behind(state) == []


@pytest.mark.full("an image with the stand-in for X07's toolchain")
def test_a_bundled_x07_program_reads_arguments_and_writes_raw_output(tmp_path: Path, image: Image) -> None:
    """An X07 program gets its name and arguments as input, and its output has no frame."""
    from x07_sandbox.images.build import build_image

    assert image.digest
    build_image(name="x07-tests", x07=Path(__file__).parent / "x07_toolchain", progress=lambda _text: None)
    (tmp_path / "policy.json").write_bytes(render_policy(TEMPLATES["worker"]))
    (tmp_path / "main.x07.json").write_text(json.dumps({"c": "out->data = in.data; out->size = in.size;"}))
    env = {"X07_VM_GUEST_IMAGE": "x07-tests"}
    out = bundled(tmp_path, "--policy", "policy.json", "main.x07.json", env=env)
    assert json.loads(out)["report"]["compile"]["lang_id"]
    done = start(tmp_path, "ab", stdin=b"not read")
    words = (b"prog", b"ab")
    expected = b"".join(len(word).to_bytes(4, "little") + word for word in words)
    assert (done.returncode, done.stdout) == (0, len(words).to_bytes(4, "little") + expected), done.stderr
