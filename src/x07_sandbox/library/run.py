"""Running a program from Python: one call, one result."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

# What carries runs out is imported when there is one: importing this costs next to nothing.
from x07_sandbox.errors import SandboxError
from x07_sandbox.host.threads import start_thread
from x07_sandbox.library.arguments import FILES_BYTES, check_names, input_file, make_request, wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from x07_sandbox.backends.base import Machines
    from x07_sandbox.host.cancel import Cancel
    from x07_sandbox.library.options import RunOptions
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.runs.result import Result

    OnOutput = Callable[[Literal["stdout", "stderr"], bytes], object]
    Ended = tuple[Result, SandboxError | None]

# A program that ends in any other way has been run, whatever became of it.
_NOT_RUN = frozenset({"usage-error", "refused", "backend-error", "internal-error"})
_CHUNK = 64 * 1024


def run_program(  # noqa: PLR0913 - what a run may be given, each by its name
    program: str | os.PathLike[str] | None = None,
    args: Sequence[str] = (),
    *,
    source: str | bytes | None = None,
    toolchain: str | None = None,
    command: Sequence[str] = (),
    workdir: str | os.PathLike[str] | None = None,
    read_only: bool = False,
    files: Mapping[str, bytes] | None = None,
    max_files_bytes: int = FILES_BYTES,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run has it
    policy: str | os.PathLike[str] | Policy | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    memory: str | int | None = None,
    cpu_s: float | None = None,
    procs: int | None = None,
    fds: int | None = None,
    build_timeout_s: float | None = None,
    scale_limits: bool | None = None,
    image: str | None = None,
    max_output_bytes: int | None = None,
    changes: Literal["apply", "all-or-nothing", "keep", "discard"] = "apply",
    out: str | os.PathLike[str] | None = None,
    allow_hidden: bool = False,
    allow_symlinks: bool = False,
    on_output: OnOutput | None = None,
    check: bool = False,
) -> Result:
    """Build and run a program in throw-away virtual machines, and return how it ended.

    program: path of a source file, an executable, or a project's folder. source: a text instead, in the language of
    *toolchain* ("python", "c", ...). command: a command of the image and its arguments instead, as `exec_command` has
    it. files: more files, relative name to content: they lie beside the source and, unless there is a workdir, in the
    program's working folder, which is private and otherwise empty.
    workdir: a folder of yours in whose copy it starts; changes come back unless read_only. `x07 run --workdir` says
    more. Without it `Result.files` has what it left in its working folder, and in /x07/out unless *out* is given:
    max_files_bytes at most. The rest is thrown away, and counted as `Result.files_discarded`.
    args: its arguments, a list of texts. input: its whole input. env: variables beside the fixed ones.
    policy: path of a policy document, `built-in:TEMPLATE`, or a Policy. What is not given (no args, None for input,
    policy, image) is what the manifest of a project says, as for `x07 run`; give a policy for a project that you did
    not write. Without one: no input, the built-in policy `default`, the default image.
    memory, cpu_s, timeout_s, procs, fds: limits in place of the policy's: a size ("1G", or bytes), seconds of CPU time,
    seconds in all, processes and threads beside the first, open files. They may be above those of a built-in policy,
    and only below those of any other. build_timeout_s: seconds for the build, 300 for None.
    scale_limits: whether an emulated machine gets as much more time as it is slower; None leaves it to your settings.
    image: name or digest of a guest image.
    changes: what becomes of its changes to the folders that the policy lets it change, when it has ended by itself;
    `Result.changes` says what it was. "apply" leaves out what may not be done, "all-or-nothing" does nothing then.
    out: a folder for what it writes to /x07/out. allow_hidden, allow_symlinks: let names that begin with a dot, and
    symbolic links, in and out; a policy that you give has to allow it itself.
    max_output_bytes: of each stream, 64 MiB for None. on_output: called with "stdout" or "stderr" and bytes as they
    come, from another thread; what it raises ends the run, and is raised here.

    The result has the program's output as `stdout.data` (bytes) and `stdout.text` (None unless it is UTF-8). The output
    of an X07 program is its frame, which starts with four bytes of length (docs/reference/x07.md).
    A warm machine is taken where `x07 pool` keeps some. Thread-safe; nothing is printed. What a signal's handler raises
    meanwhile, as Ctrl-C does, ends the run, and is raised when its machine is gone.

    Raises SandboxError if the program could not be run: wrong usage, refused, no machine. Its `result` says more; it
    is None where the call itself is wrong, such as an argument of another type, since no run began then.
    A program that was run is a Result however it ended, unless *check*: then SandboxError unless `Result.ok`.
    """
    options = {name: value for name, value in locals().items() if name not in {"program", "args", "check"}}
    from x07_sandbox.host.cancel import Cancel

    with contextlib.closing(Cancel()) as cancel:
        return checked(*_whole(cancel, lambda: run_once(cancel, program, args, **options)), check=check)


def exec_command(
    command: Sequence[str],
    workdir: str | os.PathLike[str] | None = None,
    *,
    read_only: bool = False,
    check: bool = False,
    **options: Any,  # noqa: ANN401 - those of run_program, by name
) -> Result:
    """Run a command of the guest image, such as `["make", "test"]`, in a copy of a folder; return how it ended.

    command: its name, looked up in the image, or with a slash a path from workdir; then its arguments.
    workdir: the folder; changes to it come back as `run_program` has it, unless read_only. None for a private, empty
    one. The rest, what is returned and what is raised are those of `run_program`; nothing is built. A command that the
    image does not have ends as "failed" with exit code 127.
    """
    check_names("exec_command", options, OPTIONS - {"command", "source", "toolchain"})
    return run_program(command=command, workdir=workdir, read_only=read_only, check=check, **options)


def _whole(cancel: Cancel, work: Callable[[], Ended]) -> Ended:
    """Do *work* so that nothing that a signal's handler raises, as Ctrl-C does, can tear it apart: it ends it.

    Handlers run in the main thread, at any line: one in the middle of a start or a stop would leave a machine behind.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    ended: list[Ended | BaseException] = []
    go, waited_for = threading.Event(), False

    def carry_out() -> None:
        go.wait()
        if not waited_for:
            return
        try:
            ended.append(work())
        except BaseException as exc:  # noqa: BLE001 - raised again where it is waited for
            ended.append(exc)

    thread = threading.Thread(target=carry_out, name="x07-call", daemon=True)
    try:
        try:
            start_thread(thread)
        except OSError:  # there may be no more, as whoever needs the next will say
            return work()
        waited_for = True
        go.set()
        thread.join()
    except BaseException:
        cancel()
        go.set()
        while waited_for and thread.is_alive():  # also if it comes again: nothing is left running
            with contextlib.suppress(BaseException):
                thread.join()
        raise
    found = ended.pop()
    if isinstance(found, BaseException):
        raise found
    return found


