"""Programs of every toolchain, built and run from files, texts and projects; and their errors."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import X07, x07
from tests.conftest import FULL, need
from tests.published import document
from tests.vm.conftest import Sandbox, left_behind
from x07_sandbox import SandboxError, load_policy, run_program, run_program_async
from x07_sandbox.host import settings
from x07_sandbox.policy.decode import render_policy

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.vm

ROOT = Path(__file__).resolve().parents[2]
HEAD = 'schema_version = "x07.sandbox.project@0.1.0"\n'
MAKE = HEAD + 'toolchain = "make"\nfiles = ["Makefile", "*.c"]\nartifact = "out"\n'


def project(folder: Path, **files: str) -> Path:
    """Write a project with these files; "_" in a name stands for ".", "__" for "/"."""
    folder.mkdir()
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def command(*words: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Carry out `x07 run` with more environment variables."""
    done = x07(Path.cwd(), "run", *words, stdin=stdin, env=environment)
    return subprocess.CompletedProcess(words, done.code, done.out, done.err.encode())


# each toolchain


def test_a_cpp_program_is_built_and_run(sandbox: Sandbox) -> None:
    """A C++20 program with the standard library is built and run."""
    source = """
        #include <cstdio>
        #include <exception>
        template <typename T> concept Word = requires(T t) { t[0]; };
        void say(Word auto word) { std::puts(word); }
        int main() { try { throw std::exception(); } catch (const std::exception &) { say("c++"); } }
    """
    ran = sandbox.run_text("a.cpp", source)
    assert (ran.outcome, ran.stdout) == ("ok", b"c++\n"), ran.reason


def test_a_shell_script_runs_in_its_shell(sandbox: Sandbox) -> None:
    """A shell script runs in the shell and with the options of its first line, with its own name and arguments."""
    text = '#!/bin/sh -u\nreadlink /proc/$$/exe\necho "$- $0 $1"; tr a-z A-Z | sort\n'
    ran = sandbox.run_text("do.sh", text, "one", stdin=b"b\na\n")
    assert ran.outcome == "ok", ran.reason
    assert ran.stdout.decode() == "/usr/bin/dash\nu /x07/in/program/do.sh one\nA\nB\n"


def test_a_shell_script_is_checked_before_it_runs(sandbox: Sandbox) -> None:
    """A shell script with a syntax error fails the build with the shell's message."""
    ran = sandbox.run_text("bad.sh", "echo before\nif then\n")
    assert ran.outcome == "build-failed"
    assert b"line 2: syntax error" in ran.stderr
    assert ran.stdout == b""


def test_an_executable_runs_without_a_build(sandbox: Sandbox, artifacts: Any) -> None:  # noqa: ANN401 - the fixture's
    """An executable runs unchanged in a single machine, without a build."""
    path = sandbox.work / "ready"
    path.write_bytes(artifacts.built(Path(__file__).parent / "programs/behave.c"))
    ran = sandbox.run(path, "nothing")
    assert ran.outcome == "ok", ran.reason
    assert list(ran.result.phases) == ["run"]
    assert ran.result.digests.artifact == ran.result.digests.source
    assert ran.result.artifact_from == "caller"


def test_a_script_may_name_its_interpreter(sandbox: Sandbox) -> None:
    """A file without a known suffix runs with the interpreter of its #! line."""
    ran = sandbox.run_text("tool", "#!/usr/bin/python3 -I\nimport sys\nprint(sys.flags.isolated)\n")
    assert (ran.outcome, ran.stdout) == ("ok", b"1\n"), ran.reason


# projects


def test_a_make_project_is_built_from_its_files(sandbox: Sandbox) -> None:
    """Make builds a copy of the listed files, and its artifact runs with the manifest's arguments."""
    folder = project(
        sandbox.work / "p",
        Makefile="out: a.c b.c\n\t$(CC) -o $@ $^\n",
        a_c='#include <stdio.h>\nint two(void);\nint main(int c, char **v) { printf("%d %s\\n", two(), v[1]); }\n',
        b_c="int two(void) { return 2; }\n",
    )
    (folder / "x07-sandbox.toml").write_text(MAKE + '[build]\nargs = ["-j2"]\n[run]\nargs = ["mine"]\n')
    ran = sandbox.run(folder)
    assert (ran.outcome, ran.stdout) == ("ok", b"2 mine\n"), ran.stderr
    assert sandbox.run(folder / "x07-sandbox.toml", "other").stdout == b"2 other\n"


