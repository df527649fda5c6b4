"""x07-vz-helper on Linux: its types, and its life with a stand-in for Apple's Virtualization framework.

The stand-in (macos/stubs) runs no machine: it writes the command line to the console, echoes each port, and obeys the
lines "poweroff" and "crash". So these tests prove what the helper does, not what a Mac does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need

ROOT: Final = Path(__file__).resolve().parents[2]
MIB: Final = 1024 * 1024
GREETING: Final = b"port x07.0\n"


def check(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/check_vz_helper.sh."""
    argv = (str(ROOT / "scripts" / "check_vz_helper.sh"), *argv)
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def swift(need: Need) -> None:
    """Skip without a Swift compiler, which scripts/setup.sh does not install because of its size."""
    need(shutil.which("swiftc"), "swiftc (Debian package swiftlang, 2.2 GB)", installable=False)


@pytest.fixture(scope="session")
def helper(swift: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001 - skips
    """The helper, built with the stand-in for the framework."""
    program = tmp_path_factory.mktemp("vz") / "x07-vz-helper"
    done = check("--build", str(program))
    assert (done.returncode, done.stdout) == (0, "ok: checked x07-vz-helper\n"), done.stderr
    return program


class Start(Protocol):
    """The type of the fixture ``start``."""

    def __call__(self, *argv: str, line: str = "", fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a machine. line: the kernel's command line."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The required options, with files for them."""
    is_arm = os.uname().machine == "aarch64"
    head = bytearray(4096)
    place = 56 if is_arm else 0x202
    head[place : place + 4] = b"ARMd" if is_arm else b"HdrS"
    for name in ("kernel", "root", "empty"):
        (tmp_path / name).write_bytes(head)
    paths = {"--kernel": "kernel", "--root": "root", "--scratch-from": "empty", "--scratch": "scratch"}
    numbers = {"--command-line": "quiet", "--mem-bytes": str(256 * MIB - 1), "--wall-ms": "60000"}
    return {flag: str(tmp_path / name) for flag, name in paths.items()} | numbers


@pytest.fixture
def start(helper: Path, files: dict[str, str]) -> Iterator[Start]:
    """Starts the helper, and kills what is left of it."""
    with contextlib.ExitStack() as stack:

        def begin(*argv: str, line: str = "", fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
            given = dict(zip(argv[::2], argv[1::2], strict=True))
            options = files | ({"--command-line": line} if line else {}) | given
            words = [word for pair in options.items() for word in pair]
            pipe = subprocess.PIPE
            proc = subprocess.Popen([helper, "run", *words], stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=fds)
            stack.enter_context(proc)
            stack.callback(proc.kill)
            return proc

        yield begin


def greeted(proc: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Wait until the stand-in guest has opened the channel."""
    assert proc.stdout is not None
    assert proc.stdout.readline() == GREETING
    return proc


def ended(proc: subprocess.Popen[bytes], line: bytes) -> tuple[bytes, bytes]:
    """Give the stand-in guest a line that ends it; return both outputs. Stdin stays open."""
    assert proc.stdin is not None
    assert proc.stdout is not None
    assert proc.stderr is not None
    proc.stdin.write(line)
    proc.stdin.flush()
    proc.wait()
    return proc.stdout.read(), proc.stderr.read()


def test_the_channel_is_stdin_and_stdout(start: Start, files: dict[str, str]) -> None:
    """Bytes arrive unchanged in both directions; the end of stdin ends the machine and removes its scratch disk."""
    proc = greeted(start())
    assert Path(files["--scratch"]).read_bytes() == Path(files["--scratch-from"]).read_bytes()
    sent = os.urandom(3 * MIB)
    assert proc.stdin is not None
    assert proc.stdout is not None
    writer = threading.Thread(target=lambda: (proc.stdin.write(sent), proc.stdin.flush()))  # type: ignore[union-attr]
    writer.start()
    assert proc.stdout.read(len(sent)) == sent
    writer.join()
    proc.stdin.close()
    assert proc.wait() == 0
    assert not Path(files["--scratch"]).exists()


def test_the_relay_has_a_descriptor_of_its_own(start: Start) -> None:
    """The port of the relay is bridged to the descriptor of --net-fd, whose end leaves the machine running."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0)  # the helper must not depend on a descriptor's mode
        proc = greeted(start("--net-fd", str(theirs.fileno()), fds=(theirs.fileno(),)))
        theirs.close()
        ours.sendall(b"packet")
        with ours.makefile("rb") as file:
            assert file.read(len(b"port x07.net\npacket")) == b"port x07.net\npacket"
    _, said = ended(proc, b"poweroff\n")
    assert proc.returncode == 0
    assert b"the guest has powered off" in said


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [(b"poweroff\n", 0, b"the guest has powered off"), (b"crash\n", 1, b"the machine stopped: ")],
)
def test_the_end_of_the_guest_is_the_exit_code(start: Start, line: bytes, code: int, said: bytes) -> None:
    """A guest that powers off gives 0, a failed machine 1."""
    proc = greeted(start())
    _, message = ended(proc, line)
    assert proc.returncode == code
    assert said in message


def test_the_last_output_arrives(start: Start) -> None:
    """What a guest writes before it powers off arrives."""
    proc = greeted(start())
    assert ended(proc, b"poweroff" + b"x" * 30_000)[0] == b"poweroff" + b"x" * 30_000


def test_a_machine_that_does_not_start_is_a_failure(start: Start) -> None:
    """If the framework does not start the machine, the exit code is 1."""
    proc = start(line="standin.fail")
    assert proc.wait() == 1
    assert proc.stderr is not None
    assert b"cannot start the machine: " in proc.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_machine(start: Start, files: dict[str, str], number: signal.Signals) -> None:
    """SIGTERM and SIGINT stop the machine; the exit code is 128 and the signal's number."""
    proc = greeted(start())
    proc.send_signal(number)
    assert proc.wait() == 128 + number
    assert not Path(files["--scratch"]).exists()


def test_the_deadline_needs_nobody(start: Start) -> None:
    """At the deadline the helper ends with 124, also if the framework never answers."""
    began = time.monotonic()
    proc = start("--wall-ms", "500", line="standin.hang")
    assert proc.wait() == 124
    assert 2.4 < time.monotonic() - began < 10


def test_the_helper_ends_with_its_parent(helper: Path, files: dict[str, str]) -> None:
    """If the process that started the helper is killed, the helper ends although its stdin is open."""
    words = [word for pair in files.items() for word in pair]
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:]); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(helper), "run", *words]
    read_fd, write_fd = os.pipe()
    with os.fdopen(write_fd, "wb"), subprocess.Popen(argv, stdin=read_fd, stdout=subprocess.PIPE) as parent:
        os.close(read_fd)
        assert parent.stdout is not None
        assert parent.stdout.readline() == GREETING
        began = time.monotonic()
        parent.kill()
        assert parent.stdout.read() == b""  # the helper has it too
    assert time.monotonic() - began < 20  # and not at its deadline


