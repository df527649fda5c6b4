"""Sources as they travel: Python and C, good and bad, under any name, and nothing else of the host beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import PROGRAMS, Artifacts, Sandbox
from tests.x07_variables import EXPECTED, policy_document

if TYPE_CHECKING:
    from tests.vm.conftest import Ran

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

NAME = "my prog.v1 Zoë.py"
FOLDER = "/x07/in/program"


def shows_no_host_path(ran: Ran, folder: Path) -> bool:
    """Whether nothing that the run gave back names a folder of the host."""
    shown = repr((ran.stdout, ran.stderr, ran.reason, ran.result.phases))
    return not any(path in shown for path in (str(folder), folder.name, str(Path(__file__).parents[2])))


@pytest.fixture(scope="module")
def told(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run of programs/facts.py under a name with blanks, dots and umlauts, which the tests below read."""
    place = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(place / "jobs"))
        text = (PROGRAMS / "facts.py").read_bytes()
        (place / "beside.py").write_text("raise SystemExit('never travels')\n")
        ran = Sandbox(place / "jobs", place, artifacts).run_text(NAME, text, "an argument")
    assert shows_no_host_path(ran, place)
    return ran


def _facts(ran: Ran) -> dict[str, object]:
    facts = json.loads(ran.stdout)
    assert isinstance(facts, dict)
    return facts


def test_a_python_program_lies_in_its_own_folder(told: Ran) -> None:
    """`__file__` and argv[0] are /x07/in/program and the file's own name, whatever characters it has."""
    facts = _facts(told)
    assert facts["file"] == f"{FOLDER}/{NAME}"
    assert facts["argv"] == [f"{FOLDER}/{NAME}", "an argument"]
    assert facts["path"] == FOLDER


def test_only_the_one_file_travels(told: Ran) -> None:
    """Beside the program lies its byte code, and nothing of what lay beside its source on the host."""
    facts = _facts(told)
    assert facts["beside"] == sorted(["__pycache__", NAME])
    assert facts["in"] == ["policy.json", "program"]


def test_its_byte_code_is_unchecked_and_loads(told: Ran) -> None:
    """The byte code lies where Python looks for it, is never compared with the source, and names the guest's path."""
    facts = _facts(told)
    assert str(facts["cached"]).startswith(NAME.removesuffix(".py") + ".cpython-")
    assert facts["flags"] == 1  # PEP 552: hash-based, check_source off
    assert facts["from_byte_code"] == f"{FOLDER}/{NAME}"


def test_the_program_can_read_the_policy_that_holds_for_it(told: Ran) -> None:
    """/x07/in/policy.json is the policy of the run, byte for byte."""
    assert told.result.digests.policy == f"sha256:{_facts(told)['policy']}"


def test_a_traceback_shows_the_source(told: Ran) -> None:
    """An exception that nobody catches shows guest path, line and source text, and ends the program with 1."""
    text = (PROGRAMS / "facts.py").read_text().splitlines()
    line = next(number for number, line in enumerate(text, start=1) if "on purpose" in line)
    assert (told.outcome, told.result.exit_code) == ("failed", 1)
    assert f'  File "{FOLDER}/{NAME}", line {line}, in fail\n    {text[line - 1].strip()}\n' in told.stderr.decode()
    assert told.stderr.endswith(b"ValueError: on purpose\n")


def test_a_syntax_error_fails_the_build(sandbox: Sandbox, tmp_path: Path) -> None:
    """A Python source with a syntax error is `build-failed`, exit code 126, with the error as Python shows it."""
    ran = sandbox.run_text("broken.py", "print('never')\nif True\n    pass\n")
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("build-failed", 126, "program")
    assert f'File "{FOLDER}/broken.py", line 2\n    if True\n' in ran.stderr.decode()
    assert ran.stderr.endswith(b"SyntaxError: expected ':'\n")
    assert list(ran.result.phases) == ["build"]
    assert shows_no_host_path(ran, tmp_path)


def test_a_compile_error_fails_the_build(sandbox: Sandbox, tmp_path: Path) -> None:
    """A C source that does not compile is `build-failed`, with the compiler's words on the guest's path."""
    ran = sandbox.run_text("broken.c", "int main(void) { return missing; }\n")
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("build-failed", 126, "program")
    assert "broken.c:1:25: error: " in ran.stderr.decode()
    assert "missing" in ran.stderr.decode()
    assert shows_no_host_path(ran, tmp_path)


def test_a_source_reads_only_the_guests_files(sandbox: Sandbox, tmp_path: Path) -> None:
    """What a source includes comes from the build machine: its own /etc/passwd, no policy, no file of the host."""
    secret = tmp_path / "secret"
    secret.write_text("#define SECRET 1\n")
    ran = sandbox.run_text(
        "reader.c",
        f"""
        #include <stdio.h>
        #if __has_include("/x07/in/policy.json") || __has_include("{secret}")
        #error something of the host is here
        #endif
        __asm__(".section .rodata\\nfrom: .incbin \\"/etc/passwd\\"\\n.byte 0\\n.text");
        extern const char from[];
        int main(void) {{ fputs(from, stdout); return 0; }}
        """,
    )
    assert ran.outcome == "ok", ran.stderr.decode()
    assert ":65532:65532:" in ran.stdout.decode()
    assert ran.stdout != Path("/etc/passwd").read_bytes()


@pytest.mark.parametrize("name", ["driver.py", "traceback.py"])
def test_a_source_may_have_a_name_of_the_builds_own(sandbox: Sandbox, name: str) -> None:
    """A program that is called as the build's script is, or as a module that this one imports, is built and run."""
    assert sandbox.run_text(name, "print(__file__)\n").stdout == f"/x07/in/program/{name}\n".encode()


def test_what_is_too_much_for_the_compiler_names_the_file(sandbox: Sandbox) -> None:
    """A source that the compiler gives up on is a failed build that names it, without frames of ours."""
    ran = sandbox.run_text("deep.py", "x = " + "-" * 100_000 + "1\n")
    assert ran.outcome == "build-failed"
    assert ran.stderr.startswith(b"/x07/in/program/deep.py: ")
    assert b"Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "name",
    [".hidden.py", "-x.py", "two\nlines.py", "raw\udcff.py", "prog.rb", "prog"],
    ids=["hidden", "option", "line end", "undecodable", "unknown", "no suffix"],  # xdist hangs on a raw surrogate
)
def test_a_name_that_could_mislead_is_a_usage_error(sandbox: Sandbox, name: str) -> None:
    """A source whose name is hidden, an option, unprintable, or of no known language is refused before any machine."""
    ran = sandbox.run_text(name, "print('never')\n")
    assert (ran.outcome, ran.result.x07_exit_code) == ("usage-error", 2)
    assert ran.result.phases == {}


def test_a_program_is_told_its_policy(state: Path, tmp_path: Path) -> None:
    """Every field that has a variable arrives in the machine by X07's name for it, and none of X07's besides."""
    assert state.parent.is_dir()
    for name in ("given", "also given", "written"):
        (tmp_path / name).mkdir()
    (tmp_path / "p.json").write_text(json.dumps(policy_document()))
    (tmp_path / "it.py").write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", "run", "--policy", "p.json", "it.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: text for name, text in found.items() if name.startswith("X07")} == EXPECTED
