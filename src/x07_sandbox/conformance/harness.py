"""The test bench for behaviours: runs small programs on one backend, in this process or in another one.

As a program, it carries out one long run, so that a check can stop the run by its record or kill the process:
`python -m x07_sandbox.conformance.harness BACKEND CODE [ARGUMENTS]`. It prints the program's output, then a line with
the outcome and the reason.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from msgspec.structs import replace

from x07_sandbox.backends.registry import Choice, create
from x07_sandbox.errors import printable
from x07_sandbox.host import settings
from x07_sandbox.host.paths import state_dir
from x07_sandbox.host.processes import has_mark
from x07_sandbox.host.variables import inherited_environment
from x07_sandbox.host.waiting import Cancel, wait_readable
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import OpenImage, open_image
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.model import Policy
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.records.stopping import live_records
from x07_sandbox.sessions.prepare import current_image
from x07_sandbox.sessions.request import RunCaller, RunRequest
from x07_sandbox.sessions.run import attempt
from x07_sandbox.sessions.transfers import OutFile, memory_file

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Backend
    from x07_sandbox.records.runs import JobRecord
    from x07_sandbox.sessions.result import Result

_T = TypeVar("_T")
Facts = dict[str, Any]
# The only program that is built. The first argument is the code of a check, so all runs share one artifact.
LAUNCHER: Final = b"""import json, os, signal, sys, time
def tried(act, *words):
    try: return act(*words)
    except (OSError, RuntimeError): return None
exec(sys.argv[1])
"""
RUNNER: Final = (sys.executable, "-I", "-m", "x07_sandbox.conformance.harness")
ANSWER_S: Final = 60.0  # timeout for what takes well under a second on an idle host
_POLL_S: Final = 0.02
_LINE_MAX: Final = 4096


class BrokenError(Exception):
    """A backend does not have a behaviour. The message says what was expected and what was found."""


def expect(what: str, expected: object, found: object) -> None:
    """Raise BrokenError unless both values are equal."""
    if found != expected:
        raise BrokenError(f"{what}: expected {str(expected)[:300]}, got {str(found)[:300]}")


def fact(observe: Callable[[Bench], Facts], name: str, expected: object = True) -> Callable[[Bench], None]:  # noqa: FBT002 - of any type
    """Return a check of one fact that *observe* returns."""
    return lambda bench: expect(name, expected, bench.cached(observe)[name])


def policy_with(*, limits: Mapping[str, Any] | None = None, **sections: Mapping[str, Any]) -> Policy:
    """Return the built-in policy with small limits, changed by *limits* and the values of other sections."""
    policy = default_policy()
    small = {"wall_ms": 60_000, "cpu_ms": 60_000, "mem_bytes": 256 * settings.MIB}
    changed = {"limits": small | dict(limits or {})} | sections
    return replace(policy, **{name: replace(getattr(policy, name), **fields) for name, fields in changed.items()})


def request(*args: str, **fields: Any) -> RunRequest:  # noqa: ANN401 - fields of a request
    """Return a request to run LAUNCHER with *args*, the first of which is Python code to execute."""
    fields.setdefault("source", LAUNCHER)
    fields.setdefault("policy", policy_with())
    return RunRequest(toolchain="python", args=args, **fields)


def caller(backend: str, cancel: Cancel, **fields: Any) -> RunCaller:  # noqa: ANN401 - fields of a caller
    """Return the caller of a run on *backend*."""
    return RunCaller(cancel=cancel, choice=Choice(backend=backend), **fields)


class Running(NamedTuple):
    """A running program. line: returns the next line of output. cancel: ends the run. result: waits for the result."""

    stdin: Any
    line: Callable[[], str]
    cancel: Cancel
    result: Callable[[], Result]


class Bench:
    """A backend under test, made by `open_bench`. artifact, build: the built LAUNCHER and the result of building it.

    image: None if the backend uses no image. runner: the command that carries out a run in another process.
    """

    def __init__(
        self, name: str, folder: Path, image: OpenImage | None, artifact: OutFile, runner: Sequence[str]
    ) -> None:
        self.backend = create(name)
        self.folder = folder
        self.image = image
        self.image_digest = "" if image is None else image.manifest.digest
        self.features = self.backend.probe(image).features
        self.artifact = artifact
        self._runner = runner
        self._made: dict[object, object] = {}
        self.build = self.run("", cache=False)

    def cached(self, make: Callable[[Bench], _T]) -> _T:
        """Return the value of make(self). *make* is called only once, so that several checks share one run."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]  # type: ignore[return-value]

    def run(self, code: str, *args: str, stdin: bytes | None = None, **fields: Any) -> Result:  # noqa: ANN401 - fields of a request
        """Run the Python code *code* on the backend and return the result."""
        with contextlib.ExitStack() as stack:
            cancel = stack.enter_context(contextlib.closing(Cancel()))
            by = caller(self.backend.name, cancel, artifact=fields.pop("artifact", self.artifact))
            return attempt(request(code, *args, input=stdin, **fields), by)[0]

    def output(self, code: str, *args: str, **fields: Any) -> str:  # noqa: ANN401 - as above
        """Run *code* and return its standard output. Raises BrokenError if the program does not succeed."""
        result = self.run(code, *args, **fields)
        said = result.stderr.data[-200:].decode(errors="replace")
        expect("outcome of a program", "ok", "ok" if result.ok else f"{result.outcome}: {result.reason}; {said}")
        return result.stdout.data.decode(errors="replace")

    @contextlib.contextmanager
    def running(self, code: str, *args: str) -> Iterator[Running]:
        """Run *code* during the context, so that the caller can communicate with it. Cancel the run on exit."""
        with contextlib.ExitStack() as stack:
            cancel = stack.enter_context(contextlib.closing(Cancel()))
            input_fd, near_fd = os.pipe()
            stack.callback(os.close, input_fd)
            near = stack.enter_context(os.fdopen(near_fd, "wb", buffering=0))
            output_fd, far_fd = os.pipe()
            stack.callback(os.close, output_fd)
            stack.callback(os.close, far_fd)
            pool = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(cancel)  # called first, so that closing the pool does not block
            fields = {"stdin_fd": input_fd, "live_stdout": far_fd, "artifact": self.artifact}
            ended = pool.submit(attempt, request(code, *args), caller(self.backend.name, cancel, **fields))
            yield Running(near, partial(read_line, output_fd), cancel, lambda: ended.result(ANSWER_S)[0])

    @contextlib.contextmanager
    def in_process(
        self, code: str, *args: str, env: Mapping[str, str] | None = None
    ) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
        """Run *code* from another process (`main`). Yield that process and a reader of its output lines."""
        argv = [*self._runner, self.backend.name, code, *args]
        environment = {**inherited_environment(), **(env or {})}
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as runner:
            assert runner.stdout is not None
            try:
                yield runner, partial(read_line, runner.stdout.fileno())
            finally:
                runner.kill()

    def expect_refused(self, reason: str, env: Mapping[str, str]) -> None:
        """Raise BrokenError unless a run with the variables *env* is refused for *reason* before anything starts."""
        with self.in_process("print('it ran')", env=env) as (runner, line):
            outcome, _, said = line().partition(":")
            expect(f"outcome ({said}), and whether the reason is right", ("refused", True), (outcome, reason in said))
            expect("jobs", [], [path.name for path in state_dir().glob(f"*-{runner.pid}-*-*")])

    def owned_by(self, pid: int) -> list[JobRecord]:
        """Return the live jobs of the backend that the process *pid* started."""
        return [record for record in live_records(self.backend.name) if record.run_id.split("-")[1] == str(pid)]