def test_the_console_is_bounded(start: Start) -> None:
    """Of the guest's console, stderr gets as many bytes as allowed; the guest goes on."""
    proc = greeted(start("--console-bytes", "20", line="a" * 100_000))
    output, said = ended(proc, b"poweroff\n")
    assert (proc.returncode, output) == (0, b"poweroff\n")
    assert said == b"console: aaaaaaaaaaax07-vz-helper: the guest has powered off\n"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--cpus": "0"}, "--cpus must be a number from 1 to 1024"),
        ({"--cpus": "5"}, "cannot give the machine 5 processors: this Mac allows 1...4. Change --cpus."),
        ({"--mem-bytes": str(9 << 30)}, "bytes of memory: this Mac allows"),
        ({"--mem-bytes": "1e9"}, "--mem-bytes must be a number"),
        ({"--wall-ms": "+1"}, "--wall-ms must be a number"),
        ({"--network": "nat"}, "there is no option --network"),
        ({"--kernel": "/missing"}, "cannot use the kernel /missing: No such file or directory."),
        ({"--kernel": "/bin/true"}, "it is not a "),
        ({"--scratch-from": "/missing"}, "cannot clone the scratch disk: No such file or directory."),
        ({"--root": "/missing"}, "the framework refuses the machine: "),
        ({"--net-fd": "77"}, "descriptor 77 is not open"),
    ],
)
def test_what_cannot_start_is_refused(start: Start, files: dict[str, str], changed: dict[str, str], said: str) -> None:
    """A wrong option, size or file gives exit code 2 and its reason, and leaves no scratch disk."""
    proc = start(*(word for pair in changed.items() for word in pair))
    output, message = proc.communicate()
    assert (proc.returncode, output) == (2, b"")
    assert said in message.decode()
    assert not Path(files["--scratch"]).exists()


def test_a_scratch_disk_of_another_machine_is_kept(start: Start, files: dict[str, str]) -> None:
    """An existing scratch disk is neither used nor removed."""
    Path(files["--scratch"]).write_bytes(b"another's")
    proc = start()
    assert b"cannot clone the scratch disk: File exists." in proc.communicate()[1]
    assert proc.returncode == 2
    assert Path(files["--scratch"]).read_bytes() == b"another's"


@pytest.mark.parametrize("argv", [[], ["stop"], ["preflight", "now"], ["run", "--cpus"], ["run", "--cpus", "1"]])
def test_usage_errors_show_the_usage(helper: Path, argv: list[str]) -> None:
    """A wrong command line gives exit code 2 and the usage."""
    done = subprocess.run([helper, *argv], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"usage: x07-vz-helper preflight" in done.stderr


def test_preflight_reports_what_this_host_allows(helper: Path) -> None:
    """`preflight` prints one JSON object, and gives 2 where no machine can start, as on the stand-in."""
    done = subprocess.run([helper, "preflight"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == 2
    assert report == {
        "schema_version": "x07.vz.preflight@0.1.0",
        "macos": report["macos"],
        "arch": "arm64" if os.uname().machine == "aarch64" else "x86_64",
        "supported": False,
        "entitled": False,
        "ok": False,
        "memory_bytes": [4 * MIB, 8192 * MIB],
        "cpus": [1, 4],
    }
