"""What a program sees, receives and returns, and how a run ends that is ended from outside."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.command import X07
from tests.conftest import sample
from tests.vm.conftest import Artifacts, Ran, Sandbox, left_behind, owners, wait_done
from x07_sandbox.policy.decode import VARIABLES, default_policy
from x07_sandbox.policy.model import leaf_values

pytestmark = pytest.mark.vm

MIB = 1 << 20
EVERY_BYTE = bytes(range(256))


# exit codes, streams, arguments


def test_arguments_arrive_byte_for_byte(sandbox: Sandbox) -> None:
    """Arguments arrive byte for byte: blanks, quotes, newlines, any script, undecodable bytes, or empty."""
    args = [
        "two words",
        "",
        "'\"$(id)\\",
        "line\nend",
        "Zoë 日本 🙂",
        b"\xff\xfe raw".decode("utf-8", "surrogateescape"),
        "--",
        "-x",
    ]
    ran = sandbox.behave("args", *args)
    assert ran.outcome == "ok", ran.reason
    assert ran.stdout == b"".join(os.fsencode(arg) + b"\0" for arg in args)


# what it sees


@pytest.fixture(scope="module")
def looked(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One program's view of its machine, which the tests below read."""
    place = tmp_path_factory.mktemp("looked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(place / "jobs"))
        patch.setenv("X07_TEST_CANARY", "of the host")
        ran = Sandbox(place / "jobs", place, artifacts).behave("look")
    assert ran.outcome == "ok", ran.reason
    return ran


def _values(ran: Ran, key: str) -> list[str]:
    return [line.removeprefix(f"{key} ") for line in ran.lines() if line.startswith(f"{key} ")]


def _status(ran: Ran) -> dict[str, str]:
    lines = (line.removeprefix("/proc/self/status: ").split(":", 1) for line in ran.lines() if "self/status: " in line)
    return {name: value.strip() for name, value in lines}


def test_the_host_environment_stays_outside(looked: Ran) -> None:
    """The program's environment holds the fixed variables and X07's own, and none of the caller's."""
    given = dict(line.split("=", 1) for line in _values(looked, "env"))
    fixed = {name: value for name, value in given.items() if not name.startswith("X07_")}
    assert fixed == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/opt/x07",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert given["X07_WORLD"]
    assert "X07_TEST_CANARY" not in given
    assert not any(name.startswith("X07_VM") for name in given)


def test_every_advisory_field_is_passed_to_the_program(looked: Ran) -> None:
    """The plan names a variable for each field that X07's libraries enforce, and the program finds its value."""
    given = dict(line.split("=", 1) for line in _values(looked, "env"))
    values = leaf_values(default_policy())
    advisory = [control for control in looked.result.controls if control.state == "advisory"]
    reasons = {control.field: control.why for control in advisory if control.by == "X07's libraries"}
    assert len(reasons) > 40
    assert {control.by for control in advisory} == {"X07's libraries", "X07's compiler", "people"}
    for variable, field in VARIABLES:
        value = values[field]
        if field in reasons and "passed to the program" in reasons.pop(field):
            shown = value if not isinstance(value, tuple) else ";".join(map(str, value))
            assert given[variable] == str(int(shown) if isinstance(shown, bool) else shown), field
    assert set(reasons) <= {"process.kill_on_drop", "process.kill_tree"}


def test_the_working_directory_is_private_and_writable(looked: Ran) -> None:
    """The program starts in /opt/x07, which it owns and can write."""
    assert _values(looked, "cwd") == ["/opt/x07"]
    assert _values(looked, "cwd-mode") == ["755 65532"]
    assert "cwd OK" in _values(looked, "make")


def test_the_program_is_unprivileged(looked: Ran) -> None:
    """The program has uid and gid 65532, no other groups, no capability, and no-new-privileges."""
    status = _status(looked)
    assert _values(looked, "ids") == ["65532 65532 65532 65532 groups 0"]
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert set(status["Uid"].split()) == {"65532"}


def test_the_program_is_alone_and_not_pid_1(looked: Ran) -> None:
    """The program has its own pid namespace, sees no other process, and is not PID 1."""
    pid = _status(looked)["Pid"]
    assert pid != "1"
    assert _values(looked, "process") == [pid]
    assert _values(looked, "session") == [pid]


def test_all_signals_have_their_default_action(looked: Ran) -> None:
    """At its start, a program ignores, catches and blocks no signal."""
    status = _status(looked)
    assert {int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")} == {0}
    assert _values(looked, "not-default") == []


def test_the_machine_has_a_fixed_name_and_no_network(looked: Ran) -> None:
    """The host name is x07, and the only network interface is lo."""
    assert _values(looked, "hostname") == ["x07"]
    lines = [line.removeprefix("/proc/net/dev: ") for line in looked.lines() if line.startswith("/proc/net/dev: ")]
    assert [line.split(":")[0].strip() for line in lines if ":" in line and "|" not in line] == ["lo"]


def test_the_agent_is_invisible(looked: Ran) -> None:
    """The program sees no agent, channel, disk, console, other process or other control group."""
    seen = dict(line.split() for line in _values(looked, "see"))
    assert seen == dict.fromkeys(seen, "ENOENT")
    assert {"/run/x07/agent.zip", "/proc/1", "/dev/vport0p1", "/sys/fs/cgroup/x07"} < set(seen)
    mounts = "".join(line for line in looked.lines() if line.startswith("/proc/self/mounts"))
    assert mounts.count("/run/x07") == mounts.count(" /run/x07/generation ") == 1
    assert "hidepid=invisible" in looked.stdout.decode()
    assert _values(looked, "/proc/self/cgroup:") == ["0::/"]


def test_the_system_is_read_only(looked: Ran) -> None:
    """The program can create files only in its working directory, /tmp, /var/tmp and /dev/shm."""
    made = dict(line.split() for line in _values(looked, "make"))
    assert made.pop("cwd") == "OK"
    assert made.pop("/proc") == "ENOENT"
    assert made.pop("/var/tmp") == "OK"  # noqa: S108 - the guest's, the same folder as /tmp
    assert set(made.values()) <= {"EROFS", "EACCES"}
    assert {made["/"], made["/x07/in"], made["/x07/out"]} == {"EROFS"}


def test_artifact_policy_and_kernel_settings_cannot_be_changed(looked: Ran) -> None:
    """The program cannot change its artifact, its policy, kernel settings or its OOM score."""
    tried = dict(line.split() for line in _values(looked, "write"))
    assert "OK" not in tried.values()
    assert tried["/x07/in/artifact"] in {"EROFS", "ETXTBSY", "EACCES"}
    assert tried["/proc/self/oom_score_adj"] == "EACCES"
    assert _values(looked, "chmod") == ["artifact EROFS"]
    assert _values(looked, "unlink") == ["artifact EROFS"]


def test_the_program_cannot_use_privileged_calls(looked: Ran) -> None:
    """The program cannot signal or trace PID 1, mount, chroot, change its user or host name, or raise its priority."""
    for action in (
        "signal",
        "trace",
        "mount",
        "remount",
        "umount",
        "chroot",
        "setuid",
        "setgid",
        "sethostname",
        "nice",
    ):
        answers = {line.split()[1] for line in _values(looked, action)}
        assert answers <= {"EPERM", "EACCES"}, action
        assert answers, action
    assert _values(looked, "mknod") == ["/tmp/disk EPERM"]  # noqa: S108 - the guest's
    assert _values(looked, "unshare") == ["mount EPERM"]


def test_a_user_namespace_reaches_nothing_new(looked: Ran) -> None:
    """A user namespace gives the program no unmount, no disk, no sysctl and no view of PID 1."""
    tried = dict(line.split() for line in _values(looked, "userns"))
    if tried["unshare"] == "OK":
        reached = {name for name, answer in tried.items() if answer == "OK"} - {"unshare", "mount-namespace"}
        assert reached == set(), tried
    else:
        assert tried["unshare"] in {"EPERM", "ENOSPC", "EUSERS"}


def test_resource_limits_are_set(looked: Ran) -> None:
    """limits.fds and the fixed limits on core files and locked memory are hard limits."""
    limits = {
        int(number): (int(soft), int(hard))
        for number, soft, hard in (line.split() for line in _values(looked, "rlimit"))
    }
    assert limits[resource.RLIMIT_NOFILE] == (1024, 1024)
    assert limits[resource.RLIMIT_CORE] == (0, 0)
    assert limits[resource.RLIMIT_MEMLOCK] == (65536, 65536)


# input


def _read_until(fd: int, end: bytes, timeout_s: float) -> bytes:
    """Read up to and including *end*."""
    data = b""
    deadline = time.monotonic() + timeout_s
    while not data.endswith(end):
        assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], data
        data += os.read(fd, 1)
    return data


@pytest.mark.parametrize("kind", sample(["pipe", "terminal"], 1))
def test_the_deadline_holds_if_the_reader_stalls(sandbox: Sandbox, threads: ThreadPoolExecutor, kind: str) -> None:
    """A stalled reader of the output blocks the program, and the machine still ends at its deadline."""
    with contextlib.ExitStack() as stack:
        heard, out = os.pipe() if kind == "pipe" else pty.openpty()
        stack.callback(os.close, out)
        policy = {"limits.wall_ms": 2000}
        running = threads.submit(
            sandbox.behave, "flood", "12", live_stdout=out, live_stderr=out, policy=policy, alone=False
        )
        try:
            wait_done(sandbox.state, 60)
        finally:
            os.close(heard)  # the run itself waits for its reader
        ran = running.result(60)
        assert ran.outcome == "timeout"
        assert ran.program_ms < 30_000
        assert len(ran.stdout) < 2 * MIB
    assert left_behind(sandbox.state) == []


# ended from outside


@contextlib.contextmanager
def command(args: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run the real `x07` with *args*, and kill it on exit."""
    argv = [*X07, *args]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]
    with child:
        try:
            yield child
        finally:
            child.kill()


def _started(state: Path, child: subprocess.Popen[bytes]) -> dict[str, object]:
    """Wait until the program runs, and return the owner record of the run phase's job."""
    assert child.stdout is not None
    assert _read_until(child.stdout.fileno(), b"sleeping\n", 60).endswith(b"sleeping\n")
    # If another test's pool was about to end, a clone replaced its warm machine.
    (owner,) = [owner for owner in owners(state) if re.search("-run(-clone)?'", str(owner["labels"]))]
    return owner


@pytest.fixture
def sleeper(state: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, object]]]:
    """A command whose program sleeps, and the owner record of that job."""
    words = ["run", "--toolchain", "shell", "-c", "echo sleeping; sleep 600"]
    with command(words, stdin=subprocess.DEVNULL) as child:
        yield child, _started(state, child)


Sleeper = tuple[subprocess.Popen[bytes], dict[str, object]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_cancels_the_run(sleeper: Sleeper, state: Path, number: int, code: int) -> None:
    """`x07 run` exits with 130 on SIGINT and 143 on SIGTERM, prints one line, and leaves nothing behind."""
    child, _ = sleeper
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code
    assert b"cancelled" in said
    assert said.count(b"\n") == 1
    assert left_behind(state) == []


def test_the_command_streams_and_ends_as_the_program(state: Path, tmp_path: Path) -> None:
    """`x07 run` passes input, both outputs and the exit code through, and adds nothing."""
    source = tmp_path / "through.c"
    source.write_text(
        "#include <stdio.h>\nint main(void) { int c; while ((c = getchar()) != EOF) putchar(c ^ 1);\n"
        'fputs("err", stderr); return 42; }\n'
    )
    with command(["run", str(source)], stdin=subprocess.PIPE) as child:
        out, err = child.communicate(EVERY_BYTE, timeout=60)
    assert (child.returncode, err) == (42, b"err")
    assert out == bytes(byte ^ 1 for byte in EVERY_BYTE)
    assert left_behind(state) == []
