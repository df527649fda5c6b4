"""x07-os-runner before any VM starts: accepted arguments and refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from x07_sandbox.backends import prerequisites
from x07_sandbox.cli.main import main as x07
from x07_sandbox.cli.os_runner import OPTIONS, main, parser
from x07_sandbox.host.variables import VARIABLES
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.reports.schemas import schemas
from x07_sandbox.x07.project import INPUT_MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

SANDBOXED = ("--world", "run-os-sandboxed")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program and a policy, and an environment without X07 variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prog.c").write_text("int main(void) { return 0; }\n")
    (tmp_path / "prog.py").write_text("pass\n")
    (tmp_path / "policy.json").write_bytes(render_policy(default_policy()))
    return tmp_path


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """The error text of the command when it refuses."""
    return Refused(capfd)


class Refused:
    """Run the command and check the rule of exit 2: an empty standard output and a reason."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str) -> str:
        """Return the error text."""
        assert main(words) == 2
        output = self._capfd.readouterr()
        assert output.out == ""
        assert output.err.startswith("x07-os-runner: ")
        assert "Traceback" not in output.err
        return output.err


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--program", "prog.c", "--artifact", "a.out"),
        ("--program", "prog.c", "--project", "x07.json"),
        ("--project", "x07.json", "--artifact", "a.out"),
    ],
)
def test_exactly_one_program_is_required(refused: Refused, words: tuple[str, ...]) -> None:
    """Exactly one of --program, --project and --artifact is required."""
    output = refused(*SANDBOXED, "--policy", "policy.json", *words)
    assert "exactly one of --program, --project, --artifact" in output


@pytest.mark.parametrize("world", ["solve-pure", "RUN-OS", "run-os-sandbox"])
def test_other_worlds_are_refused(refused: Refused, world: str) -> None:
    """Deterministic and unknown worlds are refused by name."""
    assert repr(world) in refused("--world", world, "--program", "prog.c")


@pytest.mark.parametrize("flag", ["--policy", "--attest-runtime"])
def test_the_other_world_has_no_policy(refused: Refused, flag: str) -> None:
    """--policy and --attest-runtime are refused in run-os, and run-os-sandboxed requires --policy."""
    assert flag in refused("--program", "prog.c", flag, "policy.json")
    assert "--policy" in refused(*SANDBOXED, "--program", "prog.c")


