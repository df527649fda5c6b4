"""Python and C sources in the machine: valid or broken, under any name, and without the host's other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command import x07
from tests.vm.conftest import PROGRAMS, Artifacts, Sandbox
from tests.x07_variables import EXPECTED, policy_document

if TYPE_CHECKING:
    from tests.vm.conftest import Ran

pytestmark = pytest.mark.vm

NAME = "my prog.v1 Zoë.py"
FOLDER = "/x07/in/program"


def shows_no_host_path(ran: Ran, folder: Path) -> bool:
    """Return whether no output, reason or phase of the run names a folder of the host."""
    shown = repr((ran.stdout, ran.stderr, ran.reason, ran.result.phases))
    return not any(path in shown for path in (str(folder), folder.name, str(Path(__file__).parents[2])))


@pytest.fixture(scope="module")
def facts_run(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run of programs/facts.py, under a name with blanks, dots and umlauts, for the tests below."""
    place = tmp_path_factory.mktemp("facts")
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


def test_a_python_program_lies_in_its_own_folder(facts_run: Ran) -> None:
    """`__file__` and argv[0] are the program's own name in /x07/in/program, whatever characters it has."""
    facts = _facts(facts_run)
    assert facts["file"] == f"{FOLDER}/{NAME}"
    assert facts["argv"] == [f"{FOLDER}/{NAME}", "an argument"]
    assert facts["path"] == FOLDER


def test_only_the_program_file_is_copied_in(facts_run: Ran) -> None:
    """Only the program and its byte code enter the machine, not the files beside it on the host."""
    facts = _facts(facts_run)
    assert facts["beside"] == sorted(["__pycache__", NAME])
    assert facts["in"] == ["policy.json", "program"]


def test_python_loads_the_precompiled_byte_code(facts_run: Ran) -> None:
    """Python loads the precompiled byte code without checking it against the source; it names the guest's path."""
    facts = _facts(facts_run)
    assert str(facts["cached"]).startswith(NAME.removesuffix(".py") + ".cpython-")
    assert facts["flags"] == 1  # PEP 552: hash-based, check_source off
    assert facts["from_byte_code"] == f"{FOLDER}/{NAME}"


def test_the_program_can_read_its_policy(facts_run: Ran) -> None:
    """/x07/in/policy.json is the run's policy, byte for byte."""
    assert facts_run.result.digests.policy == f"sha256:{_facts(facts_run)['policy']}"


def test_a_traceback_shows_the_source(facts_run: Ran) -> None:
    """An uncaught exception shows guest path, line and source text, and exits with 1."""
    text = (PROGRAMS / "facts.py").read_text().splitlines()
    line = next(number for number, line in enumerate(text, start=1) if "on purpose" in line)
    assert (facts_run.outcome, facts_run.result.exit_code) == ("failed", 1)
    assert (
        f'  File "{FOLDER}/{NAME}", line {line}, in fail\n    {text[line - 1].strip()}\n' in facts_run.stderr.decode()
    )
    assert facts_run.stderr.endswith(b"ValueError: on purpose\n")


def test_a_syntax_error_fails_the_build(sandbox: Sandbox, tmp_path: Path) -> None:
    """A Python syntax error is `build-failed` with exit code 126 and Python's own message."""
    ran = sandbox.run_text("broken.py", "print('never')\nif True\n    pass\n")
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("build-failed", 126, "program")
    assert f'File "{FOLDER}/broken.py", line 2\n    if True\n' in ran.stderr.decode()
    assert ran.stderr.endswith(b"SyntaxError: expected ':'\n")
    assert list(ran.result.phases) == ["build"]
    assert shows_no_host_path(ran, tmp_path)


def test_a_compile_error_fails_the_build(sandbox: Sandbox, tmp_path: Path) -> None:
    """A C compile error is `build-failed` with exit code 126 and the compiler's message, with the guest's path."""
    ran = sandbox.run_text("broken.c", "int main(void) { return missing; }\n")
    assert (ran.outcome, ran.result.x07_exit_code, ran.result.fault) == ("build-failed", 126, "program")
    assert "broken.c:1:25: error: " in ran.stderr.decode()
    assert "missing" in ran.stderr.decode()
    assert ran.result.build is not None
    assert "undeclared" in (ran.result.build.stderr.text or "")
    assert shows_no_host_path(ran, tmp_path)


def test_a_source_reads_only_the_guests_files(sandbox: Sandbox, tmp_path: Path) -> None:
    """A source can include only the build machine's files: not the host's, and not the policy."""
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


@pytest.mark.usefixtures("under_os")
@pytest.mark.parametrize("name", ["driver.py", "traceback.py"])
def test_a_source_may_share_a_name_with_the_build_script(sandbox: Sandbox, name: str) -> None:
    """A program runs even if it is named like the build script or like a module that the script imports."""
    assert sandbox.run_text(name, "print(__file__)\n").stdout == f"/x07/in/program/{name}\n".encode()


@pytest.mark.usefixtures("under_os")
def test_a_source_that_is_too_complex_fails_the_build(sandbox: Sandbox) -> None:
    """A source that is too complex for the compiler is a failed build that names the file, without a traceback."""
    ran = sandbox.run_text("deep.py", "x = " + "-" * 100_000 + "1\n")
    assert ran.outcome == "build-failed"
    assert ran.stderr.startswith(b"/x07/in/program/deep.py: ")
    assert b"Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "name",
    [".hidden.py", "-x.py", "two\nlines.py", "raw\udcff.py", "prog.rb", "prog"],
    ids=["hidden", "option", "line end", "undecodable", "unknown", "no suffix"],  # xdist hangs on a raw surrogate
)
def test_an_invalid_source_name_is_a_usage_error(sandbox: Sandbox, name: str) -> None:
    """A source name that is hidden, option-like, unprintable or of unknown language is rejected before any machine."""
    ran = sandbox.run_text(name, "print('never')\n")
    assert (ran.outcome, ran.result.x07_exit_code) == ("usage-error", 2)
    assert ran.result.phases == {}


@pytest.mark.usefixtures("state", "under_os")
def test_a_program_finds_its_policy_in_x07_variables(tmp_path: Path) -> None:
    """A program's X07 variables are exactly the policy fields that have one."""
    for name in ("given", "also given", "written"):
        (tmp_path / name).mkdir()
    (tmp_path / "p.json").write_text(json.dumps(policy_document()))
    (tmp_path / "it.py").write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    done = x07(tmp_path, "run", "--policy", "p.json", "it.py")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {name: text for name, text in found.items() if name.startswith("X07")} == EXPECTED
