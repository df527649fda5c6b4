"""Dask: a pool whose programs run on the workers of a cluster.

Dask decides where and when a program runs, and moves the programs of a lost worker. Each worker keeps a `Pool`: the
second part of this module runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import threading
import uuid
from concurrent.futures import CancelledError, Executor, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Unpack

from distributed import Client, KilledWorker, Worker, WorkerPlugin, get_worker

from x07_sandbox import Pool, Result, SandboxError, load_policy
from x07_sandbox.errors import HostError, UsageError, printable
from x07_sandbox.library.arguments import check_names
from x07_sandbox.library.images import image_digest, image_pieces, image_store, prepare_image
from x07_sandbox.library.run import OPTIONS

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from distributed import Future as Task

    from x07_sandbox.library.run import RunOptions

RESOURCE: Final = "X07"
"""The resource of Dask of which each running program takes 1: start workers with --resources X07=2."""
_TRIES: Final = 3
_OF_NODES: Final = frozenset({"on_output", "out", "workdir", "write_roots"})
_WAIT_S: Final = 600.0


class ClusterPool(Executor):
    """Run programs on the workers of a Dask cluster, with the methods of `Pool`.

        with ClusterPool(Client("scheduler:8786")) as pool:
            results = list(pool.map("grade.py", [b"first input", b"second input"], timeout_s=10))

    A run that fails by a fault of its host is repeated on other workers, at most twice. Dask repeats the runs of a lost
    worker. A program may so run twice, but has one result. Cancelling a future ends its VM.
    """

    def __init__(
        self,
        client: Client,
        size: int = 2,
        *,
        image: str | None = None,
        progress: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Copy the image to each node that lacks it, save VMs there, and start a pool on each worker.

        size, image: see `Pool`; the image is one of this computer. progress: called with lines of text. Raises
        SandboxError.
        """
        if client.asynchronous:
            fix = "Use Client(...), and asyncio.wrap_future(pool.submit(...))"
            raise UsageError("cannot use this client", "it is asynchronous", fix)
        self._client = client
        self._progress = progress
        self._digest = image_digest(image)
        self._futures: dict[_ClusterFuture, None] = {}  # each operation on it is atomic
        self._numbers = itertools.count()
        self._closed = False
        self._plugin = f"x07-{uuid.uuid4().hex}"
        self._prepare_nodes()
        client.register_plugin(PoolPlugin(self._plugin, size, self._digest))

    def wait_ready(self, timeout_s: float = _WAIT_S) -> bool:
        """Wait until all VMs of all workers are ready; return False after a timeout. Raises SandboxError.

        Call it again after nodes have joined: it copies the image to those that lack it.
        """
        self._prepare_nodes()
        waiting = [self._on(worker, wait_ready_here, self._plugin, timeout_s) for worker in self._workers()]
        return all(self._client.gather(waiting))

    def submit(  # type: ignore[override]  # as Pool
        self,
        program: str | os.PathLike[str] | None = None,
        input: bytes | None = None,  # noqa: A002 - as Pool
        *,
        args: Sequence[str] = (),
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> Future[Result]:
        """Run *program*, a file of this computer, with *input* on some worker. The options are those of `Pool.submit`.

        Other paths are those of the node. Options that write to its files, or call a function, raise SandboxError.
        """
        return self._start(self._call(program, args, check=check, **options), input)

    def map(  # type: ignore[override]  # as Pool
        self,
        program: str | os.PathLike[str] | None,
        inputs: Iterable[bytes],
        /,
        *,
        timeout: float | None = None,
        args: Sequence[str] = (),
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> Iterator[Result]:
        """Return an iterator over the results of *program* for each of *inputs*, in order, as `Pool.map` does."""
        call = self._call(program, args, check=check, **options)
        return _Starter(self._start).map(call, inputs, timeout=timeout)  # type: ignore[arg-type]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as the base
        """Accept no more programs; end the pools after the last run. cancel_futures: also cancel running programs."""
        if self._closed:
            return
        self._closed = True
        if cancel_futures:
            for future in self._futures.copy():
                future.cancel()
        ending = threading.Thread(target=self._end, name="x07-cluster-end")
        ending.start()
        if wait:
            ending.join()

    def _end(self) -> None:
        wait(self._futures.copy())
        self._client.unregister_worker_plugin(self._plugin)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def _call(
        self,
        program: str | os.PathLike[str] | None,
        args: Sequence[str],
        *,
        check: bool,
        **options: Any,  # noqa: ANN401 - Pool.submit checks them
    ) -> Call:
        check_names("submit", options, OPTIONS)
        if refused := sorted(_OF_NODES & options.keys()):
            why = f"{refused[0]} concerns files or functions of this computer"
            raise UsageError("cannot run this on a cluster", why, "Use files and Result.files")
        if callable(program):
            raise UsageError("cannot run a function", "a pool runs programs", "Pass the path of a program")
        if options.get("policy") is not None:
            options["policy"] = load_policy(options["policy"])
        options |= {"args": args, "check": check}
        if program is None:
            return Call("", None, options)
        try:
            return Call(Path(program).name, Path(program).read_bytes(), options)
        except OSError as exc:
            why = exc.strerror or str(exc)
            raise UsageError(f"cannot read {program}", why, "Pass one file, and others by files=") from exc

    def _start(self, call: Call, data: bytes | None) -> Future[Result]:
        if self._closed:
            raise RuntimeError("cannot submit programs after shutdown")
        number = next(self._numbers)
        future = _ClusterFuture(lambda avoided: self._task(call, data, avoided, number))
        self._futures[future] = None
        future.add_done_callback(lambda _done: self._futures.pop(future, None))
        future.start()
        return future

    def _task(self, call: Call, data: bytes | None, avoided: set[str], number: int) -> Task:
        others = self._workers() - avoided if avoided else set()
        return self._client.submit(
            run_here,
            self._plugin,
            call,
            data,
            key=f"x07-run-{uuid.uuid4().hex}",
            pure=False,
            resources={RESOURCE: 1},
            priority=-number,  # first come, first served
            workers=list(others) or None,
            allow_other_workers=bool(others),
        )

    def _on(self, worker: str, function: Callable[..., Any], *args: Any) -> Task:  # noqa: ANN401 - those of the function
        return self._client.submit(function, *args, workers=[worker], key=f"x07-{uuid.uuid4().hex}", pure=False)

    def _workers(self) -> set[str]:
        """Return the addresses of the workers that have the resource. Raises SandboxError if there is none."""
        known = self._client.scheduler_info()["workers"]
        workers = {address for address, about in known.items() if about["resources"].get(RESOURCE)}
        if not workers:
            why = f"none of its {len(known)} workers has the resource {RESOURCE}"
            fix = f'Start workers with --resources "{RESOURCE}=2", and call client.wait_for_workers(1)'
            raise UsageError("cannot use this cluster", why, fix)
        return workers

    def _prepare_nodes(self) -> None:
        """On one worker of each node, add the image if it is missing, and save VMs."""
        workers = self._workers()
        stores = self._client.run(image_store, self._digest, workers=list(workers))
        node_of = {store: worker for worker, (store, _has) in stores.items()}
        having = {store for store, has in stores.values() if has}
        lacking = [worker for store, worker in node_of.items() if store not in having]
        pieces: list[tuple[str, Task]] = []
        if lacking:
            self._progress(f"copying the image {self._digest} to {', '.join(lacking)}")
            names, contents = zip(*image_pieces(self._digest), strict=True)
            placed = self._client.scatter(list(contents), workers=lacking, broadcast=True)
            pieces = list(zip(names, placed, strict=True))
        topic = f"{self._plugin}-progress"
        self._client.subscribe_topic(topic, lambda event: self._progress(printable(event[1])))
        try:
            preparing = [
                self._on(worker, prepare_here, topic, self._digest, pieces if worker in lacking else [])
                for worker in node_of.values()
            ]
            self._client.gather(preparing)
        finally:
            self._client.unsubscribe_topic(topic)


class _Starter(Executor):
    """An executor whose `map` starts runs. It takes a call instead of a function."""

    def __init__(self, start: Callable[..., Future[Result]]) -> None:
        self.submit = start  # type: ignore[assignment, method-assign]


class _ClusterFuture(Future[Result]):
    """The future of a run on a cluster. It stays pending until its end, so that it can be cancelled."""

    def __init__(self, new_task: Callable[[set[str]], Task]) -> None:
        super().__init__()
        self._new_task = new_task
        self._avoided: set[str] = set()
        self._tries = 0
        self._task: Task | None = None

    def start(self) -> None:
        """Hand the run to Dask."""
        self._task = self._new_task(self._avoided)
        self._task.add_done_callback(self._finish)
        if self.cancelled():
            self.cancel()

    def cancel(self) -> bool:
        """Cancel the run. Return False if it has ended already."""
        cancelled = super().cancel()
        if cancelled and self._task is not None:
            self._task.cancel(force=True)
        return cancelled

    def _finish(self, task: Task) -> None:
        result: Any = None
        problem: BaseException | None = None
        try:
            answer = task.result()
            self._tries += 1
            self._avoided.add(answer.worker)
            if answer.host_fault and self._tries < _TRIES and not self.cancelled():
                self.start()
                return
            result, problem = answer.result, answer.error
        except KilledWorker as exc:
            fix = "See the logs of the workers, and raise their memory limit if it was exceeded"
            problem = HostError("the program could not be run", str(exc), fix)
        except BaseException as exc:  # noqa: BLE001 - raised again by `result`
            problem = exc
        if self.set_running_or_notify_cancel():
            self.set_result(result) if problem is None else self.set_exception(problem)


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
        assert self._lock is not None  # setup was called
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
