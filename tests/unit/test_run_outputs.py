"""Output files named by flags of a run: never over the project's files, and written whatever happens."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.command import X07
from tests.published import document
from x07_sandbox.cli import os_runner
from x07_sandbox.cli.main import main
from x07_sandbox.cli.outputs import artifact_file, write_files
from x07_sandbox.errors import UsageError
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.sessions.run import failure

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a host without guest images."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def x07(*words: str, module: str = "main", most_bytes: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run one of our commands. most_bytes: the largest file it may write, like a full disk."""

    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    argv = [sys.executable, "-m", f"x07_sandbox.cli.{module}", *words]
    return subprocess.run(argv, input=b"", capture_output=True, check=False, timeout=60, preexec_fn=limit)


# unwritable outputs


def test_an_unwritable_file_loses_nothing_else(place: Path) -> None:
    """A file that cannot be written gives a warning and exit code 125; the others are written."""
    options = argparse.Namespace(
        json=False, compiled_out=place / "gone/prog", diff=place / "gone/d", report_out=place / "r", net_log=None
    )
    result = failure(UsageError("a", "b", "c"))
    with contextlib.ExitStack() as stack:
        artifact = artifact_file(stack)
        assert artifact.take(b"\x7fELF")
        artifact.complete = True
        written, unwritten = write_files(options, result, artifact)
    assert [line.partition(": ")[0] for line in unwritten] == [
        f"cannot write {place}/gone/{name}" for name in ("prog", "d")
    ]
    assert (written.run, written.outcome, written.x07_exit_code) == (result.run, result.outcome, 125)
    assert written.warnings == [*result.warnings, *unwritten]
    assert document((place / "r").read_bytes())["warnings"] == written.warnings


@pytest.mark.parametrize("words", [(), ("--json",), ("--report", "runner")])
def test_an_unwritable_report_keeps_the_result(words: tuple[str, ...]) -> None:
    """A full disk for --report-out is reported next to the result."""
    done = x07("run", *words, "--report-out", "r", "--toolchain", "shell", "-c", "true", most_bytes=100)
    assert done.returncode == 125
    warning = "cannot write r: File too large"
    if words == ("--json",):
        result = document(done.stdout)
        assert result["digests"]["source"]
        assert warning in result["warnings"][0]
        return
    assert f"x07: {warning}" in done.stderr.decode()
    if words:
        assert document(done.stdout)["compile"]["compile_error"].startswith("there is no guest image")
    else:
        assert b"x07: refused: there is no guest image" in done.stderr


# files that the run reads

MANIFEST = """schema_version = "x07.sandbox.project@0.1.0"
toolchain = "python"
files = ["*.py"]
entry = "main.py"
policy = "policy.json"
[run]
input = "in.txt"
"""


def project(place: Path, kind: str) -> None:
    """Make the folder a project of X07 or of ours."""
    (place / "src").mkdir()
    for name, text in (("main.py", "pass\n"), ("src/main.x07.json", "{}"), ("in.txt", "in"), ("x07.lock.json", "{}")):
        (place / name).write_text(text)
    (place / "policy.json").write_bytes(render_policy(default_policy()))
    (place / "other.json").write_bytes(render_policy(default_policy()))
    profile = {"world": "run-os-sandboxed", "policy": "policy.json", "input": "in.txt"}
    other = profile | {"policy": "other.json", "input": "other.txt"}
    document = {"schema_version": "x07.project@0.5.0", "profiles": {"dev": profile, "other": other}}
    text = json.dumps(document) if kind == "x07.json" else MANIFEST
    (place / kind).write_text(text)


@pytest.mark.parametrize(
    ("kind", "words", "own"),
    [
        ("x07.json", (), ("src/main.x07.json", "x07.lock.json", "policy.json", "in.txt", "x07.json")),
        ("x07.json", (".",), ("src/main.x07.json", "x07.json")),
        ("x07.json", ("--policy", "given.json", "--input-b64", ""), ("policy.json", "in.txt", "other.json")),
        ("x07-sandbox.toml", (".",), ("main.py", "policy.json", "in.txt", "x07-sandbox.toml")),
        ("x07-sandbox.toml", ("--policy", "given.json", "--stdin", "."), ("policy.json", "in.txt")),
    ],
)
@pytest.mark.parametrize("flag", ["--report-out", "--diff", "--attest-runtime", "--compiled-out"])
def test_project_files_are_not_overwritten(
    place: Path, kind: str, words: tuple[str, ...], own: tuple[str, ...], flag: str
) -> None:
    """An output over a file of the project is refused."""
    project(place, kind)
    (place / "given.json").write_bytes(render_policy(default_policy()))
    before = {name: (place / name).read_bytes() for name in own}
    for name in own:
        assert main(["run", *words, flag, name]) == 2
    assert {name: (place / name).read_bytes() for name in own} == before


@pytest.mark.parametrize("flag", ["--report-out", "--compiled-out"])
def test_a_source_on_standard_input_is_not_written_over(place: Path, flag: str) -> None:
    """An output over the source on standard input is refused."""
    (place / "a.c").write_text("int main(void) {}")
    argv = [*X07, "run", "--toolchain", "c", flag, "a.c", "-"]
    with (place / "a.c").open() as source:
        done = subprocess.run(argv, stdin=source, capture_output=True, check=False, timeout=60)
    assert (done.returncode, b"the run reads it" in done.stderr) == (2, True), done.stderr
    assert (place / "a.c").read_text() == "int main(void) {}"


