"""X07's programs and projects: precedence of options, reports, and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from tests.command import X07 as COMMAND
from tests.published import document
from x07_sandbox.cli import os_runner
from x07_sandbox.cli.main import main
from x07_sandbox.host import settings
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.programs.toolchains import BY_NAME
from x07_sandbox.reports.schemas import schemas
from x07_sandbox.sessions.prepare import output_caps
from x07_sandbox.sessions.request import RunCaller, RunRequest, load_program
from x07_sandbox.x07.programs import load_artifact, load_x07
from x07_sandbox.x07.project import PROTOCOL, X07, Options, Profile, merged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.sessions.request import Loader

PROFILE = {"world": "run-os-sandboxed", "policy": "policy.json", "solve_fuel": 5000, "max_output_bytes": 700}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with its own lock file, in a place without guest images."""
    folder = tmp_path / "project"
    folder.mkdir()
    document: dict[str, Any] = {"schema_version": "x07.project@0.5.0", "lockfile": "own.lock.json"}
    document |= {"profiles": {"dev": PROFILE, "plain": {"world": "run-os-sandboxed", "policy": "policy.json"}}}
    (folder / "x07.json").write_text(json.dumps(document))
    (folder / "own.lock.json").write_text("{}")
    (folder / "policy.json").write_bytes(render_policy(default_policy()))
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    monkeypatch.chdir(tmp_path)
    return folder


@contextlib.contextmanager
def loaded(loader: Loader = load_x07, **words: Any) -> Iterator[tuple[RunRequest, tuple[str, ...]]]:  # noqa: ANN401 - any field of a request
    """The request after loading its program, and the compiler's arguments."""
    with contextlib.ExitStack() as stack, contextlib.closing(Cancel()) as cancel:
        caller = RunCaller(cancel=cancel, loaders=(loader,))
        request, program = load_program(RunRequest(**words), caller, stack)
        yield request, program.source.args


@pytest.mark.parametrize(
    ("profile", "flag", "most"),
    [("dev", None, 700), ("dev", 9, 9), ("dev", 0, 0), ("dev", 800, 800), ("plain", None, 1 << 20), ("plain", 9, 9)],
)
def test_the_output_limit_of_an_x07_project(project: Path, profile: str, flag: int | None, most: int) -> None:
    """The output limit comes from the flag, else the profile, else X07's default."""
    with loaded(program=project, profile=profile, max_output_bytes=flag) as (request, argv):
        assert request.max_output_bytes == most
        assert argv[argv.index("--max-output-bytes") + 1] == str(most)
        assert output_caps(request, X07.protocol) == (most + 4, 256 * 1024)


@pytest.mark.parametrize("profiles", [{"foo": PROFILE}, {"dev": PROFILE}, {"dev": {"world": "run-os"}}, {}])
def test_os_runner_ignores_profiles(
    project: Path, capfdbinary: pytest.CaptureFixture[bytes], profiles: dict[str, Any]
) -> None:
    """x07-os-runner --project ignores profiles."""
    manifest = json.loads((project / "x07.json").read_bytes())
    (project / "x07.json").write_text(json.dumps(manifest | {"profiles": profiles}))
    words = ["--world", "run-os-sandboxed", "--policy", str(project / "policy.json"), "--project"]
    assert os_runner.main([*words, str(project / "x07.json")]) == 1
    assert json.loads(capfdbinary.readouterr().out)["mode"] == "project-compile-run"  # it failed for want of an image
    unprofiled = partial(load_x07, profiles=False)
    with loaded(unprofiled, program=project, max_output_bytes=1 << 20) as (request, argv):
        assert (request.policy, request.input, request.max_output_bytes) == (None, None, 1 << 20)
        assert argv[argv.index("--solve-fuel") + 1] == "50000000"


@pytest.mark.parametrize(("given", "cap"), [(None, settings.OUTPUT_MAX_BYTES), (0, 0), (9, 9)])
def test_other_programs_have_one_limit_for_both_streams(given: int | None, cap: int) -> None:
    """Programs of our toolchains have the same limit for both streams."""
    assert output_caps(RunRequest(max_output_bytes=given), BY_NAME["c"].protocol) == (cap, cap)


