"""An executor that runs many programs in VMs that are kept ready."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings, start_thread
from x07_sandbox.library.arguments import bad_argument, check_names
from x07_sandbox.library.run import OPTIONS, check_result, run_once

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.run import RunOptions
    from x07_sandbox.library.sandbox import Sandbox, SandboxOptions
    from x07_sandbox.sessions.result import Result


class _RunFuture(Future[Any]):
    """The future of a run. It can be cancelled until the run has ended. Then the VM ends too."""

    def __init__(self) -> None:
        super().__init__()
        self._in_progress: Cancel | None = None
        self._progress_lock = threading.Lock()

    def cancel(self) -> bool:
        """Cancel the run. Return False if it has ended already."""
        cancelled = super().cancel()
        with self._progress_lock:
            if cancelled and self._in_progress is not None:
                self._in_progress()
        return cancelled

    def carry_out(self, work: Callable[[Cancel], object]) -> None:
        """Do the work, unless it was cancelled. `wait` and `as_completed` learn of a cancellation when the VM is gone.

        The future stays pending meanwhile, because the standard library does not cancel one that is running.
        """
        from x07_sandbox.host.waiting import Cancel

        end: Callable[[], None]
        try:
            with contextlib.closing(Cancel()) as cancel:
                self._set_in_progress(cancel)
                try:
                    end = partial(self.set_result, None if self.cancelled() else work(cancel))
                finally:
                    self._set_in_progress(None)
        except BaseException as exc:  # noqa: BLE001 - raised again by `result`
            end = partial(self.set_exception, exc)
        if self.set_running_or_notify_cancel():
            end()

    def _set_in_progress(self, cancel: Cancel | None) -> None:
        with self._progress_lock:
            self._in_progress = cancel


class _Workers(ThreadPoolExecutor):
    """Threads that carry out runs. A function also gets the argument `cancel`."""

    def __init__(self, count: int) -> None:
        super().__init__(max_workers=count, thread_name_prefix="x07-run")
        self._futures: dict[_RunFuture, None] = {}  # each operation on it is atomic

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401 - as the base
        future = _RunFuture()
        self._futures[future] = None  # first, so that no future misses cancel_all
        future.add_done_callback(lambda _done: self._futures.pop(future, None))
        super().submit(future.carry_out, lambda cancel: function(*args, cancel=cancel, **kwargs))
        return future

    def cancel_all(self) -> None:
        """Cancel all runs."""
        for future in self._futures.copy():
            future.cancel()


class Pool(Executor):
    """Run programs in VMs that are kept ready, as many at the same time as `x07 run` allows.

        with Pool(size=4) as pool:
            future = pool.submit("grade.py", b"input", args=["--strict"])
            inputs = [b"first input", b"second input"]
            results = list(pool.map("grade.py", inputs, memory="256M"))

    This `concurrent.futures.Executor` takes paths of programs instead of callables, and its futures return `Result`s.
    It also works with `asyncio.wrap_future(pool.submit(...))`. It is thread-safe, but a forked child cannot use it.
    Each VM runs only one program. Cancelling a future ends its VM. Leaving the `with` block waits for all runs; leaving
    the block by an exception (Ctrl-C) cancels them. If a pool is dropped without `shutdown`, its VMs stay until the
    process ends.
    """

    def __init__(self, size: int = 2, *, image: str | None = None) -> None:
        """Start the pool. Its VMs start in the background (see `wait_ready`). Raises SandboxError.

        size: number of VMs kept ready, besides those that run a program. image: name or digest; None for the default.
        """
        if not isinstance(image, str | None):
            raise bad_argument("image", f"is {type(image).__name__}, not str", "x07_sandbox.Pool")
        from x07_sandbox.library.warm import WarmMachines
        from x07_sandbox.records.admission import max_running  # imported late: importing this module is cheap

        workers = max_running()
        self._machines = WarmMachines(size, image=image)
        self._image = image
        self._machines.start()
        self._workers = _Workers(workers)

    def wait_ready(self, timeout_s: float = settings.QUEUE_S) -> bool:
        """Wait until all VMs are ready; return False after a timeout. Raises SandboxError if no VM can be started."""
        from x07_sandbox.host.waiting import Deadline

        return self._machines.wait_ready(Deadline.after(timeout_s))

    def submit(  # type: ignore[override]  # programs instead of callables is the point
        self,
        program: str | os.PathLike[str] | None = None,
        input: bytes | None = None,  # noqa: A002 - as subprocess.run has it
        *,
        args: Sequence[str | os.PathLike[str]] = (),
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> Future[Result]:
        """Run *program* with *input* as soon as a VM is free. The options are those of `run_program`.

        The future raises what `run_program` raises; this method raises SandboxError in a forked child. Unlike with
        other executors, `Future.cancel` also works while the program runs: it ends the VM, and returns before the VM
        has ended. `concurrent.futures.wait([future])` returns after that.
        """
        check_names("submit", options, OPTIONS)
        self._check_process()
        return self._workers.submit(self._run, program, input, args=args, check=check, **options)

    def map(  # type: ignore[override]  # as above
        self,
        program: str | os.PathLike[str] | None,
        inputs: Iterable[bytes],
        /,
        *,
        timeout: float | None = None,
        args: Sequence[str | os.PathLike[str]] = (),
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> Iterator[Result]:
        """Return an iterator over the results of *program* for each of *inputs*, in order. Options: see `run_program`.

        timeout: seconds for all runs together, after which the runs are cancelled and TimeoutError is raised.
        `timeout_s` limits each single run.
        """
        check_names("map", options, OPTIONS - {"input"})
        self._check_process()
        run = partial(self._run, program, args=args, check=check, **options)
        return self._workers.map(run, inputs, timeout=timeout)

    def sandbox(self, **options: Unpack[SandboxOptions]) -> Sandbox:
        """Open a sandbox in a waiting VM, if one is ready. The options are those of `Sandbox`. Raises SandboxError.

        One that starts from a snapshot has a VM of its own.
        It may outlive the pool.
        """
        from x07_sandbox.library.sandbox import Sandbox  # most pools run programs

        self._check_process()
        if options.get("snapshot") is None:
            options.setdefault("image", self._image)
        return Sandbox(machines=self._machines, **options)

    def _check_process(self) -> None:
        """Raise UsageError in a forked child."""
        if self._machines.in_forked_child():
            raise UsageError("cannot use this pool", "it belongs to the parent process", "Create a new pool")

    def _run(
        self,
        program: str | os.PathLike[str] | None,
        data: bytes | None,
        *,
        cancel: Cancel,
        args: Sequence[str | os.PathLike[str]],
        check: bool,
        **options: Any,  # noqa: ANN401 - run_once knows them
    ) -> Result:
        options = {"image": self._image} | options
        ended = run_once(cancel, program=program, args=args, machines=self._machines, input=data, **options)
        return check_result(*ended, check=check)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as the base has it
        """Accept no more programs; end the VMs after the last run. cancel_futures: also cancel running programs."""
        if self._machines.in_forked_child():
            return  # the runs belong to the parent
        self._workers.shutdown(wait=False)
        if cancel_futures:
            self._workers.cancel_all()
        # The work is done in a thread, which continues if a signal handler (Ctrl-C) raises an exception here.
        ending = threading.Thread(target=self._end, name="x07-pool-end")
        try:
            start_thread(ending)
        except OSError:  # no more threads allowed
            self._end()
            return
        if wait:
            self._workers.shutdown(wait=True)  # raises in a worker, as with any executor
            ending.join()

    def _end(self) -> None:
        self._workers.shutdown(wait=True)
        self._machines.close()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=kind is not None)