def test_make_sees_the_mtimes_of_the_project(sandbox: Sandbox) -> None:
    """Make rebuilds a generated file only if it is older than its source, even by a nanosecond."""
    folder = project(
        sandbox.work / "p",
        Makefile="out: one.c two.c\n\tcat a.c one.c two.c > out\n%.c: a.c\n\techo 'echo new $@' > $@\n",
        a_c="#!/bin/sh\n",
        one_c="echo old one\n",
        two_c="echo old two\n",
    )
    (folder / "x07-sandbox.toml").write_text(MAKE)
    for name, after in (("one.c", 0), ("a.c", 1), ("two.c", 2)):
        os.utime(folder / name, ns=(0, 1_700_000_000_000_000_000 + after))
    ran = sandbox.run(folder)
    assert (ran.outcome, ran.stdout) == ("ok", b"new one.c\nold two\n"), ran.stderr


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("out:\n\ttrue\n", "did not build out"),
        ("out:\n\tcp /bin/true other\n", "it built the program other"),
        ("out:\n\tln -s /etc/passwd out\n", "is a symbolic link"),
        ("out:\n\tmkfifo out\n", "not a regular file"),
        ("out:\n\ttruncate -s 300M out\n", "over the limit of 268435456"),
        ("out:\n\texit 3\n", "status 2"),
    ],
)
def test_a_missing_or_invalid_artifact_fails_the_build(sandbox: Sandbox, rule: str, why: str) -> None:
    """A missing artifact, or one that is a link, pipe, folder or too large, fails the build with make's output."""
    folder = project(sandbox.work / "p", Makefile=rule, a_c="")
    (folder / "x07-sandbox.toml").write_text(MAKE)
    ran = sandbox.run(folder)
    assert ran.outcome == "build-failed"
    assert why in ran.reason + ran.stderr.decode()
    assert rule.split("\t")[1] in ran.stdout.decode()


@pytest.mark.parametrize(
    ("made", "code", "why"),
    [
        ("\techo hello > out", 126, "Exec format error"),
        ("\tprintf '#!/no/such/shell\\n' > out", 127, "No such file or directory"),
    ],
)
@pytest.mark.usefixtures("image")
def test_an_artifact_that_cannot_be_executed_fails_as_in_a_shell(
    tmp_path: Path, made: str, code: int, why: str
) -> None:
    """An artifact that the kernel cannot execute exits with 126 or 127, as in a shell, and the command says why."""
    folder = project(tmp_path / "p", Makefile=f"out:\n{made}\n", a_c="")
    (folder / "x07-sandbox.toml").write_text(MAKE)
    done = command("--report-out", str(tmp_path / "result"), str(folder))
    result = json.loads((tmp_path / "result").read_bytes())
    assert (result["outcome"], result["fault"]) == ("failed", "policy" if code == 127 else "program")
    assert (result["exit_code"], done.returncode) == (code, code)
    assert why in result["reason"]
    assert f"x07: failed: {result['reason']}.\n" in done.stderr.decode()