def test_a_zero_is_a_limit_like_any_other() -> None:
    """A flag's 0 or "no" overrides the profile."""
    profile = Profile(world="run-os-sandboxed", solve_fuel=5000, max_memory_bytes=9)
    options = merged(Options(solve_fuel=0, cpu_time_limit_seconds=0, auto_ffi=False), profile)
    assert (options.solve_fuel, options.cpu_time_limit_seconds, options.max_memory_bytes) == (0, 0, 9)
    assert (options.auto_ffi, options.cc_profile, options.debug_borrow_checks) == (False, "default", None)


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["project"], {"kind": "project", "path": "project", "root": "project", "lock": "project/own.lock.json"}),
        (["--project", "project/x07.json"], {"kind": "project", "path": "project/x07.json", "root": "project"}),
        (["-c", "true", "--toolchain", "shell", "tool"], {"kind": "program", "path": "-", "root": None}),
        (["tool", "word"], {"kind": "program", "path": "tool", "root": None}),
        (
            ["--policy", "built-in:worker", "--artifact", "tool", "word"],
            {"kind": "artifact", "path": "tool", "root": None},
        ),
    ],
)
def test_the_wrapped_report_names_what_was_run(
    project: Path, capfdbinary: pytest.CaptureFixture[bytes], words: list[str], target: dict[str, str | None]
) -> None:
    """The wrapped report names its target and lock file."""
    assert project.is_dir()
    assert main(["run", "--report", "wrapped", *words]) == 1
    report = json.loads(capfdbinary.readouterr().out)
    jsonschema.validate(report, json.loads(schemas()["x07-run.report.schema.json"]))
    found = report["target"]
    assert (found["kind"], found["path"], found["project_root"]) == (target["kind"], target["path"], target["root"])
    assert found["lockfile"] == ("project/own.lock.json" if found["kind"] == "project" else None)


