"""Limits of what a caller waits for: a slot for a sandbox, and the file server, which a program may stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import X07
from tests.process.conftest import wait_until
from x07_sandbox import AsyncSandbox, Sandbox, SandboxError
from x07_sandbox.host.locks import is_locked
from x07_sandbox.records.runs import run_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("confined")

SANDBOX = [*X07, "sandbox"]
STOP = "for pid in /proc/[0-9]*; do pid=${pid#/proc/}; [ $pid -le 2 -o $pid = $$ ] || kill -STOP $pid; done"
NONE_STOPPED = "while grep -q '^State:.T' /proc/[0-9]*/status; do sleep 0.1; done"
LONG = {"LONG": "n" * 200}
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the guest's
NO_PROGRESS = "made no progress for 0.5 s"


@pytest.fixture(autouse=True)
def weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the backend `os`, which starts within a second."""
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
    monkeypatch.setenv("X07_SANDBOX_BACKEND", "os")


@pytest.fixture(params=[Sandbox, Sandbox.create])
def opened(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of this process, and one that another process holds."""
    sandbox = request.param()
    yield sandbox
    sandbox.close("discard")


@pytest.fixture
def one_slot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The only slot for sandboxes is taken."""
    monkeypatch.setenv("X07_VM_MAX_SANDBOXES", "1")
    with Sandbox():
        yield


def test_a_stopped_file_server_is_replaced(opened: Sandbox) -> None:
    """A request to a file server that a program has stopped ends at its time limit, and the next one works."""
    for request in (
        lambda: opened.files.list(timeout_s=0.5),
        lambda: opened.files.write("big", bytes(8 << 20), timeout_s=0.5),
        lambda: opened.files.read("kept", timeout_s=0.5),
    ):
        opened.files.write("kept", b"kept")
        opened.shell(STOP, check=True)
        with pytest.raises(TimeoutError, match=NO_PROGRESS) as raised:
            request()
        assert (raised.value.errno, raised.value.filename) in [(errno.ETIMEDOUT, name) for name in (".", "big", "kept")]
        assert opened.files.read("kept") == b"kept"
    assert opened.shell(NONE_STOPPED, timeout_s=60).ok


def test_time_limits_of_file_requests_hold_for_the_command_line(tmp_path: Path) -> None:
    """`x07 sandbox cp` has a time limit, by --timeout."""
    held = Sandbox.create(name="stops")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 30)
    try:
        held.start(["sh", "-c", f"while :; do {STOP}; done"])
        words = ["cp", "--timeout", "0.5", str(tmp_path / "large"), "stops:large"]
        done = subprocess.run([*SANDBOX, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, f"{NO_PROGRESS}. Try again, with a larger --timeout" in done.stderr) == (125, True), (
            done
        )
    finally:
        held.close("discard")


def test_a_cancelled_transfer_ends_at_once(tmp_path: Path) -> None:
    """A cancelled task of AsyncSandbox that uploads or downloads ends at once, and not at its time limit."""
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 30)

    async def use() -> None:
        async with AsyncSandbox() as opened:
            await opened.files.write("kept", b"kept")
            transfers: list[Callable[[], Coroutine[Any, Any, None]]] = [
                lambda: opened.upload(tmp_path / "large", "large", timeout_s=600),
                lambda: opened.download("kept", tmp_path / "kept", timeout_s=600),
            ]
            for transfer in transfers:
                assert await opened.files.read("kept") == b"kept"
                await opened.shell(STOP, check=True)
                task = asyncio.create_task(transfer())
                await asyncio.wait({task}, timeout=0.5)  # it waits for the server that is stopped
                assert not task.done()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(task, 60)

    asyncio.run(use())


def test_a_cancelled_write_ends_at_once() -> None:
    """A cancelled task that writes to a command that takes no input ends at once, and the command goes on."""

    async def use() -> None:
        async with AsyncSandbox() as opened:
            process = await opened.start(["sleep", "600"])
            task = asyncio.create_task(process.write(bytes(64 << 20)))
            await asyncio.wait({task}, timeout=0.5)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 60)
            assert await process.poll() is None
            await process.kill()

    asyncio.run(use())


def test_a_cancelled_create_leaves_no_sandbox() -> None:
    """A sandbox that another process holds is closed if the task that creates it is cancelled."""

    async def use(after_s: float) -> None:
        task = asyncio.create_task(AsyncSandbox.create())
        await asyncio.wait({task}, timeout=after_s)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).close()  # it was quicker

    for after_s in (0.0, 0.1, 0.3):
        asyncio.run(use(after_s))
    assert Sandbox.list() == []


