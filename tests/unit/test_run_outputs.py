"""Files that the flags of a run name: what the project holds is not written over, what was done is told in any case."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.published import document
from x07_sandbox.cli import os_runner
from x07_sandbox.cli.atomic_output import artifact_file, write_all, write_atomically
from x07_sandbox.cli.main import main
from x07_sandbox.cli.run_outputs import write_files
from x07_sandbox.errors import UsageError
from x07_sandbox.policy import default_policy, render_policy
from x07_sandbox.runs.run import failure

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and a host without guest images."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def x07(*words: str, module: str = "main", most_bytes: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """A command of ours. most_bytes: how large a file it may write, so that a larger one meets the end of a disk."""

    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    argv = [sys.executable, "-m", f"x07_sandbox.cli.{module}", *words]
    return subprocess.run(argv, input=b"", capture_output=True, check=False, timeout=60, preexec_fn=limit)


# what cannot be written


def test_a_file_that_cannot_be_written_loses_nothing_else(place: Path) -> None:
    """Where one file cannot be written, the others are, and the result stays, with a warning and exit code 125."""
    options = argparse.Namespace(
        json=False, compiled_out=place / "gone/prog", diff=place / "gone/d", report_out=place / "r", net_log=None
    )
    result = failure(UsageError("a", "b", "c"))
    with contextlib.ExitStack() as stack:
        artifact = artifact_file(stack)
        assert artifact.take(b"\x7fELF")
        artifact.complete = True
        told, unwritten = write_files(options, result, artifact)
    assert [line.partition(": ")[0] for line in unwritten] == [
        f"cannot write {place}/gone/{name}" for name in ("prog", "d")
    ]
    assert (told.run, told.outcome, told.x07_exit_code) == (result.run, result.outcome, 125)
    assert told.warnings == [*result.warnings, *unwritten]
    assert document((place / "r").read_bytes())["warnings"] == told.warnings


@pytest.mark.parametrize("words", [(), ("--json",), ("--report", "runner")])
def test_a_report_that_cannot_be_written_leaves_the_result(words: tuple[str, ...]) -> None:
    """A full disk under --report-out is told beside how the run ended, not in place of it."""
    done = x07("run", *words, "--report-out", "r", "--toolchain", "shell", "-c", "true", most_bytes=100)
    assert done.returncode == 125
    if "--report" in words:
        assert document(done.stdout)["compile"]["compile_error"].startswith("no guest image")
        assert b"x07: cannot write r: File too large" in done.stderr
    elif words:
        result = document(done.stdout)
        assert result["digests"]["source"]
        assert "cannot write r: File too large" in result["warnings"][0]
    else:
        assert b"x07: refused: no guest image" in done.stderr
        assert b"x07: cannot write r: File too large" in done.stderr


def test_any_name_that_a_file_may_have_is_written(place: Path) -> None:
    """A file whose name is as long as names may be is written like any other, and nothing else is left there."""
    name = "\U0001f600" * 63 + "abc"  # 255 bytes
    write_atomically(place / name, lambda fd: write_all(fd, b"x"))
    assert [(path.name, path.read_bytes()) for path in place.iterdir()] == [(name, b"x")]


# what the run reads

MANIFEST = """schema_version = "x07.sandbox.project@0.1.0"
toolchain = "python"
files = ["*.py"]
entry = "main.py"
policy = "policy.json"
[run]
input = "in.txt"
"""


def project(place: Path, kind: str) -> None:
    """The folder as a project of X07's, or of ours."""
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
@pytest.mark.parametrize("flag", ["--report-out", "--diff", "--attest-runtime"])
def test_nothing_that_a_project_consists_of_is_written_over(
    place: Path, kind: str, words: tuple[str, ...], own: tuple[str, ...], flag: str
) -> None:
    """What a project consists of is refused as an output, be it named or not, also where flags or profiles win."""
    project(place, kind)
    (place / "given.json").write_bytes(render_policy(default_policy()))
    before = {name: (place / name).read_bytes() for name in own}
    for name in own:
        assert main(["run", *words, flag, name]) == 2
    assert {name: (place / name).read_bytes() for name in own} == before


@pytest.mark.parametrize("flag", ["--report-out", "--compiled-out"])
def test_a_source_on_standard_input_is_not_written_over(place: Path, flag: str) -> None:
    """A file that PROGRAM `-` is read from is refused as an output."""
    (place / "a.c").write_text("int main(void) {}")
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", "run", "--toolchain", "c", flag, "a.c", "-"]
    with (place / "a.c").open() as source:
        done = subprocess.run(argv, stdin=source, capture_output=True, check=False, timeout=60)
    assert (done.returncode, b"the run reads it" in done.stderr) == (2, True), done.stderr
    assert (place / "a.c").read_text() == "int main(void) {}"


