"""Fixtures for agents on this host: private state folders, and a check that each job leaves no remains."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import LASTING_FDS, need, open_fds
from tests.process.conversation import Conversation, Ended, Program
from x07_sandbox import Sandbox
from x07_sandbox.backends.lease import FRONT, pool_dir
from x07_sandbox.backends.process import NoneBackend, OsBackend, start_confined, start_unconfined
from x07_sandbox.errors import HostError
from x07_sandbox.host.processes import has_mark
from x07_sandbox.host.variables import inherited_environment
from x07_sandbox.records.runs import Claim, JobRecord, create_record, new_run_id

if TYPE_CHECKING:
    from x07_sandbox.backends.jailed import StreamInstance

Backend = OsBackend | NoneBackend


@pytest.fixture(scope="session")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Build the agent's code once for all of these tests."""
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def cache(agents: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use that cache for one test; the next on this worker may need the guest image of the usual cache."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(agents))
    return agents


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder for this test's jobs."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("X07_VM_STATE_DIR", str(folder))
    return folder


def claim() -> Claim:
    """Claim a new job."""
    return Claim(run_id=new_run_id(), phase="run", wall_ms=20_000)


def new_record(backend: Backend) -> JobRecord:
    """Return the record of a job before its start."""
    return create_record(claim(), backend=backend.name, image_digest="")


def left(mark: str) -> list[str]:
    """Return the command lines of processes that carry a job's mark."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names are numbers
    found = [pid for pid in pids if has_mark(pid, mark)]
    lines = []
    for pid in found:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"))
    return lines


@contextlib.contextmanager
def started(backend: Backend, deadline_s: int = 60) -> Iterator[StreamInstance]:
    """A started agent; the exit checks that it left no process."""
    record = new_record(backend)
    start = start_confined if backend.name == "os" else start_unconfined
    with start(record, deadline_s) as instance:
        instance.release()
        yield instance
    assert (record.folder / "done").exists()
    assert not left(record.mark)
    # reaped: if the test stopped the job by its record
    assert {path.name for path in record.folder.iterdir()} - {"reaped"} == {"done", "job.json", "owner.json"}


def run_on(backend: Backend, program: Program, on_output: Callable[[Conversation], None] | None = None) -> Ended:
    """Have a whole conversation."""
    with started(backend) as instance:
        return Conversation(instance).run(program, on_output=on_output)


@pytest.fixture(scope="session")
def confined() -> OsBackend:
    """The backend `os`, if this host supports it."""
    backend = OsBackend()
    try:
        backend.probe()
    except HostError as exc:
        need(condition=False, reason=f"{exc.what}: {exc.why}", installable="missing" in exc.why)
    return backend


@pytest.fixture
def unconfined() -> NoneBackend:
    """The backend `none`."""
    return NoneBackend()


@pytest.fixture(params=["os", "none"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each of both backends in turn."""
    return request.getfixturevalue("confined" if request.param == "os" else "unconfined")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def only_os() -> Iterator[None]:
    """Sandboxes are confined processes: what the library promises does not depend on what confines them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_SANDBOX_BACKEND", "os")
        patch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
        yield


@pytest.fixture(scope="module")
def shared(only_os: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """An open sandbox that no test closes."""
    del only_os
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(tmp_path_factory.mktemp("shared") / "state"))
        with Sandbox() as opened:
            yield opened


def wait_until(done: Callable[[], object], within_s: float = 60) -> None:
    """Wait until *done* returns a true value."""
    until = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


PYTHON: Final = Path(sys.executable).with_name("python3")
LAUNCHER: Final = PYTHON.with_name("x07")


@contextlib.contextmanager
def running_front(*code: str, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Start a front, by other *code* if given, after the words *prefix*.

    Check that it and its workers end with its standard input.
    """
    ready_r, ready_w = os.pipe()
    env = inherited_environment() | {"LC_ALL": "C.UTF-8"}
    (pool_dir() / FRONT).unlink(missing_ok=True)
    argv: list[str] = [*prefix, str(PYTHON), "-I", *(code or ("-m", "x07_sandbox.cli.front")), str(ready_w)]
    child = subprocess.Popen(argv, pass_fds=[ready_w], stdin=subprocess.PIPE, env=env)
    os.close(ready_w)
    try:
        assert os.read(ready_r, 1) == b"."
        yield child
    finally:
        os.close(ready_r)
        child.send_signal(signal.SIGCONT)
        child.communicate(timeout=60)
    assert not (pool_dir() / FRONT).exists() or child.returncode


@pytest.fixture
def front() -> Iterator[subprocess.Popen[bytes]]:
    """A front without a pool."""
    with running_front() as child:
        yield child


@pytest.fixture(scope="module")
def front_of_module(agents: Path) -> Iterator[None]:
    """A front for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_CACHE_DIR", str(agents))
        before = open_fds()
        with running_front():
            patch.undo()
            lasting = open_fds().keys() - before.keys()
            LASTING_FDS.update(lasting)
            yield
            LASTING_FDS.difference_update(lasting)
            patch.setenv("X07_VM_CACHE_DIR", str(agents))


@pytest.fixture(params=["alone", "front"])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installed command x07, which carries its commands out itself, or lets a front do so."""
    if request.param == "front":
        request.getfixturevalue("front_of_module")
    monkeypatch.setenv("X07_NO_FRONT", "0" if request.param == "front" else "1")
    return LAUNCHER