def test_a_forked_child_cannot_use_the_commands_of_its_parent(opened: Sandbox) -> None:
    """In a forked child, every method of a command raises, and what its parent opens later stays its own."""
    process = opened.start(["sleep", "600"])
    process.signal(signal.SIGCONT)
    report, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        calls = (process.kill, process.close_stdin, lambda: process.signal(9), lambda: process.resize(1, 1))
        for call in calls:
            try:
                call()
            except SandboxError as exc:
                os.write(theirs, f"{exc.why}\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    with os.fdopen(report) as said:
        assert said.read() == "it belongs to the parent process\n" * 4
    assert not process.ended
    process.kill()


def test_a_forked_child_does_not_hold_the_folder_of_a_run() -> None:
    """While a forked child lives, the folder of its dead parent's sandbox is free."""
    code = (
        "import os, time; from x07_sandbox import Sandbox; sandbox = Sandbox(); child = os.fork(); "
        "print(sandbox.id, child, flush=True) if child else None; time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        run, child = parent.stdout.readline().split()
        try:
            assert is_locked(run_folder(run))
            parent.kill()
            parent.wait()
            # The child lets go of the folder as soon as it runs, and may not have run yet.
            wait_until(lambda: not is_locked(run_folder(run)), within_s=30)
        finally:
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("timeout_s", [0, -1, True, "1", float("nan"), float("inf")])
def test_a_wrong_time_limit_of_a_file_request_is_an_error(timeout_s: Any) -> None:  # noqa: ANN401 - all wrong
    """A time limit that is no positive number of seconds is refused, and nothing is asked."""
    with Sandbox() as opened, pytest.raises(SandboxError, match=r"timeout_s"):
        opened.files.list(timeout_s=timeout_s)


def test_a_download_keeps_the_holes_of_a_file(opened: Sandbox, tmp_path: Path) -> None:
    """A sparse file of 3 GiB is downloaded with its content, and takes almost no disk."""
    opened.shell(
        "truncate -s 3G a; for at in 5000000 2000000000; do printf x | dd of=a seek=$at bs=1 conv=notrunc; done"
    )
    opened.download("a", tmp_path / "a")
    info = (tmp_path / "a").stat()
    assert (info.st_size, info.st_blocks * 512 < 1 << 20) == (3 << 30, True)
    with (tmp_path / "a").open("rb") as file:
        assert [os.pread(file.fileno(), 3, at - 1) for at in (5_000_000, 2_000_000_000)] == [b"\0x\0"] * 2
    dense = os.urandom(3_000_001)
    for name, content in (("dense", dense), ("small", b"abc"), ("empty", b"")):
        opened.files.write(name, content)
        opened.download(name, tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_a_folder_with_entries_that_do_not_come_whole_is_an_error(opened: Sandbox, tmp_path: Path) -> None:
    """A download of a folder copies all it can, and names what did not come."""
    opened.shell("mkdir d; cd d; echo a > a; for _ in $(seq 30); do mkdir $LONG; cd $LONG; done", env=LONG, check=True)
    with pytest.raises(SandboxError, match=r"1 of its entries could not be copied, such as n") as raised:
        opened.download("d", tmp_path / "copy")
    assert raised.value.code == "incomplete-download"
    assert (tmp_path / "copy/a").exists()


def test_a_folder_is_listed_whatever_times_its_files_have(opened: Sandbox) -> None:
    """A file with a time far in the future does not keep its folder from being listed."""
    opened.shell("mkdir far; touch -d @9300000000 far/a; touch -d @4611686018427387904 /dev/shm/b", check=True)
    assert [one.name for one in opened.files.list("far")] == ["a"]
    assert "b" in [one.name for one in opened.files.list(SHARED_MEMORY)]


def test_a_download_over_the_limit_is_an_error_and_never_cut(opened: Sandbox, tmp_path: Path) -> None:
    """A file over 64 GiB is refused with its size and the limit, nothing is left of it, and the sandbox goes on."""
    opened.shell("truncate -s 70G a", check=True)
    with pytest.raises(SandboxError, match=rf"{70 << 30} bytes.*limit is {64 << 30} bytes .*Split or compress it"):
        opened.download("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert opened.files.stat("a").size == 70 << 30


@pytest.mark.usefixtures("one_slot")
@pytest.mark.parametrize("open_one", [Sandbox, Sandbox.create])
def test_a_sandbox_without_a_slot_says_that_it_waits(
    open_one: Callable[..., Sandbox], caplog: pytest.LogCaptureFixture
) -> None:
    """A log line and `on_progress` say for what `Sandbox()` waits; after `wait_s` an error says how to allow more."""
    said: list[str] = []
    with pytest.raises(
        SandboxError, match=r"1 sandboxes are open.*within 1.5 s.*larger X07_VM_MAX_SANDBOXES"
    ) as raised:
        open_one(wait_s=1.5, on_progress=said.append)
    assert raised.value.code == "no-slot"
    wanted = (
        "waiting until one ends: 1 sandboxes are open, as many as may be (set by X07_VM_MAX_SANDBOXES, or by memory)"
    )
    assert [line for line in said if "waiting" in line] == [wanted]
    logged = [(one.name, one.levelno, one.getMessage()) for one in caplog.records]
    assert logged == [("x07_sandbox", logging.WARNING, f"opening a sandbox: {wanted}")]
    with pytest.raises(SandboxError, match=r"within 0 s"):
        open_one(wait_s=0)


@pytest.mark.usefixtures("one_slot")
def test_the_command_line_says_that_it_waits() -> None:
    """`x07 sandbox create` says for what it waits, also without a terminal, until --queue-timeout."""
    for seconds, waits in ((2, True), (0, False)):
        words = ["create", "--queue-timeout", str(seconds)]
        done = subprocess.run([*SANDBOX, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, "waiting until one ends" in done.stderr) == (125, waits), done
        assert f"within {seconds} s" in done.stderr


@pytest.mark.parametrize("wait_s", [-1, False, "1", float("nan"), None])
def test_a_wrong_wait_is_an_error(wait_s: Any) -> None:  # noqa: ANN401 - all wrong
    """A time to wait for a slot that is no number of seconds from 0 is refused."""
    with pytest.raises(SandboxError, match=r"wait_s is .*, not a number of seconds from 0"):
        Sandbox(wait_s=wait_s)
