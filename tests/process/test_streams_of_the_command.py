"""The command's own standard streams: closed, broken or non-blocking."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.process.conftest import LAUNCHER

POLICY = Path(__file__).resolve().parents[2] / "examples" / "policies" / "small.json"


@pytest.fixture(autouse=True)
def without_isolation(launcher: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - two ways for each test
    """Programs run without a VM: these promises are about the command's own streams, with and without a front."""
    monkeypatch.setenv("X07_SANDBOX_BACKEND", "os")
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")


def _shell(tmp_path: Path, line: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell line with x07 as the command and $PROGRAM as a program that prints two control characters."""
    program = tmp_path / "program.py"
    program.write_text('print("early \\x9b31m \\u202e")\n', encoding="utf-8")
    names = {"X07": str(LAUNCHER), "PROGRAM": str(program)}
    line = f'x07() {{ "$X07" "$@"; }}; {line}'
    return subprocess.run(
        ["/bin/sh", "-c", line],
        env=os.environ | names | {"X07_VM_STATE_DIR": str(tmp_path / "jobs")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


def test_closed_streams_cancel_nothing(tmp_path: Path) -> None:
    """A program runs to its end with all three standard streams closed."""
    done = _shell(tmp_path, 'x07 run "$PROGRAM" <&- >&- 2>&-; echo $?')
    assert done.stdout == b"0\n"


def test_json_holds_no_control_character(tmp_path: Path) -> None:
    """The JSON result is ASCII: control characters of the program's output are escaped and decode unchanged."""
    done = _shell(tmp_path, 'x07 run --json "$PROGRAM"')
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["stdout"]["text"] == "early \x9b31m \u202e\n"


def test_a_full_disk_behind_stdout_is_reported(tmp_path: Path) -> None:
    """A full disk behind stdout is reported on stderr, and a successful run exits with 125."""
    done = _shell(tmp_path, 'x07 run "$PROGRAM" >/dev/full')
    assert done.returncode == 125
    assert done.stderr == b"x07: could not write the program's standard output: No space left on device\n"


def _started(tmp_path: Path, stdout: int, words: tuple[str, ...], command: str = "x07") -> subprocess.Popen[bytes]:
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs")}
    argv = [str(LAUNCHER.with_name(command)), *words]
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("run", "--help"), 0),
        (("policy", "schema"), 0),
        (("run", "--json", "-c", "exit 3", "--toolchain", "shell"), 3),
    ],
)
def test_a_closed_pipe_is_no_error(tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    """A command ends normally and silently if nobody reads its output any more."""
    heard, out = os.pipe()
    os.close(heard)
    with _started(tmp_path, out, words) as command:
        os.close(out)
        assert (command.communicate()[1], command.returncode) == (b"", code)


@pytest.mark.parametrize(
    ("command", "words", "code"),
    [
        ("x07", ("policy", "schema"), 0),
        ("x07", ("run", "--json", "-c", "exit 3", "--toolchain", "shell"), 3),
        ("x07-os-runner", ("--world", "run-os-sandboxed", "--policy", "{policy}", "--program", "{x}"), 0),
    ],
)
def test_json_is_complete_on_a_non_blocking_pipe(
    tmp_path: Path, command: str, words: tuple[str, ...], code: int
) -> None:
    """A JSON document arrives complete through a non-blocking pipe with a slow reader."""
    program = tmp_path / "long.py"
    program.write_text("print('x' * 9000)\n", encoding="ascii")
    words = tuple(word.format(policy=POLICY, x=program) for word in words)
    heard, out = os.pipe()
    os.set_blocking(out, False)
    fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4096)
    with _started(tmp_path, out, words, command) as started, os.fdopen(heard, "rb") as pipe:
        os.close(out)
        select.select([pipe], [], [])
        time.sleep(0.3)  # until it has found the pipe full, for which there is no event
        assert isinstance(json.loads(pipe.read()), dict)
        assert (started.communicate()[1], started.returncode) == (b"", code)


def test_a_source_from_a_non_blocking_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """A source that arrives in pieces through a non-blocking pipe runs complete."""
    program, out = os.pipe()
    os.set_blocking(program, False)
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "jobs")}
    argv = [str(LAUNCHER), "run", "--toolchain", "shell", "-"]
    os.write(out, b"echo one\n")
    with subprocess.Popen(argv, env=env, stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        os.close(program)
        time.sleep(1)  # until it has found the pipe empty, for which there is no event
        os.write(out, b"echo two\n")
        os.close(out)
        assert (command.communicate(), command.returncode) == ((b"one\ntwo\n", b""), 0)


def test_a_read_error_on_the_input_is_a_warning(tmp_path: Path) -> None:
    """A read error on the input is a warning, and the result has no input digest."""
    done = _shell(tmp_path, 'x07 run --json "$PROGRAM" </proc/self/mem')
    result = json.loads(done.stdout)
    assert [warning for warning in result["warnings"] if "input could not be read" in warning]
    assert result["digests"]["input"] is None


@pytest.mark.parametrize(("words", "code"), [("run --json", 2), ("run --json /dev/null/x.py", 2)])
def test_a_usage_error_with_json_is_one_object(tmp_path: Path, words: str, code: int) -> None:
    """A usage error with --json prints exactly one JSON object and exits with 2."""
    done = _shell(tmp_path, f"x07 {words}")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (code, "usage-error")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_a_signal_during_import_cancels_the_command(name: str, code: int) -> None:
    """A signal while modules load cancels the command: one line, no traceback."""
    program = (
        "import signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'x07_sandbox.sessions.request':\n"
        "            sys.meta_path.remove(self)\n"
        f"            signal.raise_signal(signal.{name})\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from x07_sandbox.cli.main import main\n"
        "sys.exit(main(['run', '--json', 'program.py']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == code
    assert done.stderr == b"x07: cancelled\n"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("x07 run /nowhere/x.py 2>/dev/full", 2),
        ("x07 image verify no-such-image 2>/dev/full", 125),
        ("x07 --version >/dev/full", 125),
        ("x07 run --help >/dev/full", 125),
    ],
)
def test_an_unwritable_stderr_changes_no_exit_code(tmp_path: Path, line: str, code: int) -> None:
    """An unwritable stderr does not change the exit code; help that cannot be written exits with 125."""
    assert _shell(tmp_path, line).returncode == code


def test_a_named_pipe_as_policy_is_a_usage_error(tmp_path: Path) -> None:
    """A named pipe as a policy is a usage error, since reading it might never end."""
    os.mkfifo(tmp_path / "policy.json")
    done = _shell(tmp_path, f"x07 run --policy '{tmp_path}/policy.json' \"$PROGRAM\"")
    assert done.returncode == 2
    assert b"not a regular file" in done.stderr


def test_an_ignored_sighup_stays_ignored(tmp_path: Path) -> None:
    """A command started with SIGHUP ignored, as by nohup, survives the end of its terminal."""
    done = _shell(tmp_path, "trap '' HUP; x07 run \"$PROGRAM\" & sleep 1.5; kill -HUP $!; wait $!; echo $?")
    assert done.stdout.endswith(b"\n0\n"), done.stderr


def test_a_folder_named_like_a_source_is_a_usage_error(tmp_path: Path) -> None:
    """A folder named like a source is a usage error."""
    (tmp_path / "folder.py").mkdir()
    done = _shell(tmp_path, f"x07 run '{tmp_path}/folder.py'")
    assert done.returncode == 2
    assert b"it has no x07-sandbox.toml" in done.stderr
