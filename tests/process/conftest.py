"""Fixtures for agents on this host: private state folders, and a check that each job leaves no remains."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import need
from tests.process.conversation import Conversation, Ended, Program
from x07_sandbox.backends.process import NoneBackend, OsBackend, start_confined, start_unconfined
from x07_sandbox.errors import HostError
from x07_sandbox.host.processes import has_mark
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
