"""Time sandboxes: opening one, commands in it, and files in and out, beside pooled runs and tar.

`exec` of podman and docker, in a running container of the same image, is in `bench.peers`.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from bench.figures import WrongRunError, at_once_seconds
from bench.ours import X07, check, variables
from x07_sandbox import Sandbox
from x07_sandbox.host.documents import render_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from x07_sandbox import Pool

MIB: Final = 1 << 20
TRUE: Final = ["true"]
_LIFETIME_S: Final = 12 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much to do. later: the number of a command that is not the first. many: commands in one sandbox."""

    later: int
    many: int
    at_once: int
    mib: int


FULL: Final = Sizes(later=100, many=1000, at_once=8, mib=64)
SHORT: Final = Sizes(later=4, many=10, at_once=8, mib=1)


class Sandboxes:
    """Sandboxes from a pool, and one that stays open until *stack* ends."""

    def __init__(self, stack: contextlib.ExitStack, pool: Pool, sizes: Sizes) -> None:
        self.pool = pool
        self.sizes = sizes
        self.held = stack.enter_context(pool.sandbox(lifetime_s=_LIFETIME_S))
        created = stack.enter_context(contextlib.closing(Sandbox.create(lifetime_s=_LIFETIME_S)))
        self._exec = [str(X07), "sandbox", "exec", created.id, "--", *TRUE]
        self._ends_s: dict[str, float] = {}
        pool.wait_ready()

    def cases(self) -> dict[str, Callable[[], float]]:
        """Return the cases by name."""
        sizes = self.sizes
        return {
            "sandbox, opened from the pool": partial(self.pooled_seconds, whole=False),
            "sandbox, opened, used, closed": partial(self.pooled_seconds, whole=True),
            f"sandbox, {sizes.many:,} commands": self.many_seconds,
            "sandbox, the first tenth of them": lambda: self._ends_s["first"],
            "sandbox, the last tenth of them": lambda: self._ends_s["last"],
            "sandbox exec true, first": partial(self.nth_seconds, 1),
            f"sandbox exec true, {sizes.later}th": partial(self.nth_seconds, sizes.later),
            f"sandbox exec true, {sizes.at_once} at once": partial(at_once_seconds, self._true, sizes.at_once),
            "x07 sandbox exec true": partial(self.command_seconds, self._exec, front=False),
            "x07 sandbox exec true, front": partial(self.command_seconds, self._exec, front=True),
            "x07 sandbox list": partial(self.command_seconds, [X07, "sandbox", "list"], front=False),
            "x07 sandbox list, front": partial(self.command_seconds, [X07, "sandbox", "list"], front=True),
            "x07 --version": partial(self.command_seconds, [X07, "--version"], front=False),
        }

    def pooled_seconds(self, *, whole: bool) -> float:
        """Time opening a sandbox in a VM that waits. whole: also one command, and closing it."""
        self.pool.wait_ready()
        started = time.monotonic()
        with self.pool.sandbox() as sandbox:
            seconds = time.monotonic() - started
            if whole:
                sandbox.exec(TRUE, check=True)
        if whole:
            seconds = time.monotonic() - started
        _check(sandbox)
        return seconds

    def nth_seconds(self, number: int) -> float:
        """Time the command with this number in a new sandbox."""
        with self._opened() as sandbox:
            for _ in range(number - 1):
                sandbox.exec(TRUE, check=True)
            started = time.monotonic()
            done = sandbox.exec(TRUE, check=True)
            seconds = time.monotonic() - started
        if done.id != number:
            raise WrongRunError(f"a sandbox ran command {done.id} instead of {number}")
        return seconds

    def many_seconds(self) -> float:
        """Time many commands in a new sandbox, one after the other."""
        many, part = self.sizes.many, self.sizes.many // 10
        with self._opened() as sandbox:
            times = [time.monotonic()]
            for _ in range(many):
                sandbox.exec(TRUE, check=True)
                times.append(time.monotonic())
        self._ends_s = {"first": times[part] - times[0], "last": times[many] - times[many - part]}
        return times[many] - times[0]

    @staticmethod
    def command_seconds(words: Sequence[str | Path], *, front: bool) -> float:
        """Time a command that runs nothing in a new VM. front: whether the front of a pool may carry it out."""
        env = variables(front=front)
        started = time.monotonic()
        subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=True, env=env)
        return time.monotonic() - started

    def _true(self) -> None:
        self.held.exec(TRUE, check=True)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Sandbox]:
        self.pool.wait_ready()
        with self.pool.sandbox() as sandbox:
            self.pool.wait_ready()  # preparing the next VM uses a core
            yield sandbox
        _check(sandbox)


class Transfers:
    """One file into a sandbox and out of it, by calls and by tar through the streams of a command.

    The file in the sandbox is "data", and "in" is what a case copied there.
    """

    def __init__(self, sandbox: Sandbox, work: Path, mib: int) -> None:
        self.sandbox = sandbox
        self.mib = mib
        self.data = os.urandom(mib * MIB)
        self.local, self.out = work / "data", work / "out"
        self.local.write_bytes(self.data)
        sandbox.upload(self.local, "data")
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(self.local, "in")
        self.packed = packed.getvalue()

    def cases(self) -> dict[str, Callable[[], float]]:
        """Return the cases by name."""
        files, exec_ = self.sandbox.files, self.sandbox.exec
        unpack, pack = ["tar", "-xf", "-"], ["tar", "-cf", "-", "data"]
        into: dict[str, Callable[[], object]] = {
            "write": lambda: files.write("in", self.data),
            "upload": lambda: files.upload(self.local, "in"),
            "tar": lambda: exec_(unpack, input=self.packed, check=True),
        }
        # Each call is timed, and returns how to get the content.
        out: dict[str, Callable[[], Callable[[], bytes]]] = {
            "read": lambda: partial(bytes, files.read("data")),
            "download": self._downloaded,
            "tar": lambda: partial(_unpacked, exec_(pack, max_output_bytes=2 * len(self.packed), check=True).stdout),
        }
        cases: dict[str, Callable[[], float]] = {
            f"{self.mib} MiB in, {name}": partial(self._in_seconds, call) for name, call in into.items()
        }
        return cases | {f"{self.mib} MiB out, {name}": partial(self._out_seconds, call) for name, call in out.items()}

    def _in_seconds(self, call: Callable[[], object]) -> float:
        started = time.monotonic()
        call()
        seconds = time.monotonic() - started
        self.sandbox.exec(["cmp", "data", "in"], check=True)
        self.sandbox.files.remove("in")  # so that the next case cannot find it
        return seconds

    def _out_seconds(self, call: Callable[[], Callable[[], bytes]]) -> float:
        started = time.monotonic()
        content = call()
        seconds = time.monotonic() - started
        if content() != self.data:
            raise WrongRunError("a file came out of a sandbox with other content")
        self.out.unlink(missing_ok=True)
        return seconds

    def _downloaded(self) -> Callable[[], bytes]:
        self.sandbox.download("data", self.out)
        return self.out.read_bytes


def _unpacked(archive: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile("data")
        return b"" if file is None else file.read()


def _check(sandbox: Sandbox) -> None:
    """Raise WrongRunError unless a closed sandbox had a VM that waited, and kept every promise."""
    if sandbox.result is None:
        raise WrongRunError("a sandbox has no result")
    check(render_json(sandbox.result), b"", start="pool", built=None)