async def run_program_async(
    program: str | os.PathLike[str] | None = None,
    args: Sequence[str] = (),
    *,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run has it
    check: bool = False,
    **options: Unpack[RunOptions],
) -> Result:
    """As `run_program`, with its options, beside the event loop. Cancelled, it ends the machine, then raises."""
    check_names("run_program_async", options, OPTIONS)
    import asyncio

    from x07_sandbox.host.cancel import Cancel

    loop = asyncio.get_running_loop()
    done: asyncio.Future[Ended] = loop.create_future()
    ended = asyncio.Event()

    def tell(result: Ended | None, exc: BaseException | None) -> None:
        ended.set()
        if done.cancelled():
            return
        if exc is not None:
            done.set_exception(exc)
        elif result is not None:
            done.set_result(result)

    def work() -> None:
        result, problem = None, None
        try:
            result = run_once(cancel, program, args, input=input, **options)
        except BaseException as exc:  # noqa: BLE001 - raised again where it is awaited
            problem = exc
        with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody waits
            loop.call_soon_threadsafe(tell, result, problem)

    with contextlib.closing(Cancel()) as cancel:
        # A thread of its own: runs that wait for a machine must not hold those of the loop's executor.
        threading.Thread(target=work, name="x07-async", daemon=True).start()
        try:
            ended_as = await done
        except asyncio.CancelledError:
            cancel()
            while not ended.is_set():  # also if it is cancelled again: nothing is left running
                with contextlib.suppress(asyncio.CancelledError):
                    await ended.wait()
            raise
    return checked(*ended_as, check=check)


OPTIONS = frozenset(run_program.__kwdefaults__ or ())
"""Names of what `run_program` takes besides program and args."""


