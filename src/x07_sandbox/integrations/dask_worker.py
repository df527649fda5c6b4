"""The part of the integration of Dask that runs on workers: a pool on each, and the tasks that use it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import Worker, WorkerPlugin, get_worker

from x07_sandbox import Pool, Result, SandboxError
from x07_sandbox.errors import HostError
from x07_sandbox.library.images import prepare_image

if TYPE_CHECKING:
    from concurrent.futures import Future


class Call:
    """A program with its options. Dask looks for keys in lists and texts, but not in objects of this class."""

    def __init__(self, name: str, content: bytes | None, options: dict[str, Any]) -> None:
        self.name = name
        self.content = content  # of the file *name*, if there is one
        self.options = options


class Answer(NamedTuple):
    """How a run ended on a worker, or the error that it raised. host_fault: another worker may do better."""

    worker: str
    result: Result | None
    error: SandboxError | None
    host_fault: bool


class PoolPlugin(WorkerPlugin):
    """Keeps a pool on a worker, and ends runs that Dask no longer wants."""

    def __init__(self, name: str, size: int, image: str) -> None:
        self.name = name
        self._size = size
        self._image = image
        self._pool: Pool | None = None
        self._running: dict[Any, Future[Result]] = {}
        self._lock: threading.Lock | None = None  # made on the worker, since it cannot be pickled

    def setup(self, worker: Worker) -> None:
        """Start the pool, unless an error prevents it, which programs that come here will try again and report."""
        del worker
        self._lock = threading.Lock()
        with contextlib.suppress(SandboxError):
            self.pool()

    async def teardown(self, worker: Worker) -> None:
        """End the pool and its runs."""
        del worker
        if self._pool is not None:
            await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    def transition(self, key: Any, start: Any, finish: Any, **_: Any) -> None:  # noqa: ANN401 - as the base
        """End the VM of a task that was cancelled."""
        if start == "executing" and finish == "released" and key in self._running:
            self._running[key].cancel()

    def pool(self) -> Pool:
        """Return the pool of this worker. Raises SandboxError."""
        assert self._lock is not None  # noqa: S101 - setup was called
        with self._lock:
            if self._pool is None:
                self._pool = Pool(self._size, image=self._image)
            return self._pool

    def run(self, pool: Pool, call: Call, data: bytes | None, key: Any) -> Result:  # noqa: ANN401 - as the base
        """Run a program, and return its result. Raises what `Pool.submit` raises."""
        with tempfile.TemporaryDirectory(prefix="x07-") as folder:
            program = None
            if call.content is not None:
                program = Path(folder, call.name)
                program.write_bytes(call.content)
                program.chmod(0o700)
            future = self._running[key] = pool.submit(program, data, **call.options)
            try:
                return future.result()
            finally:
                del self._running[key]


def run_here(name: str, call: Call, data: bytes | None) -> Answer:
    """Run a program on this worker."""
    worker = get_worker()
    plugin: PoolPlugin = worker.plugins[name]
    try:
        pool = plugin.pool()
    except SandboxError as exc:
        return Answer(worker.address, None, exc, host_fault=True)
    try:
        result, error = plugin.run(pool, call, data, worker.get_current_task()), None
    except SandboxError as exc:
        result, error = exc.result, exc
    except CancelledError:  # by Dask, which then ignores the answer, or because the worker ends
        error = HostError("the program could not be run", "its worker ended", "Submit it again")
        return Answer(worker.address, None, error, host_fault=True)
    return Answer(worker.address, result, error, result is not None and result.fault == "host")


def prepare_here(topic: str, digest: str, pieces: list[tuple[str, bytes]]) -> None:
    """Add the image to the node of this worker, and save VMs there."""
    worker = get_worker()
    host = worker.address.rpartition("/")[2]
    prepare_image(digest, pieces, lambda text: worker.log_event(topic, f"{host}: {text}"))


def wait_ready_here(name: str, timeout_s: float) -> bool:
    """Wait for the VMs of this worker, and return whether they are ready. Raises SandboxError."""
    return bool(get_worker().plugins[name].pool().wait_ready(timeout_s))