@pytest.mark.usefixtures("image")
def test_a_python_project_imports_its_own_modules(tmp_path: Path) -> None:
    """A Python project imports its byte-compiled modules and those beside its entry; it has its input and variables."""
    folder = project(
        tmp_path / "p",
        src__main_py="import os, sys, near\nfrom pkg import m\n"
        "print(m.up(sys.stdin.read()), os.environ['A'], near.X, sys.path[0], m.__cached__)\n",
        src__near_py="X = 1\n",
        in_txt="text",
        left_py="raise SystemExit('not listed')\n",
    )
    (folder / "src/pkg").mkdir()
    (folder / "src/pkg/__init__.py").touch()
    (folder / "src/pkg/m.py").write_text("def up(text):\n    return text.upper()\n")
    (folder / "x07-sandbox.toml").write_text(
        HEAD + 'toolchain = "python"\nentry = "src/main.py"\nfiles = ["src/*.py", "src/pkg/*.py"]\n'
        '[run]\ninput = "in.txt"\nenv = { A = "1" }\n'
    )
    places = b"1 /x07/in/program/src /x07/in/program/src/pkg/__pycache__/m."
    for cold in ((), ("--cold",))[: 1 + FULL]:
        done = command(*cold, str(folder))
        assert done.stdout.startswith(b"TEXT 1 " + places), done.stderr
    assert command("--stdin", "--env", "A=2", str(folder), stdin=b"ours").stdout.startswith(b"OURS 2 " + places)


def test_every_syntax_error_of_a_project_is_reported(sandbox: Sandbox) -> None:
    """A Python project's build reports every file with a syntax error."""
    folder = project(sandbox.work / "p", main_py="x = (\n", other_py="y = )\n")
    (folder / "x07-sandbox.toml").write_text(HEAD + 'toolchain = "python"\nentry = "main.py"\nfiles = ["*.py"]\n')
    ran = sandbox.run(folder)
    assert ran.outcome == "build-failed"
    assert b"main.py" in ran.stderr
    assert b"other.py" in ran.stderr


# texts


@pytest.mark.usefixtures("under_os")
def test_a_source_may_come_as_a_text() -> None:
    """A source from -c or from standard input runs with its arguments."""
    done = command("-c", "import sys; print(sys.argv[1:], sys.stdin.read())", "--toolchain", "python", "a", stdin=b"in")
    assert (done.returncode, done.stdout) == (0, b"['a'] in\n"), done.stderr
    done = command("--toolchain", "shell", "-", "--", "a b", stdin=b'echo "$1"; cat\n')
    assert (done.returncode, done.stdout) == (0, b"a b\n"), done.stderr


def test_standard_input_is_the_source_or_the_input() -> None:
    """A source from standard input with --stdin is a usage error."""
    done = command("--toolchain", "shell", "--stdin", "-", stdin=b"cat\n")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"Omit --stdin" in done.stderr


@pytest.mark.usefixtures("under_os")
def test_a_library_call_takes_texts_files_and_more(state: Path) -> None:
    """`run_program` takes a source text, files beside it, variables and a time limit, and streams output."""
    seen: list[tuple[str, bytes]] = []
    result = run_program(
        source="import helper, os\nprint(helper.NAME, os.environ['A'])\n",
        toolchain="python",
        files={"helper.py": b"NAME = 'helper'\n"},
        env={"A": "1"},
        on_output=lambda name, data: seen.append((name, data)),
    )
    assert (result.outcome, result.stdout.data) == ("ok", b"helper 1\n"), result.reason
    assert b"".join(data for name, data in seen if name == "stdout") == b"helper 1\n"
    slow = run_program(source="while True: pass", toolchain="python", timeout_s=0.5)
    assert (slow.outcome, slow.ok) == ("timeout", False)
    assert left_behind(state) == []


@pytest.mark.usefixtures("under_os")
def test_check_raises_for_a_program_that_fails() -> None:
    """With check=True a failing program raises an error that carries its result."""
    with pytest.raises(SandboxError, match="failed") as caught:
        run_program(source="exit 3", toolchain="shell", check=True)
    assert caught.value.result.exit_code == 3


@pytest.mark.usefixtures("under_os")
def test_an_exception_in_on_output_ends_the_run(state: Path) -> None:
    """An exception in `on_output` ends the machine, and propagates to the caller."""

    def refuse(_name: str, _data: bytes) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        run_program(source="echo x; sleep 60", toolchain="shell", on_output=refuse)
    assert left_behind(state) == []


