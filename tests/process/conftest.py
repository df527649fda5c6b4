"""Agents on this host: a private place for records, and the watch on what is left of each job."""

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
from x07_sandbox.backends.process.backend import NoneBackend, OsBackend
from x07_sandbox.backends.process.start import start_confined, start_unconfined
from x07_sandbox.errors import HostError
from x07_sandbox.host.processes import has_mark
from x07_sandbox.jobs.record import Claim, JobRecord, create_record, new_run_id

if TYPE_CHECKING:
    from x07_sandbox.backends.process.start import ProcessInstance

Backend = OsBackend | NoneBackend
Run = Callable[..., Ended]


@pytest.fixture(scope="session")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The agent's code is made once for all of these tests."""
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def cache(agents: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set for one test at a time: the next on this worker may need the guest image of the usual cache."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(agents))
    return agents


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of this test's jobs."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("X07_VM_STATE_DIR", str(folder))
    return folder


def claim() -> Claim:
    """Of a new job."""
    return Claim(run_id=new_run_id(), phase="run", wall_ms=20_000)


def new_record(backend: Backend) -> JobRecord:
    """A record of a job that is to start."""
    return create_record(claim(), backend=backend.name, image_digest="")


def left(mark: str) -> list[str]:
    """The command lines of processes that carry the mark of a job."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names are numbers
    found = [pid for pid in pids if has_mark(pid, mark)]
    lines = []
    for pid in found:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"))
    return lines


@contextlib.contextmanager
def started(backend: Backend, deadline_s: int = 60) -> Iterator[ProcessInstance]:
    """A started agent; afterwards nothing of it may be left."""
    record = new_record(backend)
    start = start_confined if backend.name == "os" else start_unconfined
    with start(record, deadline_s) as instance:
        instance.release()
        yield instance
    assert (record.folder / "done").exists()
    assert not left(record.mark)
    # reaped: where the test has stopped the job by its record
    assert {path.name for path in record.folder.iterdir()} - {"reaped"} == {"done", "job.json", "owner.json"}


def run_on(backend: Backend, program: Program, on_output: Callable[[Conversation], None] | None = None) -> Ended:
    """A whole conversation."""
    with started(backend) as instance:
        return Conversation(instance).run(program, on_output=on_output)


@pytest.fixture(scope="session")
def confined() -> OsBackend:
    """The backend `os`, where this host can have it."""
    backend = OsBackend()
    try:
        backend.probe()
    except HostError as exc:
        need(condition=False, reason=f"{exc.what}: {exc.why}", installable="missing" in exc.why)
    return backend


@pytest.fixture
def free() -> NoneBackend:
    """The backend `none`."""
    return NoneBackend()


@pytest.fixture(params=["os", "none"])
def either(request: pytest.FixtureRequest) -> Backend:
    """Both, one after the other."""
    return request.getfixturevalue("confined" if request.param == "os" else "free")  # type: ignore[no-any-return]
