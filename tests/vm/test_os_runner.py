"""x07-os-runner from the view of a caller that knows only X07's own runner."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import msgspec
import pytest

from tests.command import x07
from tests.vm.conftest import left_behind
from x07_sandbox.cli import os_runner
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.reports.schemas import schemas

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

RUNNER_SCHEMA = json.loads(schemas()["x07-os-runner.report.schema.json"])
ATTEST_SCHEMA = json.loads(schemas()["x07-runtime.attest.schema.json"])
WORDS = ("--world", "run-os-sandboxed", "--policy", "policy.json")
COMMAND = [sys.executable, "-m", "x07_sandbox.cli.os_runner", *WORDS]

ECHO = """\
#include <stdio.h>
int main(void) {
  int c;
  while ((c = getchar()) != EOF) putchar(c);
  fputs("warned\\n", stderr);
  return 0;
}
"""


class Caller:
    """Calls the command in its own folder, and reads the report as X07's tools do."""

    def __init__(self, place: Path, state: Path) -> None:
        self.place = place
        self.state = state
        self.write_policy({})

    def write_policy(self, limits: dict[str, int]) -> None:
        """Write the built-in policy with other limits to policy.json."""
        document = msgspec.to_builtins(default_policy())
        document["limits"] |= limits
        (self.place / "policy.json").write_bytes(render_policy(document))

    def call(self, name: str, text: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run a program, and assert that its machines are gone."""
        (self.place / name).write_text(text, encoding="utf-8")
        done = x07(self.place, *WORDS, "--program", name, *words, command=os_runner.main)
        assert left_behind(self.state) == []
        return subprocess.CompletedProcess(words, done.code, done.out, done.err.encode())

    def report(self, name: str, text: str, *words: str, code: int = 0) -> dict[str, Any]:
        """Run a program, and return its report."""
        done = self.call(name, text, *words)
        assert done.returncode == code, done.stderr.decode()
        return parsed(done.stdout, code)


def parsed(stdout: bytes, code: int) -> dict[str, Any]:
    """Return the report on standard output, validated against the schema."""
    report: dict[str, Any] = json.loads(stdout)
    assert stdout == json.dumps(report, indent=2).encode() + b"\n"
    jsonschema.validate(report, RUNNER_SCHEMA)
    assert (report["exit_code"] == 0) is (code == 0)
    assert report["world"] == "run-os-sandboxed"
    assert report["sandbox_backend"] == ("os" if "X07_SANDBOX_BACKEND" in os.environ else "vm")
    return report


def decoded(part: dict[str, Any], key: str) -> bytes:
    """Return a base64 field of a report, decoded."""
    return base64.b64decode(part[key], validate=True)


@pytest.fixture
def caller(under_os: None, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Caller:
    """A caller with its own job records."""
    del under_os
    monkeypatch.delenv("X07_VM_GUEST_IMAGE_DIGEST", raising=False)
    return Caller(tmp_path, state)


@pytest.mark.usefixtures("in_vms")
def test_a_program_runs_with_executable_and_attestation(caller: Caller, image: Image) -> None:
    """A run returns its output, writes an ELF executable to --compiled-out, and attests exactly these digests."""
    data = bytes(range(256))
    (caller.place / "input.bin").write_bytes(data)
    words = ("--input", "input.bin", "--compiled-out", "echo", "--attest-runtime", "attest.json")
    done = caller.call("echo.c", ECHO, *words)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b"warned\n"
    report = parsed(done.stdout, 0)
    assert report["mode"] == "compile-run"
    compiled, solve = report["compile"], report["solve"]
    assert (compiled["ok"], compiled["lang_id"], compiled["compiled_exe"]) == (True, "c", "/x07/out/compiled-out")
    assert (solve["ok"], solve["exit_status"], solve["trap"]) == (True, 0, None)
    assert decoded(solve, "solve_output_b64") == data
    assert decoded(solve, "stderr_b64") == b"warned\n"

    executable = caller.place / "echo"
    elf = executable.read_bytes()
    assert elf.startswith(b"\x7fELF")
    assert len(elf) == compiled["compiled_exe_size"]
    assert os.access(executable, os.X_OK)

    attested = json.loads((caller.place / "attest.json").read_bytes())
    jsonschema.validate(attested, ATTEST_SCHEMA)
    assert attested["bundled_binary_digest"] == f"sha256:{hashlib.sha256(elf).hexdigest()}"
    policy = (caller.place / "policy.json").read_bytes()
    assert attested["effective_policy_digest"] == f"sha256:{hashlib.sha256(policy).hexdigest()}"
    assert attested["guest_image_digest"] == image.digest
    assert attested["input_len_bytes"] == len(data)
    assert attested["outcome"] == {"ok": True, "exit_status": 0}
    assert report["runtime_attestation"] == {
        "path": "attest.json",
        "sandbox_backend": "vm",
        "weaker_isolation": False,
        "network_mode": "disabled",
        "network_enforcement": "none",
    }


@pytest.mark.usefixtures("in_vms")
def test_a_cached_build_returns_its_recorded_compile(caller: Caller) -> None:
    """A cached build reports the same `compile` as the original one, with the compiler's warning."""
    source = f"#warning careful {os.urandom(4).hex()}\nint main(void) {{ return 0; }}\n"
    first = caller.report("warned.c", source)
    built = set(caller.state.glob("*-build/job.json"))
    second = caller.report("warned.c", source)
    assert set(caller.state.glob("*-build/job.json")) == built
    assert first["compile"] == second["compile"]
    assert b"careful" in decoded(second["compile"], "stderr_b64")


def test_a_failing_program_reports_its_status_and_last_stderr_line(caller: Caller) -> None:
    """A failing program exits with 1, reports its own status, and its last stderr line is the trap."""
    report = caller.report("fail.py", 'import sys\nprint("half")\nsys.exit("no more\\n")\n', code=1)
    assert report["compile"]["ok"] is True
    solve = report["solve"]
    assert (solve["ok"], solve["exit_status"], solve["trap"]) == (False, 1, "no more")
    assert decoded(solve, "solve_output_b64") == b"half\n"


def test_a_compile_error_is_reported(caller: Caller) -> None:
    """A compile error is reported with the compiler's text; no executable or attestation is left."""
    (caller.place / "attest.json").write_text("of an earlier run")
    words = ("--compiled-out", "broken", "--attest-runtime", "attest.json")
    report = caller.report("broken.c", "int main(void) { return x; }\n", *words, code=1)
    compiled = report["compile"]
    assert (compiled["ok"], report["solve"]) == (False, None)
    assert compiled["exit_status"] != 0
    assert b"undeclared" in decoded(compiled, "stderr_b64")
    assert "runtime_attestation" not in report
    assert not (caller.place / "broken").exists()
    assert not (caller.place / "attest.json").exists()


def test_applied_changes_are_reported_if_the_attestation_fails(caller: Caller) -> None:
    """A run that cannot write its attestation exits with 2, and reports the changes it applied."""
    document = msgspec.to_builtins(default_policy())
    document["fs"]["write_roots"] = ["."]
    (caller.place / "policy.json").write_bytes(render_policy(document))
    (caller.place / "gone").mkdir()
    text = 'import os; os.rmdir("gone"); open("new", "w")\n'
    done = caller.call("change.py", text, "--attest-runtime", "gone/attest.json")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"X07RA_EWRITE: cannot write gone/attest.json" in done.stderr
    assert (caller.place / "new").exists()
    assert b"1 added, 1 deleted: applied; see x07 diff, revert with x07 undo" in done.stderr


@pytest.mark.usefixtures("in_vms")
def test_an_unenforceable_policy_is_a_setup_failure(caller: Caller) -> None:
    """A policy that cannot be enforced is refused before any machine starts, as X07's backend failure."""
    document = msgspec.to_builtins(default_policy())
    document["fs"]["read_roots"] = ["/usr"]
    (caller.place / "policy.json").write_bytes(render_policy(document))
    report = caller.report("quiet.py", "pass\n", code=1)
    assert report["solve"] is None
    assert report["compile"]["trap"].startswith("vm backend failure: ")
    assert "fs.read_roots" in report["compile"]["compile_error"]
    assert "--allow-read-root" not in report["compile"]["compile_error"]  # a flag that this command does not have
    assert not list(caller.state.glob("*/job.json"))


@pytest.mark.usefixtures("in_vms")
def test_another_image_than_the_pinned_one_is_refused(
    caller: Caller, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image other than X07_VM_GUEST_IMAGE_DIGEST is refused, even if weaker isolation is accepted."""
    pinned = "sha256:" + "0" * 64
    monkeypatch.setenv("X07_VM_GUEST_IMAGE_DIGEST", pinned)
    report = caller.report("quiet.py", "pass\n", "--i-accept-weaker-isolation", code=1)
    assert pinned in report["compile"]["compile_error"]
    assert image.digest in report["compile"]["compile_error"]
    assert not list(caller.state.glob("*/job.json"))


def test_a_projects_input_is_ignored(caller: Caller) -> None:
    """x07-os-runner takes a project's arguments, and its input only from --input."""
    (caller.place / "main.py").write_text("import sys; print(sys.argv[1:], sys.stdin.read())\n")
    (caller.place / "own.txt").write_text("own")
    (caller.place / "x07-sandbox.toml").write_text(
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nfiles = ["*"]\nentry = "main.py"\n'
        '[run]\nargs = ["one"]\ninput = "own.txt"\n'
    )
    outputs = []
    for words in ([], ["--input", "own.txt"]):
        argv = [*COMMAND, "--project", "x07-sandbox.toml", *words]
        done = subprocess.run(argv, cwd=caller.place, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        outputs.append(decoded(parsed(done.stdout, 0)["solve"], "solve_output_b64"))
    assert outputs == [b"['one'] \n", b"['one'] own\n"]


def test_a_signal_ends_the_run_with_a_report(caller: Caller) -> None:
    """SIGTERM ends the run at once with a report, and leaves nothing on the host."""
    (caller.place / "wait.py").write_text(
        'import sys, time\nprint("begun", file=sys.stderr, flush=True)\ntime.sleep(60)\n'
    )
    with subprocess.Popen(
        [*COMMAND, "--program", "wait.py"],
        cwd=caller.place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        ready, _, _ = select.select([process.stderr], [], [], 120)
        assert ready
        assert os.read(process.stderr.fileno(), 100).startswith(b"begun")
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    report = parsed(stdout, 1)
    assert "cancelled" in report["solve"]["trap"]
    assert left_behind(caller.state) == []


WATCHED = """
import os, sys
names = ("hi.py", "policy.json")
def watch(event, values):
    if event == "open" and str(values[0]).endswith(names):
        print(os.path.basename(values[0]), file=sys.stderr)
sys.addaudithook(watch)
from x07_sandbox.cli.{module} import main
sys.exit(main({words}))
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("os_runner", ["--world", "run-os-sandboxed", "--policy", "policy.json", "--program", "hi.py"]),
        ("main", ["run", "--report", "runner", "--policy", "policy.json", "hi.py"]),
    ],
)
def test_program_and_policy_are_read_once(caller: Caller, module: str, words: list[str]) -> None:
    """Each run reads the program and the policy exactly once, so its report describes the files that ran."""
    (caller.place / "hi.py").write_text("print('hi')\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(module=module, words=words)],
        cwd=caller.place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert decoded(json.loads(done.stdout)["solve"], "solve_output_b64") == b"hi\n"
    opened = done.stderr.decode().split()
    assert opened.count("policy.json") == 1
    assert opened.count("hi.py") == 1
