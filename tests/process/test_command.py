"""`x07 run` with a backend of weaker isolation, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.command import x07
from tests.conftest import need
from tests.hostile_folder import BIN, HostileFolder
from x07_sandbox.backends.process import agent_code

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [sys.executable, "-c", "from x07_sandbox.cli.main import entry; entry()", "run"]
BACKENDS = ("os", "none")
pytestmark = pytest.mark.user


def run(backend: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Carry out `x07 run` and return its end."""
    done = x07(cwd, "run", "--sandbox-backend", backend, "--i-accept-weaker-isolation", *words)
    return subprocess.CompletedProcess(words, done.code, done.out.decode(), done.err)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two modules, whose program writes a file to its working folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "main.py").write_text("import lib\nopen('new', 'w').write('1')\nprint(lib.WORD)\n")
    (folder / "lib.py").write_text("WORD = 'found'\n")
    manifest = (
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nfiles = ["*.py"]\nentry = "main.py"\n'
    )
    (folder / "x07-sandbox.toml").write_text(manifest)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_project_runs_and_leaves_its_folder_alone(project: Path, backend: str) -> None:
    """A project runs without a guest image, as --dry-run shows, and files it writes stay out of its folder."""
    plan = run(backend, "--dry-run", ".", cwd=project)
    assert (plan.returncode, "toolchain: python" in plan.stdout, "image" in plan.stdout) == (0, True, False)
    done = run(backend, ".", cwd=project)
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr
    assert not (project / "new").exists()
    assert ("warning: there is no isolation" in done.stderr) == (backend == "none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_without_images_refuses_a_named_image(project: Path, backend: str) -> None:
    """A named image is an error for a backend that uses none."""
    done = run(backend, "--image", "science", ".", cwd=project)
    assert done.returncode == 125
    assert f"cannot use the image science: the backend {backend} uses no guest image" in done.stderr


def test_out_is_refused_by_a_backend_without_copies(project: Path) -> None:
    """`--out` under `none`, which copies no folders, is refused before anything runs."""
    done = run("none", "--out", "out", ".", cwd=project)
    assert (done.returncode, done.stdout) == (125, "")
    assert "cannot use --out: the backend none cannot copy files back" in done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_agent_is_rebuilt(project: Path, backend: str) -> None:
    """A damaged agent file is never started: the run rebuilds it."""
    agent = agent_code(confined=backend == "os")
    agent.chmod(0o600)
    agent.write_bytes(agent.read_bytes()[:1000])
    done = run(backend, ".", cwd=project)
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


def test_git_works_in_a_folder_that_may_be_changed(tmp_path: Path) -> None:
    """Two flags let a program create a repository and commit to it; its hooks and configuration are left out."""
    need(os.access("/usr/bin/git", os.X_OK), "git", installable=True)
    flags = ["--toolchain", "shell", "--allow-hidden", "--allow-protected", ".git", "--allow-write-root", ".", "-c"]
    commit = "git add a && git -c user.name=a -c user.email=a@example.org commit -qm"
    made = run("os", *flags, f"git init -q . && echo a >a && {commit} one", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "left out: .git/config (protected: other tools execute or trust it), .git/hooks (protected)" in made.stderr
    assert not (tmp_path / ".git/hooks").exists()
    more = run("os", *flags, f"echo b >>a && {commit} two", cwd=tmp_path)
    assert (more.returncode, "left out" in more.stderr) == (0, False), more.stderr
    log = run(
        "os",
        "--toolchain",
        "shell",
        "--allow-hidden",
        "--allow-read-root",
        ".",
        "-c",
        "git log --format=%s",
        cwd=tmp_path,
    )
    assert (log.returncode, log.stdout) == (0, "two\none\n"), log.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_process_of_a_run_executes_files_of_the_folder(tmp_path: Path, backend: str) -> None:
    """A run with all its processes imports and executes nothing of the folder that it is started in and granted."""
    folder = HostileFolder(tmp_path / "folder")
    words = ["exec", "--sandbox-backend", backend, "--i-accept-weaker-isolation"]
    # With the gate, the resolver and a supervisor in Perl.
    words += ["--workdir", ".", "--allow-host", "example.org:443"] if backend == "os" else []
    done = subprocess.run(
        [BIN / "x07", *words, "--", "/bin/echo", "ran"],
        cwd=folder.path,
        env=folder.variables(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, folder.executed()) == (0, "ran\n", ""), done.stderr


def test_a_missing_module_on_standard_output_gives_a_hint(tmp_path: Path) -> None:
    """A hint also names a module that a program, such as pytest, reports on standard output."""
    code = "print('E   ModuleNotFoundError: No module named \\'numpy\\''); raise SystemExit(1)"
    done = run("none", "--toolchain", "python", "-c", code, cwd=tmp_path)
    assert done.stderr.endswith("numpy is missing. To add it, run apt-get install python3-numpy\n"), done.stderr


def test_a_source_without_a_language_is_refused_before_it_is_read() -> None:
    """`x07 run -` without --toolchain is refused at once, even if the source has not ended."""
    ours, theirs = os.pipe()
    try:
        done = subprocess.run([*COMMAND, "-"], stdin=ours, capture_output=True, text=True, check=False, timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, "its language is unknown. Add --toolchain" in done.stderr) == (2, True), done.stderr