def test_a_project_of_ours_is_not_run_without_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`x07 run` next to an x07-sandbox.toml suggests `x07 run .`."""
    monkeypatch.chdir(tmp_path)
    Path("x07-sandbox.toml").touch()
    assert main(["run", "--dry-run"]) == 2
    assert "To run the project in this folder: x07 run ." in capfd.readouterr().err


@pytest.mark.parametrize("place", [".", "src/deep"])
def test_a_project_is_run_from_inside(
    project: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Without a program `x07 run` uses the nearest x07.json."""
    assert main(["run", "--profile", "dev", "--input", os.devnull]) == 2
    assert b"wrong usage: PROGRAM is missing" in capfdbinary.readouterr().err
    (project / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(project / place)
    assert main(["run", "--profile", "dev", "--input", os.devnull, "--report", "wrapped"]) == 1
    target = json.loads(capfdbinary.readouterr().out)["target"]
    assert (target["kind"], target["path"]) == ("project", str(project / "x07.json"))


@pytest.mark.parametrize("program", ["project", "project/x07.json"])
def test_paths_of_a_policy_begin_in_the_project(
    project: Path, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    """A relative --policy or host file of an X07 project lies in the project."""
    (project / "deny.txt").write_text("example.org:*\n")
    (project.parent / "here.json").write_bytes(render_policy(default_policy()))
    words = ["--profile", "plain", "--policy", "policy.json", "--deny-host-file", "deny.txt"]
    assert main(["run", "--report", "wrapped", *words, program]) == 1
    assert "x07 run: using derived policy " in capsys.readouterr().err
    assert len(list((project / ".x07/policies/_generated").iterdir())) == 1
    for flags, name in ((["--policy", "here.json"], "here.json"), (["--allow-host-file", "tool"], "tool")):
        assert main(["run", *flags, program]) == 2
        assert f" project/{name}: No such file" in capsys.readouterr().err
    assert main(["run", "--policy", "built-in:worker", program]) == 1
    policy = json.loads((project / "policy.json").read_bytes())
    policy["fs"]["read_roots"] = ["/etc"]
    (project / "policy.json").write_text(json.dumps(policy))
    capsys.readouterr()
    assert main(["run", program]) == 2
    assert f"To accept it, add --policy {project}/policy.json" in capsys.readouterr().err  # right wherever it is typed
    assert main(["run", "--policy", str(project.parent / "here.json"), program]) == 1


@pytest.mark.parametrize("words", [["--project", "project/x07.json"], ["--program", "project/main.x07.json"]])
def test_ignored_module_roots_give_a_warning(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """x07-os-runner warns about --module-root with a project."""
    (project / "main.x07.json").write_text("{}")
    world = ["--world", "run-os-sandboxed", "--policy", "project/policy.json"]
    assert os_runner.main([*world, *words, "--module-root", "project"]) == 1
    assert ("--module-root has no effect on a project" in capsys.readouterr().err) is (words[0] == "--project")


def test_an_artifact_has_the_flat_report(project: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """--report runner with --artifact prints X07's flat report."""
    assert project.is_dir()
    words = ["run", "--report", "runner", "--artifact", "tool"]
    assert main(words) == 2
    assert b"no policy" in capfdbinary.readouterr().err  # as for everything of X07's
    assert main([*words, "--policy", "built-in:worker"]) == 1
    report = json.loads(capfdbinary.readouterr().out)
    jsonschema.validate(report, json.loads(schemas()["x07-os-runner.report.schema.json"]))
    assert (report["mode"], report["world"], report["ok"]) == ("run-os", "run-os-sandboxed", False)
    assert report["trap"].startswith("vm backend failure: ")


def test_an_artifact_uses_x07s_protocol(project: Path) -> None:
    """An artifact with X07's report gets framed input and X07's limits."""
    tool = project.parent / "tool"
    loader = partial(load_artifact, options=Options(cpu_time_limit_seconds=7))
    with contextlib.ExitStack() as stack, contextlib.closing(Cancel()) as cancel:
        asked = RunRequest(program=tool, args=("a",))
        request, program = load_program(asked, RunCaller(cancel=cancel, loaders=(loader,)), stack)
    assert (request.args, request.input, request.max_output_bytes) == ((), b"\1\0\0\0\1\0\0\0a", 1 << 20)
    assert PROTOCOL.frame_input(b"a") == b"\1\0\0\0a"
    assert (program.toolchain.build, program.toolchain.protocol, program.cpu_ms) == (None, PROTOCOL, 7000)


@pytest.mark.parametrize(
    ("words", "variables"),
    [(["--backend", "podman"], {}), (["--sandbox-backend", "none"], {}), ([], {"X07_VM_BACKEND": "podman"})],
)
def test_unaccepted_weaker_isolation_has_its_exit_code(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    variables: dict[str, str],
) -> None:
    """Unaccepted weaker isolation ends with 2 for X07 programs and with 125 for others."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    target = [*words, "--policy", str(project / "policy.json"), str(project)]
    assert main(["run", *target]) == 2
    output = capsys.readouterr()
    assert (output.out, "weaker isolation" in output.err) == ("", True)
    assert main(["run", "--json", *target]) == 2
    result = document(capsys.readouterr().out)
    assert (result["x07_exit_code"], result["outcome"], "weaker isolation" in result["reason"]) == (2, "refused", True)
    assert main(["run", *words, "--report", "runner", "--artifact", "tool"]) == 2
    assert main(["run", *words, "tool"]) == 125


@pytest.mark.parametrize(
    ("section", "change", "code"), [("limits", {"wall_mss": 1}, 3), ("process", {"max_live": 0}, 2)]
)
@pytest.mark.parametrize("how", [[], ["--json"], ["--dry-run"], ["--report", "wrapped"]])
def test_an_invalid_policy_has_one_exit_code(
    project: Path, capsys: pytest.CaptureFixture[str], how: list[str], section: str, change: dict[str, Any], code: int
) -> None:
    """An invalid policy ends with the same exit code in every output format."""
    policy = json.loads((project / "policy.json").read_bytes())
    policy[section] |= change
    (project / "policy.json").write_text(json.dumps(policy))
    assert main(["run", *how, str(project)]) == code
    output = capsys.readouterr()
    assert ("x07.x07diag@0.1.0" in output.err) is (code == 3)
    assert output.out == "" or document(output.out)["x07_exit_code"] == code
    given = ["--policy", str(project / "policy.json")]
    report = [] if "--report" in how else ["--report", "runner"]
    assert main(["run", *how, *given, *report, "--artifact", "tool"]) == code
    assert main(["run", *how, *given, "tool"]) == 125


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["main.x07.json"], 2, "no policy given: "),
        (["--input", "missing", "tool"], 2, "cannot read the input missing: "),
        (["--input", ".", "tool"], 2, "it is a folder"),
        (["--policy", "missing", "tool"], 2, "cannot read the policy missing: "),
        (["--env", "X07_A=1", "tool"], 2, "names that start with X07_ are reserved"),
        (["--env", "=1", "tool"], 2, "cannot use --env '=1': the variable name is empty"),
        (["-c", "x", "main.x07.json"], 2, "both give a program"),
        (["--allow-host", "example.org", "tool"], 2, "the port is missing"),
        (["--max-output-bytes", "9", "tool"], 125, "no guest image"),
    ],
)
def test_a_dry_run_is_refused_as_the_run_would_be(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, why: str
) -> None:
    """--dry-run is refused with the same reason and exit code as the run."""
    (project.parent / "main.x07.json").write_text("{}")
    reasons = []
    for how in ([], ["--dry-run"]):
        assert main(["run", "--json", *how, *words]) == code
        reasons.append(document(capsys.readouterr().out)["reason"])
    assert reasons[0] == reasons[1]
    assert why in reasons[0]


@pytest.mark.parametrize("how", [[], ["--json"], ["--report", "wrapped"], ["--dry-run"]])
@pytest.mark.parametrize("given", [["--input", "tool"], ["--input-b64", "aGk="], ["--stdin"]])
def test_arguments_and_input_are_alternatives(
    project: Path, capsys: pytest.CaptureFixture[str], given: list[str], how: list[str]
) -> None:
    """An X07 program with both arguments and input is a usage error."""
    assert main(["run", *how, *given, str(project), "--", "a", "bc"]) == 2
    output = capsys.readouterr()
    assert "with arguments and input" in (output.err or document(output.out)["reason"])
    with loaded(program=project, args=("a", "bc")) as (request, _):
        assert (request.args, request.input) == ((), b"\2\0\0\0\1\0\0\0a\2\0\0\0bc")


def test_a_dry_run_waits_for_no_input(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run does not wait for input."""
    os.mkfifo(project.parent / "pipe")
    assert main(["run", "--dry-run", "--input", "pipe", "tool"]) == 125
    assert "no guest image" in capsys.readouterr().err


def test_a_missing_lock_file_is_x07s_own_to_write(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A missing lock file is an error that names X07's command."""
    for lock in project.rglob("*.lock.json"):
        lock.unlink()
    assert main(["run", str(project)]) == 2
    assert "Create it with `x07 pkg lock` of the X07 toolchain" in capfd.readouterr().err


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_overrides_name_the_derived_policy(
    project: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """Override flags of X07 projects write and name the derived policy."""
    (project / "data").mkdir()
    assert main(["run", *words, "--allow-read-root", "data", str(project)]) != 0  # for want of an image
    (made,) = (project / ".x07/policies/_generated").iterdir()
    assert f"x07 run: using derived policy {made}\n" in capfd.readouterr().err
    assert json.loads(made.read_bytes())["fs"]["read_roots"] == ["data"]


def test_an_unwritable_derived_policy_names_its_folder(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A derived policy that cannot be written names its folder."""
    (project / ".x07").symlink_to(project.parent)
    assert main(["run", "--allow-read-root", "data", str(project)]) == 2
    errors = capfd.readouterr().err
    assert "is a link or not a folder" in errors
    assert f"Make {project}/.x07/policies/_generated writable, or omit" in errors


@pytest.mark.parametrize(
    "words",
    [
        ("project",),
        ("--json", "project"),
        ("--report", "runner", "-c", "true", "--toolchain", "shell"),
        ("--attest-runtime", "a", "-c", "true", "--toolchain", "shell"),
    ],
)
def test_an_x07_program_waits_for_no_terminal(project: Path, words: tuple[str, ...]) -> None:
    """An X07 program does not wait for terminal input."""
    ours, theirs = os.openpty()
    argv = [*COMMAND, "run", *words]
    try:
        done = subprocess.run(argv, stdin=theirs, capture_output=True, check=False, timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"no guest image" in done.stdout + done.stderr
    assert project.is_dir()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--program", "p.py", "-c", "print(7)", "--toolchain", "python"), "more than one program given"),
        (("--artifact", "", "--program", "p.py"), "more than one program given"),
        (("--program", ""), "PROGRAM is empty"),
        (("",), "PROGRAM is empty"),
        (("--artifact", "p.py", "--toolchain", "python"), "give the program without --artifact"),
        (("--policy", "built-in:cli", "--policy", "built-in:default", "p.py"), "given more than once"),
        (("--sandbox-backend", "vm", "--sandbox-backend", "os", "p.py"), "given more than once"),
        (("--report-out", "a", "--report-out", "b", "p.py"), "given more than once"),
    ],
)
@pytest.mark.usefixtures("project")
def test_one_program_is_named_and_each_option_once(
    capfd: pytest.CaptureFixture[str], words: tuple[str, ...], why: str
) -> None:
    """More than one program, an empty name, and an option that is given twice are usage errors."""
    assert main(["run", "--json", *words]) == 2
    assert why in document(capfd.readouterr().out)["reason"]


def test_a_cpu_limit_above_the_programs_own_is_an_error(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`--cpu-time` above an X07 program's own CPU limit is an error; the smaller limit does not win silently."""
    (project.parent / "tool").write_bytes(Path("/bin/true").read_bytes())
    words = ["run", "--report", "runner", "--policy", "built-in:worker", "--cpu-time-limit-seconds", "7"]
    assert main([*words, "--cpu-time", "9", "--artifact", str(project.parent / "tool")]) == 2
    assert "cannot use --cpu-time 9: the X07 program's own limit is 7 s" in capfd.readouterr().err