@pytest.mark.usefixtures("under_os")
def test_many_runs_beside_an_event_loop(state: Path) -> None:
    """`run_program_async` runs several programs at once, without blocking the loop, and raises like `run_program`."""

    async def several() -> list[str | None]:
        ticks = 0
        runs = [run_program_async(source=f"echo {number}", toolchain="shell") for number in range(3)]
        gathered = asyncio.gather(*runs)
        while not gathered.done():
            ticks += 1
            await asyncio.sleep(0.01)
        assert ticks > 5
        with pytest.raises(SandboxError, match="the toolchain 'rust'"):
            await run_program_async(source="", toolchain="rust")
        return [result.stdout.text for result in gathered.result()]

    assert asyncio.run(several()) == ["0\n", "1\n", "2\n"]
    assert left_behind(state) == []


@pytest.mark.usefixtures("under_os")
def test_cancelling_ends_the_machine(state: Path) -> None:
    """A cancelled `run_program_async` raises only after its machine is gone, even if cancelled twice."""

    async def cancelled(times: int) -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(
            run_program_async(
                source="echo on; sleep 60",
                toolchain="shell",
                on_output=lambda _name, _data: loop.call_soon_threadsafe(started.set),
            )
        )
        await started.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left_behind(state) == []

    for times in (1, 2):
        asyncio.run(cancelled(times))


@pytest.mark.usefixtures("under_os")
def test_a_queued_run_is_cancelled_at_once(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling a queued run raises soon, and queued runs do not occupy the loop's threads."""
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "1")

    async def crowded() -> float:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(
            run_program_async(
                source="echo on; sleep 60",
                toolchain="shell",
                on_output=lambda _name, _data: loop.call_soon_threadsafe(started.set),
            )
        )
        await started.wait()
        waiting = [asyncio.create_task(run_program_async(source="true", toolchain="shell")) for _ in range(40)]
        await asyncio.sleep(1)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 5), 30) == 5
        began = loop.time()
        for task in (first, *waiting):
            task.cancel()
        await asyncio.gather(first, *waiting, return_exceptions=True)
        return loop.time() - began

    assert asyncio.run(crowded()) < 60
    assert len(list(state.glob("*/job.json"))) < 10  # none of the forty has started meanwhile
    assert left_behind(state) == []


# usage mistakes


def pipe(path: Path) -> str:
    """Create a named pipe with a source's name, without a writer."""
    os.mkfifo(path)
    return str(path)


def written(path: Path) -> str:
    """Write a file with meaningless content."""
    path.write_text("nothing\n")
    return str(path)