@pytest.mark.parametrize("text", ["", '{"schema_version": "x07.sandbox.result@0.1.0"}'])
@pytest.mark.parametrize("words", [(), ("--attest-runtime", "policy.json"), ("--diff", "in.txt")])
def test_a_refused_report_is_not_written_all_the_same(place: Path, text: str, words: tuple[str, ...]) -> None:
    """A project's file that is empty, or an earlier document, is not replaced by the error that it may not be."""
    project(place, "x07-sandbox.toml")
    for name in ("empty.py", "in.txt"):
        (place / name).write_text(text)
        assert main(["run", "--report-out", name, *words, "."]) == 2
        assert (place / name).read_text() == text


def test_a_built_program_replaces_no_source(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--compiled-out with a file of an X07 project is refused by both commands."""
    project(place, "x07.json")
    runner = ["--world", "run-os-sandboxed", "--policy", "policy.json", "--project", "x07.json"]
    for name in ("src/main.x07.json", "policy.json", "other.json"):
        assert main(["run", "--compiled-out", name]) == 2
        assert os_runner.main([*runner, "--compiled-out", name]) == 2
        assert capfd.readouterr().err.count("the run reads it") == 2


def test_the_derived_policy_stays(place: Path) -> None:
    """The policy that override flags make of an X07 project's is refused as an output of the same run."""
    project(place, "x07.json")
    words = ["run", "--allow-read-root", "src"]
    assert main([*words, "--json"]) == 125  # for want of an image
    (made,) = (place / ".x07/policies/_generated").iterdir()
    before = made.read_bytes()
    assert main([*words, "--report-out", str(made)]) == 2
    assert made.read_bytes() == before


@pytest.mark.parametrize("flag", ["--compiled-out", "--attest-runtime"])
def test_nothing_replaces_a_module(place: Path, flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A module that x07-os-runner takes along for a single program is refused as an output."""
    (place / "lib/a").mkdir(parents=True)
    for name in ("main.x07.json", "lib/a/b.x07.json"):
        (place / name).write_text("{}")
    (place / "policy.json").write_bytes(render_policy(default_policy()))
    words = ["--world", "run-os-sandboxed", "--policy", "policy.json", "--program", "main.x07.json"]
    assert os_runner.main([*words, "--module-root", "lib", flag, "lib/a/b.x07.json"]) == 2
    assert "the run reads it" in capfd.readouterr().err
    assert (place / "lib/a/b.x07.json").read_text() == "{}"


def test_what_a_run_wrote_into_its_project_is_written_anew(place: Path) -> None:
    """A report inside an X07 project, all of which goes into the machine, is replaced by the next one."""
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
    """A folder without a name, as of an unset variable of a shell, opens no folder to a program, and begins none."""
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
def test_a_folder_that_is_gone_is_told(place: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """Where the current folder was removed a relative name is wrong usage that says so, whatever it was to be."""
    place.rmdir()
    assert main([*words]) == 2
    assert "the current folder does not exist" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["--hide", "--reveal"])
@pytest.mark.parametrize("pattern", ["", "sub/secret", "./secret", "sub/"])
def test_a_pattern_that_could_match_no_name_is_refused(
    flag: str, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A path in place of a name's pattern would hide nothing, so it is wrong usage before anything is copied."""
    assert main(["run", flag, pattern, "prog.py"]) == 2
    assert f"argument {flag}: {pattern!r} is not a pattern for a name" in capfd.readouterr().err


# what is told of an error


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--backend", "docker", "p.py"), 125, "docker"),
        (("--input-b64", "!!", "p.py"), 2, "not base64"),
        (("--world", "run-os", "p.py"), 2, "implements only run-os-sandboxed"),
        (("--report", "runner", "missing.py"), 2, "No such file"),
        (("--report", "wrapped", "--policy", "bad.json", "p.py"), 125, "bad.json"),
        (("--compiled-out", "prog", "p.c"), 125, "it is a link or not a folder"),
        (("--project", "a", "--program", "b"), 2, "more than one program"),
        (("a.x07.json",), 2, "No such file"),
        (("--policy", "bad.json", "b.x07.json"), 3, "bad.json"),
    ],
)
def test_an_error_before_a_run_replaces_the_last_report(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, why: str
) -> None:
    """Whatever ends `x07 run` before there is a run is in --report-out, so that no earlier report is taken for new."""
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
