"""Functions that run a program from Python: one call, one result."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack

# Modules that run programs are imported on the first run, so that importing this one is cheap.
from x07_sandbox.errors import ArgumentError, SandboxError
from x07_sandbox.host import start_thread
from x07_sandbox.host.settings import FILES_BYTES
from x07_sandbox.library.arguments import bad_argument, check_names, check_one_program, checked_options, loaders_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from x07_sandbox.backends.base import MachineSource
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.sessions.result import Result

    OnOutput = Callable[[Literal["stdout", "stderr"], bytes], object]
    Ended = tuple[Result, SandboxError | None]

_T = TypeVar("_T")
# Outcomes of runs in which the program did not start.
_NOT_RUN = frozenset({"usage-error", "refused", "backend-error", "internal-error"})
_CHUNK = 64 * 1024


class CommandOptions(TypedDict, total=False):
    """The keyword arguments that `run_program` and `exec_command` share, except args, input, read_only and check."""

    files: Mapping[str, str | bytes] | Mapping[Path, str | bytes] | None
    max_files_bytes: int
    policy: str | os.PathLike[str] | Policy | None
    env: Mapping[str, str] | None
    timeout_s: float | None
    memory: str | int | None
    cpu_s: float | None
    procs: int | None
    fds: int | None
    max_file_size: str | int | None
    build_timeout_s: float | None
    scale_limits: bool | None
    image: str | None
    ca: str | os.PathLike[str] | None
    max_output_bytes: int | None
    changes: Literal["apply", "all-or-nothing", "keep", "discard"]
    out: str | os.PathLike[str] | None
    allow_hosts: Sequence[str]
    deny_hosts: Sequence[str]
    read_roots: Sequence[str | os.PathLike[str]]
    write_roots: Sequence[str | os.PathLike[str]]
    allow_hidden: bool
    allow_symlinks: bool
    hide: Sequence[str]
    reveal: Sequence[str]
    guest_root: bool
    git: bool
    on_output: Callable[[Literal["stdout", "stderr"], bytes], object] | None


class RunOptions(CommandOptions, total=False):
    """All keyword arguments of `run_program` except program, args, input and check."""

    source: str | bytes | None
    toolchain: str | None
    command: Sequence[str | os.PathLike[str]]
    workdir: str | os.PathLike[str] | None
    read_only: bool


def run_program(  # noqa: PLR0913 - each is a keyword
    program: str | os.PathLike[str] | None = None,
    args: Sequence[str | os.PathLike[str]] = (),
    *,
    source: str | bytes | None = None,
    toolchain: str | None = None,
    command: Sequence[str | os.PathLike[str]] = (),
    workdir: str | os.PathLike[str] | None = None,
    read_only: bool = False,
    files: Mapping[str, str | bytes] | Mapping[Path, str | bytes] | None = None,
    max_files_bytes: int = FILES_BYTES,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run has it
    policy: str | os.PathLike[str] | Policy | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    memory: str | int | None = None,
    cpu_s: float | None = None,
    procs: int | None = None,
    fds: int | None = None,
    max_file_size: str | int | None = None,
    build_timeout_s: float | None = None,
    scale_limits: bool | None = None,
    image: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    max_output_bytes: int | None = None,
    changes: Literal["apply", "all-or-nothing", "keep", "discard"] = "apply",
    out: str | os.PathLike[str] | None = None,
    allow_hosts: Sequence[str] = (),
    deny_hosts: Sequence[str] = (),
    read_roots: Sequence[str | os.PathLike[str]] = (),
    write_roots: Sequence[str | os.PathLike[str]] = (),
    allow_hidden: bool = False,
    allow_symlinks: bool = False,
    hide: Sequence[str] = (),
    reveal: Sequence[str] = (),
    guest_root: bool = False,
    git: bool = False,
    on_output: OnOutput | None = None,
    check: bool = False,
) -> Result:
    """Build and run a program in throw-away VMs and return its result.

    program: path of a source file, an executable or a project folder.
    source: source text to run instead of a program. *toolchain* is its language ("python", "c", ...).
    command: a command installed in the image, with its arguments, to run instead of a program (see `exec_command`).
    files: more files, by relative name, as bytes or as text for UTF-8. They are placed beside the source and, without
    workdir, in the program's working folder, which is otherwise empty. At most 10,000 files of 64 MiB together. Larger
    files reach the program in a folder that *workdir* or *read_roots* names.
    workdir: the program starts in a copy of this folder. Changes are copied back unless read_only. Without workdir,
    `Result.files` contains the files that the program left in its working folder and, without *out*, in /x07/out: at
    most max_files_bytes. Other files are discarded and counted in `Result.files_discarded`.
    args: the program's arguments. input: the program's whole standard input. env: additional environment variables.
    policy: path of a policy, `built-in:TEMPLATE`, or a Policy. If args, input, policy or image are not given, the
    values in the project's manifest apply, as for `x07 run`. Pass a policy for a project that you did not write.
    Without a manifest, there is no input, the policy is the built-in `default`, and the image is the default image.
    memory, cpu_s, timeout_s, procs, fds: limits that replace those of the policy: a size ("1G", or bytes), seconds of
    CPU time, seconds of wall time, further processes and threads, open files. max_file_size: the size of the largest
    file to copy, into the VM or back. They may raise the limits of a built-in policy, but only lower those of others.
    build_timeout_s: time limit of the build, 300 s by default.
    scale_limits: whether to multiply time limits by the slowdown of emulation; None follows your settings.
    image: name or digest of a guest image. ca: a PEM file with certificates that the program trusts too.
    changes: what to do with the program's changes to writable folders. "apply" applies the allowed changes and leaves
    out the others; "all-or-nothing" applies no change unless all are allowed. "keep" saves
    the changes for `x07 apply`, and "discard" deletes them. `Result.changes` describes what was done.
    out: a folder to which /x07/out is copied.
    allow_hosts, deny_hosts: connections that the policy also allows or denies, such as "example.org:443".
    read_roots, write_roots: files and folders of the host that the program may also read, or read and modify.
    hide: patterns of names that are not copied into the VM, such as ``*.csv``.
    reveal: patterns of names that are copied although they look like secrets, such as ``.env``.
    allow_hidden, allow_symlinks: whether to copy names that begin with a dot, and symbolic links, in and out. If you
    pass a policy, set this in the policy instead.
    guest_root: whether the program is root in the VM, with a writable copy of its system, so that it can install
    packages. Builds, the rules for folders and the network stay the same.
    git: give the program a fresh `.git` with the history of the repository *workdir*. When changes are applied, its
    commits go to ``refs/x07/RUN/BRANCH`` in the repository; no branch, index or HEAD changes.
    max_output_bytes: limit for each output stream, 64 MiB by default.
    on_output: a function that is called from another thread with "stdout" or "stderr" and bytes as they arrive. If it
    raises an exception, the run ends and this call raises the exception.

    The result has the output as `stdout.data` (bytes) and `stdout.text` (None unless it is UTF-8). The output of an X07
    program is a frame, which starts with four bytes of length (docs/reference/x07.md).
    A VM of `x07 pool` is used if one is ready. This function is thread-safe and prints nothing. If a signal handler
    raises an exception (Ctrl-C), the run ends, and the exception is raised after the VM has ended.

    Raises SandboxError if the program could not be run: wrong usage, refused, no VM. The error's `result` has the
    details, or is None if the call itself is wrong. With *check*, also raises SandboxError unless `Result.ok`.
    """
    options = {name: value for name, value in locals().items() if name != "check"}
    from x07_sandbox.host.waiting import Cancel

    with contextlib.closing(Cancel()) as cancel:
        return check_result(*run_uninterrupted(cancel, lambda: run_once(cancel, **options)), check=check)


def exec_command(
    command: Sequence[str | os.PathLike[str]],
    workdir: str | os.PathLike[str] | None = None,
    *,
    read_only: bool = False,
    input: bytes | None = None,  # noqa: A002 - as above
    check: bool = False,
    **options: Unpack[CommandOptions],
) -> Result:
    """Run a command installed in the guest image, such as `["make", "test"]`, in a copy of a folder; return its result.

    A command with a slash is a path relative to workdir; any other command is looked up in the image. If there is no
    such command, the outcome is "failed" with exit code 127.
    workdir: the folder; changes are copied back unless read_only. None stands for an empty folder.
    All other arguments are those of `run_program`.
    """
    _check_command("exec_command", command, options)
    return run_program(command=command, workdir=workdir, read_only=read_only, input=input, check=check, **options)


async def exec_command_async(
    command: Sequence[str | os.PathLike[str]],
    workdir: str | os.PathLike[str] | None = None,
    *,
    read_only: bool = False,
    input: bytes | None = None,  # noqa: A002 - as above
    check: bool = False,
    **options: Unpack[CommandOptions],
) -> Result:
    """Run a command like `exec_command`, without blocking the event loop. A cancelled call first ends the VM."""
    _check_command("exec_command_async", command, options)
    return await run_program_async(
        command=command, workdir=workdir, read_only=read_only, input=input, check=check, **options
    )


def _check_command(function: str, command: Sequence[str | os.PathLike[str]], options: Iterable[str]) -> None:
    check_names(function, options, OPTIONS - {"command", "source", "toolchain"})
    if isinstance(command, str | bytes) or not command:
        fix = 'Pass a list of str, such as ["make", "test"]'
        raise ArgumentError("cannot run a command", "command is not a list with at least one word", fix)


def run_uninterrupted(cancel: Callable[[], object], work: Callable[[], _T]) -> _T:
    """Call *work* in a thread. If a signal handler raises an exception (Ctrl-C), call *cancel* and wait for its end.

    Handlers may interrupt the main thread at any line. In code that starts or stops a VM, that would leave the VM
    behind.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    ended: list[_T | BaseException] = []
    go, is_awaited = threading.Event(), False

    def carry_out() -> None:
        go.wait()
        if not is_awaited:
            return
        try:
            ended.append(work())
        except BaseException as exc:  # noqa: BLE001 - raised again in the main thread
            ended.append(exc)

    thread = threading.Thread(target=carry_out, name="x07-call", daemon=True)
    try:
        try:
            start_thread(thread)
        except OSError:  # no more threads allowed
            return work()
        is_awaited = True
        go.set()
        thread.join()
    except BaseException:
        cancel()
        go.set()
        while is_awaited and thread.is_alive():  # also after a second Ctrl-C
            with contextlib.suppress(BaseException):
                thread.join()
        raise
    found = ended.pop()
    if isinstance(found, BaseException):
        raise found
    return found