@pytest.mark.parametrize(
    ("words", "variables"),
    [
        (("--program", "prog.c"), {}),
        (("--program", "prog.c", "--world", "run-os", "--sandbox-backend", "none"), {}),
        (("--program", "prog.c", *SANDBOXED, "--policy", "policy.json", "--sandbox-backend", "os"), {}),
        (("--program", "prog.c", *SANDBOXED, "--policy", "policy.json"), {"X07_SANDBOX_BACKEND": "NONE"}),
    ],
)
def test_weaker_isolation_fails_closed(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], variables: dict[str, str]
) -> None:
    """Weaker isolation without acceptance is refused, in run-os too, and the refusal names what works."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    output = refused(*words)
    assert "weaker isolation" in output
    assert "--world run-os-sandboxed --policy FILE --sandbox-backend vm" in output


@pytest.mark.parametrize("variables", [("os", None), ("os", "os"), (None, "docker"), ("vm", "vz")])
def test_suggested_flags_work_with_any_variable(
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    variables: tuple[str | None, str | None],
) -> None:
    """The flags named by a refusal work whatever the variables say."""
    for name, value in zip(("X07_SANDBOX_BACKEND", "X07_VM_BACKEND"), variables, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    words = ("--program", "prog.c", *SANDBOXED, "--policy", "policy.json")
    unset = ", with X07_VM_BACKEND unset" if variables[1] else ""
    assert refused(*words).endswith(f"--policy FILE --sandbox-backend vm{unset}.\n")
    monkeypatch.delenv("X07_VM_BACKEND", raising=False)
    assert main((*words, "--sandbox-backend", "vm")) == 1
    assert "no guest image" in capfd.readouterr().err


@pytest.mark.parametrize("by", ["flag", "variable"])
@pytest.mark.parametrize("backend", ["os", "none"])
def test_an_accepted_backend_needs_no_image(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], backend: str, by: str
) -> None:
    """An accepted weaker backend needs no guest image."""
    accept = ("--i-accept-weaker-isolation",) if by == "flag" else ()
    if by == "variable":
        monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "yes")
    monkeypatch.setattr(prerequisites, "find_program", lambda _name: None)  # nothing is started
    words = (*SANDBOXED, "--policy", "policy.json", "--program", "prog.c", "--sandbox-backend", backend)
    assert main((*words, *accept)) == 1
    errors = capfd.readouterr().err
    assert "missing: " in errors
    assert "python3 perl-base" in errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X07_I_ACCEPT_WEAKER_ISOLATION", "True"),
        ("X07_SANDBOX_BACKEND", "qemu"),
        ("X07_VM_BACKEND", "kvm"),
    ],
)
def test_an_overridden_invalid_variable_is_an_error(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """An invalid variable is an error even if a flag overrides it."""
    monkeypatch.setenv(name, value)
    words = ("--sandbox-backend", "vm", "--i-accept-weaker-isolation")
    assert name in refused(*SANDBOXED, "--policy", "policy.json", "--program", "prog.c", *words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--program", "main.x07.json"), "main.x07.json"),
        (("--project", "x07.json"), "x07.json"),
        (("--project", "x07-sandbox.toml"), "cannot read the manifest"),
        (("--project", "pyproject.toml"), "it is not named x07.json or x07-sandbox.toml"),
        (("--artifact", "a.out"), "X07's own runner inside a guest"),
        (("--artifact", "a.out", "--i-accept-precompiled-artifact"), "X07's own runner inside a guest"),
        (("--program", "prog.c", "--compile-only"), "--compile-only"),
        (("--program", "prog.rs"), "no toolchain handles .rs files"),
        (("--program", "prog.zig"), "x07 run --toolchain"),  # a flag that this command has not
        (("--program", "missing.c"), "missing.c"),
        (("--program", "."), "it is a project"),
        (("--program", "x07-sandbox.toml"), "it is a project"),
        (("--program", "pipe"), "it is not a regular file"),
        (("--program", "prog.x07.json", "--module-root", "nowhere"), "cannot use the module root nowhere: "),
    ],
)
def test_unbuildable_programs_are_refused(refused: Refused, place: Path, words: tuple[str, ...], named: str) -> None:
    """Missing programs, pipes, artifacts and unknown languages are refused before anything starts."""
    os.mkfifo(place / "pipe")
    (place / "prog.x07.json").write_text("{}")
    (place / "prog.rs").touch()
    (place / "prog.zig").touch()
    assert named in refused(*SANDBOXED, "--policy", "policy.json", *words)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda _policy: None, "policy"),
        (lambda policy: policy["limits"].update(cpu_mss=1), "$.limits.cpu_mss"),
        (lambda policy: policy["process"].update(max_live=0), "$.process.max_live"),
    ],
)
def test_an_invalid_policy_ends_in_two(
    refused: Refused, place: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    """An invalid policy ends with exit code 2 and names the place."""
    policy = json.loads(render_policy(default_policy()))
    change(policy)
    text = json.dumps(policy)
    (place / "policy.json").write_text("{" if named == "policy" else text)
    assert named in refused(*SANDBOXED, "--policy", "policy.json", "--program", "prog.c")
    (place / "policy.json").unlink()
    assert "policy.json" in refused(*SANDBOXED, "--policy", "policy.json", "--program", "prog.c")


def test_input_is_read_whole_or_refused(refused: Refused, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--input accepts /dev/null and pipes, and a missing or oversized input is refused."""
    words = (*SANDBOXED, "--policy", "policy.json", "--program", "prog.c", "--input")
    os.mkfifo(place / "pipe")
    writer = threading.Thread(target=(place / "pipe").write_bytes, args=(b"in",))
    writer.start()
    for name in ("/dev/null", "pipe"):
        assert main((*words, name)) == 1
        assert "no guest image" in capfd.readouterr().err
    writer.join()
    assert "nowhere" in refused(*words, "nowhere")
    assert "cannot read the input" in refused(*words, str(place))
    with (place / "large").open("wb") as file:
        file.truncate(INPUT_MAX_BYTES + 1)
    assert f"more than {INPUT_MAX_BYTES} bytes" in refused(*words, "large")


@pytest.mark.parametrize("flag", ["--compiled-out", "--attest-runtime"])
def test_places_for_files_are_checked_before_anything_starts(refused: Refused, place: Path, flag: str) -> None:
    """An unusable output path is refused before anything starts."""
    (place / "link").symlink_to("policy.json")
    words = (*SANDBOXED, "--policy", "policy.json", "--program", "prog.c", flag)
    for where in ("link", str(place), "/dev/null", "nowhere/file"):
        assert f"cannot write {where}" in refused(*words, where)
    assert (place / "policy.json").read_bytes() == render_policy(default_policy())