@pytest.mark.parametrize(
    ("make", "code", "why"),
    [
        (lambda _: ["missing.py"], 2, "No such file"),
        (lambda at: [str(at)], 2, "it has no x07-sandbox.toml"),
        (lambda _: ["-c", "x"], 2, "its language is unknown"),
        (lambda _: [], 2, "PROGRAM is missing"),
        (lambda _: ["--toolchain", "make", "-c", "x"], 2, "the toolchain make needs a project"),
        (lambda _: ["a.x07.json"], 2, "cannot read the program a.x07.json"),
        (lambda at: [pipe(at / "a.py")], 2, "not a regular file"),
        (lambda at: [written(at / "a.exe")], 2, "no toolchain handles .exe files"),
        (lambda at: ["--toolchain", "executable", written(at / "a.exe")], 2, "neither an ELF file nor a script"),
        (lambda _: ["--env", "A-B=1", "-c", "x", "--toolchain", "c"], 2, "not a valid variable name"),
        (lambda _: ["--env", "X07_WORLD=1", "-c", "x", "--toolchain", "c"], 2, "that start with X07_ are reserved"),
        (lambda _: ["--env", "NOT_SET_ANYWHERE", "-c", "x", "--toolchain", "c"], 2, "the variable is not set"),
        (lambda _: ["--input-b64", "???", "-c", "x", "--toolchain", "c"], 2, "not base64"),
        (lambda _: ["--input", "missing", "-c", "x", "--toolchain", "c"], 2, "cannot read the input missing"),
    ],
)
def test_each_usage_mistake_has_its_own_error(
    tmp_path: Path, make: Callable[[Path], list[str]], code: int, why: str
) -> None:
    """Each mistake in naming a program, its input or its variables has its own error and exit code."""
    jobs = tmp_path / "home" / "jobs"
    jobs.parent.mkdir(mode=0o700)
    folder = tmp_path / "work"
    folder.mkdir()
    done = command("--json", *make(folder), X07_VM_STATE_DIR=str(jobs))
    assert done.returncode == code, done.stderr
    assert why in json.loads(done.stdout)["reason"]
    assert not list(jobs.glob("*/job.json"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a.sh", "--compiled-out", "a.sh"], "the run reads it"),
        (["a.sh", "--report-out", "./link.sh"], "not a regular file"),
        (["a.sh", "--policy", "p.json", "--report-out", "p.json"], "the run reads it"),
        (["a.sh", "--input", "in.txt", "--report-out", "../files/in.txt"], "the run reads it"),
        (["a.sh", "--report", "runner", "--attest-runtime", "a.sh"], "the run reads it"),
        (["a.sh", "--report-out", "pipe"], "not a regular file"),
        (["a.sh", "--report-out", "none/x"], "not a folder that you can write"),
        (["a.sh", "--compiled-out", "x" * 300], "File name too long"),
        (["a.sh", "--policy", "p.json", "--diff", "p"], "the run reads it"),
        (["a.sh", "--diff", "x", "--report-out", "x.json"], "two flags name it"),
        (["a.sh", "--dry-run", "--report-out", "x"], "--dry-run writes nothing"),
        (["a.sh", "--timeout", "0"], "give a time above 0"),
        (["a.sh", "--top", "10"], "arguments after --"),
    ],
)
def test_an_output_file_never_overwrites_an_input(tmp_path: Path, words: list[str], why: str) -> None:
    """An output file that is an input, another output, a link, a pipe or nowhere is rejected before the run."""
    work = tmp_path / "files"
    work.mkdir()
    (work / "a.sh").write_text("echo on\n")
    (work / "in.txt").write_text("in\n")
    (work / "p.json").write_bytes(render_policy(load_policy()))
    (work / "link.sh").symlink_to("a.sh")
    os.mkfifo(work / "pipe")
    before = {path.name: path.lstat().st_mtime_ns for path in work.iterdir()}
    done = x07(work, "run", *words)
    assert (done.code, why in done.err) == (2, True), done.err
    assert {path.name: path.lstat().st_mtime_ns for path in work.iterdir()} == before


def test_waiting_for_a_pipes_writer_can_be_cancelled(tmp_path: Path) -> None:
    """SIGTERM cancels a run that waits for a writer of its input pipe."""
    os.mkfifo(tmp_path / "pipe")
    argv = [*X07, "run", "--input", str(tmp_path / "pipe")]
    with subprocess.Popen([*argv, "-c", "cat", "--toolchain", "shell"], stderr=subprocess.PIPE) as child:
        wanted = Path(f"/proc/{child.pid}/wchan")
        deadline = time.monotonic() + 60
        while "wait_for_partner" not in wanted.read_text() and "fifo_open" not in wanted.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)  # another process's state has no event
        child.terminate()
        assert child.wait(60) == 143


def test_a_dry_run_boots_nothing(tmp_path: Path) -> None:
    """--dry-run shows how a program would be built, run and limited, and starts no machine."""
    jobs = tmp_path / "jobs"
    done = command("--dry-run", "--json", "-c", "int main(void) {}", "--toolchain", "c", X07_VM_STATE_DIR=str(jobs))
    assert done.returncode == 0, done.stderr
    shown = document(done.stdout)
    assert (shown["toolchain"], shown["run"]) == ("c", ["/x07/in/artifact"])
    assert {control["field"] for control in shown["plan"]["controls"]} >= {"limits.wall_ms", "net.enabled"}
    assert b"build in a VM without network" in command("--dry-run", "-c", "x", "--toolchain", "c").stdout
    assert not jobs.exists()
    text = command("--dry-run", "--allow-read-root", str(tmp_path), "-c", "x", "--toolchain", "c").stdout.decode()
    assert f"folder {tmp_path}: copied to {tmp_path}, read-only\n" in text
    assert "network: none\n" in text
    hosts = ("--allow-host", "example.org:443,80", "--deny-host", "a.example.org:*")
    text = command("--dry-run", *hosts, "-c", "x", "--toolchain", "c").stdout.decode()
    assert "network: example.org:80,443 (denied: a.example.org:*)\n" in text