async def run_program_async(
    program: str | os.PathLike[str] | None = None,
    args: Sequence[str | os.PathLike[str]] = (),
    *,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run has it
    check: bool = False,
    **options: Unpack[RunOptions],
) -> Result:
    """Run a program like `run_program`, without blocking the event loop. A cancelled call first ends the VM."""
    check_names("run_program_async", options, OPTIONS)
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.awaited import in_thread

    with contextlib.closing(Cancel()) as cancel:
        ended_as = await in_thread(lambda: run_once(cancel, program=program, args=args, input=input, **options), cancel)
    return check_result(*ended_as, check=check)


OPTIONS = frozenset(run_program.__kwdefaults__ or ())
"""The keywords of `run_program` besides program and args."""


_DEFAULTS = {"program": None, "args": (), **(run_program.__kwdefaults__ or {})}


def run_once(
    cancel: Cancel,
    *,
    machines: MachineSource | None = None,
    input: bytes | None = None,  # noqa: A002 - as above
    on_output: OnOutput | None = None,
    **options: Any,  # noqa: ANN401 - checked by checked_options
) -> Ended:
    """Run a program once. Return the result, and the error that caused the result, if any.

    Arguments: see `run_program`. machines: the source of ready VMs; None for the VMs of `x07 pool`. Raises UsageError,
    and any exception that *on_output* raises.
    """
    from x07_sandbox.backends.registry import choice_from_environment
    from x07_sandbox.options import keyword
    from x07_sandbox.sessions.request import RunCaller, make_request
    from x07_sandbox.sessions.run import carry_out, pool_machines, retain_records
    from x07_sandbox.sessions.transfers import memory_file

    choice = choice_from_environment()
    if on_output is not None and not callable(on_output):
        raise bad_argument("on_output", f"is {type(on_output).__name__}, not a function")
    if not isinstance(input, bytes | bytearray | memoryview | None):
        raise bad_argument("input", f"is {type(input).__name__}, not bytes")
    given = {name: value for name, value in options.items() if value is not _DEFAULTS[name]}
    check_one_program(given)
    request = make_request(
        checked_options(given),
        input=None if input is None else bytes(input),
        max_files_bytes=given.get("max_files_bytes", FILES_BYTES),
    )
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(_Output(on_output, cancel)) if on_output is not None else None
        live = (None, None) if output is None else output.fds
        caller = RunCaller(
            cancel=cancel,
            choice=choice,
            loaders=loaders_for(request.program),
            machines=machines or pool_machines(),
            stdin_fd=memory_file(b"", stack),
            live_stdout=live[0],
            live_stderr=live[1],
            word=keyword,
        )
        ended = carry_out(request, caller)
    retain_records()
    if output is not None and output.problem is not None:
        raise output.problem
    return ended