@pytest.mark.parametrize("text", ["", '{"schema_version": "x07.sandbox.result@0.1.0"}'])
@pytest.mark.parametrize("words", [(), ("--attest-runtime", "policy.json"), ("--diff", "in.txt")])
def test_a_refused_report_is_not_written(place: Path, text: str, words: tuple[str, ...]) -> None:
    """A refused --report-out is not written with the error either."""
    project(place, "x07-sandbox.toml")
    for name in ("empty.py", "in.txt"):
        (place / name).write_text(text)
        assert main(["run", "--report-out", name, *words, "."]) == 2
        assert (place / name).read_text() == text


@pytest.mark.parametrize("flag", ["--compiled-out", "--attest-runtime"])
def test_the_runner_writes_over_nothing_that_it_reads(
    place: Path, flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """An output of x07-os-runner over a file of its project, or over a module, is refused."""
    project(place, "x07.json")
    (place / "lib/a").mkdir(parents=True)
    (place / "lib/a/b.x07.json").write_text("{}")
    whole = ("--project", "x07.json"), ("src/main.x07.json", "policy.json", "other.json")
    one = ("--program", "src/main.x07.json", "--module-root", "lib"), ("lib/a/b.x07.json",)
    for words, names in (whole, one):
        for name in names:
            argv = ["--world", "run-os-sandboxed", "--policy", "policy.json", *words, flag, name]
            assert os_runner.main(argv) == 2
            assert "the run reads it" in capfd.readouterr().err
    assert (place / "lib/a/b.x07.json").read_text() == "{}"


def test_the_derived_policy_stays(place: Path) -> None:
    """An output over the derived policy is refused."""
    project(place, "x07.json")
    words = ["run", "--allow-read-root", "src"]
    assert main([*words, "--json"]) == 125  # for want of an image
    (made,) = (place / ".x07/policies/_generated").iterdir()
    before = made.read_bytes()
    assert main([*words, "--report-out", str(made)]) == 2
    assert made.read_bytes() == before


def test_an_earlier_report_is_replaced(place: Path) -> None:
    """A report inside an X07 project is replaced by the next run."""
    project(place, "x07.json")
    runs = set()
    for _ in range(2):
        assert main(["run", "--json", "--report-out", "report.json"]) == 125  # for want of an image
        runs.add(document((place / "report.json").read_bytes())["run"])
    assert len(runs) == 2


@pytest.mark.parametrize("words", [("run", "--out", "", "-c", "true", "--toolchain", "shell"), ("init", "")])
def test_an_empty_name_is_not_this_folder(
    place: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty folder name is a usage error."""
    assert main([*words]) == 2
    assert "the name of the folder is empty" in capfd.readouterr().err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--report-out", "a.json", "-c", "true", "--toolchain", "shell"),
        ("policy", "check", "built-in:cli", "--report-out", "a.json"),
        ("policy", "init", "--template", "cli"),
        ("init",),
    ],
)
def test_a_removed_folder_is_reported(place: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """A removed current folder is a usage error that says so."""
    place.rmdir()
    assert main([*words]) == 2
    assert "the current folder does not exist" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["--hide", "--reveal"])
@pytest.mark.parametrize("pattern", ["", "sub/secret", "sub/"])
def test_a_pattern_that_could_match_no_name_is_refused(
    flag: str, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A path as a --hide or --reveal pattern is a usage error."""
    assert main(["run", flag, pattern, "prog.py"]) == 2
    assert f"wrong usage of {flag}: {pattern!r} is not a pattern for a name" in capfd.readouterr().err


# reports of errors


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--backend", "docker", "p.py"), 125, "docker"),
        (("--input-b64", "!!", "p.py"), 2, "not base64"),
        (("--report", "runner", "missing.py"), 2, "No such file"),
        (("--report", "wrapped", "--policy", "bad.json", "p.py"), 125, "bad.json"),
        (("--compiled-out", "prog", "p.c"), 125, "it is a link or not a folder"),
        (("a.x07.json",), 2, "No such file"),
        (("--policy", "bad.json", "b.x07.json"), 3, "bad.json"),
    ],
)
def test_an_error_before_a_run_replaces_the_last_report(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, why: str
) -> None:
    """An error before a run replaces an earlier --report-out."""
    (place / "p.py").write_text("pass\n")
    (place / "p.c").write_text("int main(void) {}\n")
    (place / "b.x07.json").write_text("{}")
    (place / "bad.json").write_text("{}")
    (place / "link").symlink_to("p.py")
    (place / "r").write_text(json.dumps({"schema_version": "x07.sandbox.result@0.1.0", "outcome": "ok"}))
    if "--compiled-out" in words:
        monkeypatch.setenv("X07_VM_STATE_DIR", str(place / "link"))
    assert main(["run", "--report-out", "r", *words]) == code
    found = document((place / "r").read_bytes())
    assert found["outcome"] in {"usage-error", "refused"}
    assert (found["x07_exit_code"], why in found["reason"]) == (code, True), found