@pytest.mark.parametrize("how", [[], ["--report", "runner"]])
@pytest.mark.parametrize("words", [["prog.py"], ["-c", "true", "--toolchain", "shell"]])
def test_a_script_has_no_executable(
    refused: Refused, place: Path, capfd: pytest.CaptureFixture[str], how: list[str], words: list[str]
) -> None:
    """--compiled-out of a script is refused before anything starts, by x07-os-runner and by `x07 run`."""
    runner = (*SANDBOXED, "--policy", "policy.json", "--program", "prog.py", "--compiled-out", "out")
    assert "python makes no executable" in refused(*runner)
    assert x07(["run", *how, "--compiled-out", "out", *words]) == 2
    assert "makes no executable" in capfd.readouterr().err
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--progra", "prog.c"),
        ("--program", "prog.c", "extra"),
        ("--program", "prog.c", "--max-output-bytes", "-1"),
        ("--program", "prog.c", "--solve-fuel", "1.5"),
        ("--program", "prog.c", "--sandbox-backend", "VM"),
        ("--program", "prog.c", "--cc-profile", "fast"),
        ("--program",),
    ],
)
def test_flags_are_written_out_and_checked(refused: Refused, words: tuple[str, ...]) -> None:
    """Abbreviated flags, extra words and invalid values are usage errors."""
    assert "wrong usage" in refused(*SANDBOXED, "--policy", "policy.json", *words)


@pytest.mark.parametrize("flag", ["--program", "--policy", "--input", "--compiled-out", "--attest-runtime"])
def test_an_empty_path_is_refused(refused: Refused, capfd: pytest.CaptureFixture[str], flag: str) -> None:
    """An empty path is a usage error of x07-os-runner and of `x07 run`."""
    assert f"wrong usage of {flag}: the name is empty" in refused(*SANDBOXED, flag, "")
    if flag in {"--program", "--policy"}:  # which `run` has not, or words as for a policy
        return
    assert x07(["run", flag, "", "prog.py"]) == 2
    assert f"wrong usage of {flag}: the name is empty" in capfd.readouterr().err


def test_run_os_in_a_vm_gives_a_failure_report(capfd: pytest.CaptureFixture[str]) -> None:
    """run-os with backend vm gives X07's failure report and exit code 1."""
    assert main(["--program", "prog.c", "--sandbox-backend", "vm"]) == 1
    output = capfd.readouterr()
    report = json.loads(output.out)
    jsonschema.validate(report, json.loads(schemas()["x07-os-runner.report.schema.json"]))
    assert (report["world"], report["exit_code"], report["solve"]) == ("run-os", 1, None)
    assert "run-os-sandboxed only" in report["compile"]["compile_error"]


def test_every_flag_of_x07s_runner_is_known() -> None:
    """Every flag of X07's runner is accepted, and its defaults are those of X07's runner."""
    line = (
        "--cc-profile size --world run-os-sandboxed --sandbox-backend vm --i-accept-weaker-isolation --max-c-bytes 1 "
        "--policy p --input i --solve-fuel 1 --max-memory-bytes 1 --max-output-bytes 1 --cpu-time-limit-seconds 1 "
        "--debug-borrow-checks --compiled-out o --compile-only --auto-ffi --program m.x07.json --module-root a "
        "--module-root b --compat 0.2 --attest-runtime a.json --i-accept-precompiled-artifact --project x --artifact y "
        "--cli-specrows"
    )
    options, unknown = parser().parse_known_args(line.split())
    assert unknown == []
    assert options.module_root == ["a", "b"]
    flags = set(re.findall(r"--[a-z-]+", line))
    assert flags == {option.flag for option in OPTIONS}
    assert {option.flag: option.usual for option in OPTIONS if option.usual is not None} == {
        "--world": "run-os",
        "--max-output-bytes": 1 << 20,
        "--solve-fuel": 50_000_000,
        "--max-memory-bytes": 67_108_864,
        "--cpu-time-limit-seconds": 30,
        "--cc-profile": "default",
    }


def test_the_command_line_describes_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """--cli-specrows lists every flag as one JSON object."""
    assert main(["--cli-specrows"]) == 0
    output = json.loads(capfd.readouterr().out)
    assert output["schema_version"] == "x07cli.specrows@0.1.0"
    assert output["app"]["name"] == "x07-os-runner"
    named = {row[3] for row in output["rows"]}
    assert named == {"--help", "--version", *(option.flag for option in OPTIONS if not option.hidden)}
    assert {row[1] for row in output["rows"]} == {"help", "version", "opt", "flag"}


def test_standard_output_that_cannot_be_written_ends_in_two() -> None:
    """A standard output that cannot be written ends with exit code 2 and a reason."""
    argv = [sys.executable, "-m", "x07_sandbox.cli.os_runner", "--cli-specrows"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "cannot write to standard output: No space left on device" in done.stderr