@pytest.mark.parametrize(
    ("words", "environment", "code", "why"),
    [
        ([], {"X07_VM_GUEST_IMAGE": "nothing-such"}, 125, "Run x07 image build --name nothing-such"),
        ([], {"X07_VM_GUEST_IMAGE_DIGEST": "sha256:" + "0" * 64}, 125, "is not allowed to run"),
        (["--require-hardware"], {}, 125, "hardware virtualisation is required"),
        ([], {"X07_VM_REQUIRE_HARDWARE": "1"}, 125, "To accept emulation instead, unset X07_VM_REQUIRE_HARDWARE"),
        (["--allow-read-root", "missing"], {}, 2, "does not exist"),
        (["--allow-read-root", "link"], {}, 2, " is a symbolic link"),
        (["--policy", "built-in:worker", "main.x07.json"], {}, 125, "has no X07 toolchain"),
    ],
)
def test_a_dry_run_is_refused_as_a_run_is(
    tmp_path: Path, words: list[str], environment: dict[str, str], code: int, why: str
) -> None:
    """--dry-run refuses an image, missing hardware or a root in the same words as a run."""
    (tmp_path / "main.x07.json").write_text("{}")
    (tmp_path / "link").symlink_to("/etc")
    program = [] if "main.x07.json" in words else ["-c", "true", "--toolchain", "shell"]
    if "HARDWARE" in why.upper():
        plain = json.loads(x07(tmp_path, "run", "--json", *program).out)
        need(plain["isolation"] == "vm-emulated", "needs a host without KVM", installable=False)
    results = []
    for how in ([], ["--dry-run"]):
        done = x07(tmp_path, "run", "--json", *how, *words, *program, env=environment)
        results.append((done.code, json.loads(done.out)["reason"]))
    assert results[0] == results[1]
    assert (results[0][0], why in results[0][1]) == (code, True)