def run_once(
    cancel: Cancel,
    program: str | os.PathLike[str] | None,
    args: Sequence[str],
    *,
    machines: Machines | None = None,
    input: bytes | None = None,  # noqa: A002 - as above
    on_output: OnOutput | None = None,
    **options: Any,  # noqa: ANN401 - make_request knows them
) -> Ended:
    """One run, and the error from which its result was made, if it was one.

    machines: warm ones; None for those that `x07 pool` keeps. The rest is as `run_program` has it.
    Raises UsageError for a wrong call, and what *on_output* raises.
    """
    from x07_sandbox.backends.lease import PoolMachines
    from x07_sandbox.backends.selection import choice_of_variables
    from x07_sandbox.housekeeping.start import sweep_before_start
    from x07_sandbox.runs.run import attempt

    choice = choice_of_variables()
    if on_output is not None and not callable(on_output):
        raise wrong("on_output", f"is {type(on_output).__name__}, not a function")
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(_Output(on_output, cancel)) if on_output is not None else None
        live = (None, None) if output is None else output.fds
        request = make_request(
            program,
            args,
            stdin_fd=input_file(input, stack),
            stdin_default=input is None,
            machines=machines or PoolMachines(),
            choice=choice,
            cancel=cancel,
            live=live,
            **options,
        )
        sweep_before_start()
        ended = attempt(request)
    if output is not None and output.problem is not None:
        raise output.problem
    return ended


def load_policy(name: str | os.PathLike[str] | Policy | None = None) -> Policy:
    """The policy at a path, or `built-in:TEMPLATE` (docs/reference/policy.md); None is the built-in `default`.

    It is frozen: `msgspec.structs.replace(policy, limits=...)` makes another, which is checked where it is used, or
    here. Raises SandboxError that tells all that is wrong with a document, each with its place.
    """
    from x07_sandbox.library.arguments import policy_given
    from x07_sandbox.runs.request import read_policy

    return read_policy(policy_given("name", name, "x07_sandbox.load_policy"))[0]


def checked(result: Result, problem: SandboxError | None, *, check: bool) -> Result:
    """The result, if the program was run; with *check* only if it ended well. Raises SandboxError, *problem* if any.

    Its reason, and the error, name the keywords of `run_program` where a command would be told flags.
    """
    if result.outcome != "ok":
        from msgspec.structs import replace

        from x07_sandbox.library.keyword_names import in_python, reword

        result = replace(result, reason=in_python(result.reason)).with_files(result.files)
        if problem is not None:
            reword(problem)
    if result.outcome in _NOT_RUN:
        error = problem or SandboxError("the program could not be run", result.reason, "See the result of this error")
    elif check and not result.ok:
        error = SandboxError(f"the program ended as {result.outcome}", result.reason, "See the result of this error")
    else:
        return result
    error.result = result
    raise error


class _Output:
    """Passes a program's output on to a function, as it comes: two pipes, and a thread that reads them."""

    def __init__(self, on_output: OnOutput, cancel: Cancel) -> None:
        self.problem: BaseException | None = None
        self._on_output = on_output
        self._cancel = cancel
        self._ends = {name: os.pipe2(os.O_CLOEXEC) for name in ("stdout", "stderr")}
        self._threads = [
            threading.Thread(target=self._read, args=(name, ends[0]), name=f"x07-{name}", daemon=True)
            for name, ends in self._ends.items()
        ]

    @property
    def fds(self) -> tuple[int, int]:
        """Where the run writes."""
        return self._ends["stdout"][1], self._ends["stderr"][1]

    def _read(self, name: Literal["stdout", "stderr"], fd: int) -> None:
        while data := os.read(fd, _CHUNK):
            if self.problem is None:
                try:
                    self._on_output(name, data)
                except BaseException as exc:  # noqa: BLE001 - raised again where the caller waits
                    self.problem = exc
                    self._cancel()

    def __enter__(self) -> Self:
        from x07_sandbox.host import close_on_fork

        for fd in self.fds:
            close_on_fork.add(fd)  # a forked child would keep the threads reading
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        from x07_sandbox.host import close_on_fork

        for fd in self.fds:
            close_on_fork.close(fd)
        for thread in self._threads:
            thread.join()
        for read_fd, _ in self._ends.values():
            os.close(read_fd)