def load_policy(name: str | os.PathLike[str] | Policy | None = None) -> Policy:
    """Return the policy at a path, or a built-in policy: `built-in:TEMPLATE` (docs/reference/policy.md).

    None stands for `built-in:default`. Policies are frozen: `msgspec.structs.replace(policy, limits=...)` returns a
    changed copy, which is checked when it is used. Raises SandboxError with all errors in the document.
    """
    from x07_sandbox.library.arguments import policy_argument
    from x07_sandbox.sessions.request import read_policy

    return read_policy(policy_argument("name", name, "x07_sandbox.load_policy"))[0]


def check_result(result: Result, problem: SandboxError | None, *, check: bool) -> Result:
    """Return the result, or raise SandboxError if the program was not run or, with *check*, if it failed.

    problem: the error to raise, if any.
    """
    if result.outcome in _NOT_RUN:
        error = problem or SandboxError("the program could not be run", result.reason, "See the result of this error")
    elif check and not result.ok:
        error = SandboxError(f"the program ended as {result.outcome}", result.reason, "See the result of this error")
    else:
        return result
    error.result = result
    raise error


class _Output:
    """Passes a program's output to a function as the output arrives. Each stream has a pipe and a thread."""

    def __init__(self, on_output: OnOutput, cancel: Cancel) -> None:
        self.problem: BaseException | None = None
        self._on_output = on_output
        self._cancel = cancel
        self._ends = {name: os.pipe() for name in ("stdout", "stderr")}
        self._threads = [
            threading.Thread(target=self._read, args=(name, ends[0]), name=f"x07-{name}", daemon=True)
            for name, ends in self._ends.items()
        ]

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors to which the run writes the program's standard output and standard error."""
        return self._ends["stdout"][1], self._ends["stderr"][1]

    def _read(self, name: Literal["stdout", "stderr"], fd: int) -> None:
        while data := os.read(fd, _CHUNK):
            if self.problem is None:
                try:
                    self._on_output(name, data)
                except BaseException as exc:  # noqa: BLE001 - raised again in the caller's thread
                    self.problem = exc
                    self._cancel()

    def __enter__(self) -> Self:
        from x07_sandbox.host.processes import close_on_fork

        for fd in self.fds:
            close_on_fork.add(fd)  # a forked child would keep the threads reading
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        from x07_sandbox.host.processes import close_on_fork

        for fd in self.fds:
            close_on_fork.close(fd)
        for thread in self._threads:
            thread.join()
        for read_fd, _ in self._ends.values():
            os.close(read_fd)
