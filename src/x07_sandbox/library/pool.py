"""Many runs from one Python program: an executor whose workers run programs in warm machines."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.threads import start_thread
from x07_sandbox.library.arguments import check_names, wrong
from x07_sandbox.library.run import OPTIONS, checked, run_once

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from x07_sandbox.host.cancel import Cancel
    from x07_sandbox.library.options import RunOptions
    from x07_sandbox.runs.result import Result


class Pool(Executor):
    """Runs programs, as many at once as `x07 run` would, each in a warm machine where one waits, else in a clone.

        with Pool(size=4) as pool:
            future = pool.submit("grade.py", b"input", args=["--strict"])
            results = list(pool.map("grade.py", [b"first input", b"second input"], memory="256M", timeout_s=10))

    A `concurrent.futures.Executor` whose callables are paths of programs, and whose results are `Result`s: also for
    `asyncio.wrap_future(pool.submit(...))`. Thread-safe; a forked child can take nothing. A machine is never used for
    two programs. Leaving the `with` block waits for all runs; by an exception (Ctrl-C) it cancels them. A pool that is
    dropped without `shutdown` keeps its machines until the process ends.
    """

    def __init__(self, size: int = 2, *, image: str | None = None) -> None:
        """size: how many machines wait, warm, beside those that run. image: name or digest; None for the default.

        Raises SandboxError. The machines are made in the background: `wait_ready` waits for them.
        """
        if not isinstance(image, str | None):
            raise wrong("image", f"is {type(image).__name__}, not a text", "x07_sandbox.Pool")
        from x07_sandbox.jobs.admission import max_running  # when there is a pool: importing this costs little
        from x07_sandbox.pool.warm import WarmMachines

        workers = max_running()
        self._machines = WarmMachines(size, image=image)
        self._image = image
        self._machines.start()
        self._workers = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="x07-run")
        self._lock = threading.Lock()
        self._running: set[Cancel] = set()
        self._cancelled = False

    def wait_ready(self, timeout_s: float = settings.QUEUE_S) -> bool:
        """Wait until all machines are warm; whether they are. Raises SandboxError if none can be made."""
        from x07_sandbox.host.clocks import Deadline

        return self._machines.wait_ready(Deadline.after(timeout_s))

    def submit(  # type: ignore[override]  # programs instead of callables is the point
        self,
        program: str | os.PathLike[str] | None = None,
        input: bytes | None = None,  # noqa: A002 - as subprocess.run has it
        *,
        args: Sequence[str] = (),
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> Future[Result]:
        """Run *program* when there is room, with *input* as its whole input; otherwise as `run_program`.

        What `run_program` would raise is raised by the future. Raises SandboxError in a forked child. Cancelling the
        future of a program that runs does not end it (as with any executor): `shutdown(cancel_futures=True)` does.
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
        args: Sequence[str] = (),
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> Iterator[Result]:
        """The results of *program* for each of *inputs*, in order; otherwise as `run_program`.

        timeout: seconds for all of them together, else TimeoutError; `timeout_s` is for each program.
        """
        check_names("map", options, OPTIONS - {"input"})
        self._check_process()
        run = partial(self._run, program, args=args, check=check, **options)
        return self._workers.map(run, inputs, timeout=timeout)

    def _check_process(self) -> None:
        """Raise UsageError in a forked child."""
        if self._machines.in_a_child():
            raise UsageError("cannot use this pool", "it is of the process that this one was forked from", "Make one")

    def _run(
        self,
        program: str | os.PathLike[str] | None,
        data: bytes | None,
        *,
        args: Sequence[str],
        check: bool,
        **options: Any,  # noqa: ANN401 - run_once knows them
    ) -> Result:
        from x07_sandbox.host.cancel import Cancel

        with contextlib.ExitStack() as stack:
            cancel = stack.enter_context(contextlib.closing(Cancel()))
            stack.enter_context(self._cancellable(cancel))
            options = {"image": self._image} | options
            ended = run_once(cancel, program, args, machines=self._machines, input=data, **options)
            return checked(*ended, check=check)

    @contextlib.contextmanager
    def _cancellable(self, cancel: Cancel) -> Iterator[None]:
        with self._lock:
            self._running.add(cancel)
            if self._cancelled:
                cancel()
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(cancel)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as the base has it
        """Take no more programs; end the machines that wait, once all runs have ended.

        cancel_futures: also those that run are cancelled, not only those that wait.
        """
        if self._machines.in_a_child():
            return  # what runs is the parent's
        if cancel_futures:
            with self._lock:
                self._cancelled = True
                for cancel in self._running:
                    cancel()
        self._workers.shutdown(wait=False, cancel_futures=cancel_futures)
        # In a thread of its own, which goes on whatever a signal's handler raises here, as Ctrl-C does.
        ending = threading.Thread(target=self._end, name="x07-pool-end")
        try:
            start_thread(ending)
        except OSError:  # there may be no more
            self._end()
            return
        if wait:
            self._workers.shutdown(wait=True)  # refused to one of them, as with any executor
            ending.join()

    def _end(self) -> None:
        self._workers.shutdown(wait=True)
        self._machines.close()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=kind is not None)