def test_a_dry_run_shows_no_control_sequence(sandbox: Sandbox) -> None:
    """--dry-run escapes the control characters of a hostile manifest."""
    folder = project(sandbox.work / "p", main_py="")
    text = HEAD + 'toolchain = "python"\nfiles = ["*.py"]\nentry = "main.py"\n[run]\nargs = ["\\u001b[2J\\u009bé"]\n'
    (folder / "x07-sandbox.toml").write_text(text)
    done = command("--dry-run", str(folder), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert not any(char < 32 and char != 10 for char in done.stdout)
    assert "main.py '\\x1b[2J\\x9bé'" in done.stdout.decode()


@pytest.mark.usefixtures("under_os")
def test_artifact_and_report_can_be_saved(tmp_path: Path) -> None:
    """--compiled-out saves the executable, --report-out saves the result, and --quiet-json prints none."""
    out, report = tmp_path / "prog", tmp_path / "result.json"
    words = ["--json", "--quiet-json", "--report-out", str(report), "--compiled-out", str(out)]
    done = command(*words, "-c", "int main(void) { return 3; }", "--toolchain", "c")
    before = [*X07, "--quiet-json", "--report-out", str(tmp_path / "first")]
    first = subprocess.run(
        [*before, "run", "--json", "--toolchain", "shell", "-c", "exit 4"],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (first.returncode, first.stdout) == (4, b""), first.stderr
    (tmp_path / "first").unlink()
    assert (done.returncode, done.stdout) == (3, b""), done.stderr
    assert out.read_bytes().startswith(b"\x7fELF")
    assert os.access(out, os.X_OK)
    assert json.loads(report.read_bytes())["exit_code"] == 3
    assert command(str(out)).returncode == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prog", "result.json"]


@pytest.mark.usefixtures("under_os")
def test_a_run_can_print_x07s_report(tmp_path: Path) -> None:
    """--report prints X07's report, exits with its code, and allows an attestation."""
    attested = tmp_path / "attest.json"
    words = ["--attest-runtime", str(attested), "-c", "cat; exit 3", "--toolchain", "shell"]
    done = command("--report", "runner", *words, stdin=b"in")
    report = json.loads(done.stdout)
    assert (done.returncode, report["schema_version"]) == (1, "x07-os-runner.report@0.5.0")
    assert (report["solve"]["exit_status"], report["solve"]["solve_output_b64"]) == (3, "aW4=")
    assert json.loads(attested.read_bytes())["input_len_bytes"] == 2
    done = command("--report", "wrapped", "-c", "true", "--toolchain", "shell")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_version"] == "x07.run.report@0.3.0"


@pytest.mark.parametrize(
    ("words", "environment", "code", "why"),
    [
        (["--backend", "qemu"], {}, 0, ""),
        (["--backend", "docker"], {}, 125, "weaker isolation"),
        (["--backend", "firecracker"], {"X07_VM_FIRECRACKER_CTR_BIN": "/nonexistent/ctr"}, 125, "no executable"),
        (["--backend", "container"], {}, 125, "only on macOS 26 or newer"),
        ([], {"X07_VM_BACKEND": "vz"}, 125, "only on macOS"),
        (["--backend", "xen"], {}, 2, "no such backend"),
        (["--backend", "none"], {}, 125, "weaker isolation"),
        (["--backend", "qemu"], {"X07_VM_BACKEND": "xen"}, 2, "X07_VM_BACKEND"),
        (["--world", "run-os"], {}, 2, "cannot run in the world run-os"),
        (["--world", "solve-pure"], {}, 2, "implements only run-os-sandboxed"),
        (["--profile", "dev"], {}, 2, "an x07.json"),
    ],
)
def test_backends_and_worlds_are_accepted_or_refused(
    words: list[str], environment: dict[str, str], code: int, why: str
) -> None:
    """A backend or world named by flag or variable is accepted, or refused by name."""
    done = command("--json", *words, "-c", "true", "--toolchain", "shell", stdin=b"", **environment)
    assert (done.returncode, why in json.loads(done.stdout)["reason"]) == (code, True), done.stdout


def test_variables_that_a_policy_denies_are_refused(sandbox: Sandbox) -> None:
    """Variables that env.deny_keys or env.enabled forbid are refused, and reported as denials."""
    for changes, value in (({"env.deny_keys": ["B", "A"]}, ["B"]), ({"env.enabled": False}, True)):
        policy = str(sandbox.policy(changes))
        done = command("--json", "--policy", policy, "--env", "A=1", "-c", "true", "--toolchain", "shell")
        result = json.loads(done.stdout)
        assert (done.returncode, result["outcome"]) == (125, "refused")
        (denial,) = result["denials"]
        (field,) = changes
        assert (denial["field"], denial["observed_by"]) == (field, "host")
        said = {name: given for name, given in denial["how_to_allow"].items() if given is not None}
        assert said == {"json_path": f"$.{field}", "value": value}


# failing builds


def test_a_compiler_that_exhausts_memory_is_ended(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that exhausts the compiler's memory is a failed build that says so."""
    monkeypatch.setattr(settings, "BUILD_MEM_BYTES", 96 << 20)
    # Cold: no other test starts builds with this little memory.
    ran = sandbox.run_text("eat.c", '#include "/dev/zero"\nint main(void) { return 0; }\n', cold=True)
    assert ran.outcome == "build-failed"
    assert "killed at its memory limit of 96 MiB (fixed for builds)" in ran.reason
    assert ran.result.phases["build"].reason == ran.reason


@pytest.mark.usefixtures("under_os")
def test_a_compile_error_in_a_non_utf_8_source_is_shown(tmp_path: Path) -> None:
    """A compile error in a source that is not UTF-8 still shows the compiler's message."""
    path = tmp_path / "latin.c"
    path.write_bytes(b"int main(void) { return x; } // \xfc\n")
    done = command(str(path))
    assert done.returncode == 126
    assert "latin.c:1:25: error:" in done.stderr.decode()
    assert r"// \xfc" in done.stderr.decode()