def read_line(fd: int) -> str:
    """Return one line from a pipe. Raises BrokenError after a timeout or at the end of the stream."""
    line = b""
    deadline = time.monotonic() + ANSWER_S
    while not line.endswith(b"\n") and len(line) < _LINE_MAX:
        if not wait_readable(fd, deadline - time.monotonic()):
            raise BrokenError(f"expected a line of output, got none in {ANSWER_S:.0f} s")
        if not (byte := os.read(fd, 1)):
            raise BrokenError("expected a line of output, got the end of the stream")
        line += byte
    return line.decode(errors="replace").strip()


def remaining(*marks: str) -> list[int]:
    """Wait until no process has one of *marks* among its arguments. Return the processes that do after a timeout."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
        found = [pid for pid in pids if any(has_mark(pid, mark) for mark in marks)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_S)


def _image(backend: Backend, stack: contextlib.ExitStack) -> OpenImage | None:
    if (images := backend.engine_images) is not None:
        return images.find(None)
    if not backend.uses_image:
        return None
    return stack.enter_context(open_image(current_image(find_image(None))))


@contextlib.contextmanager
def open_bench(name: str, runner: Sequence[str] = RUNNER) -> Iterator[Bench]:
    """Open a bench for the backend called *name*. Raises SandboxError if the backend cannot run here."""
    with contextlib.ExitStack() as stack:
        image = _image(create(name), stack)
        artifact = OutFile(path=OUTPUT, fd=memory_file(b"", stack), max_bytes=settings.ARTIFACT_MAX_BYTES)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"x07-conformance-{name}-"))
        yield Bench(name, Path(folder), image, artifact, runner)


def main(words: list[str]) -> None:
    """Run the program that *words* describe, and print how the run ended."""
    with contextlib.closing(Cancel()) as cancel:
        result, _ = attempt(request(*words[1:]), caller(words[0], cancel, live_stdout=1))
    sys.stdout.write(f"{result.outcome}: {printable(result.reason)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
