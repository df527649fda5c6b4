"""Fault injection while sandboxes are saved, forked, rolled back and paused: nothing hangs, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chaos.runner import inner
from tests.chaos.test_chaos import OLD, RUNNER, Stage, points
from tests.conftest import FULL, sample
from tests.process.test_held_sandbox import holder_of
from tests.vm.conftest import copy_cache
from x07_sandbox import Sandbox, SandboxError, Snapshot
from x07_sandbox.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.root, pytest.mark.vm]
PROGRAM = str(Path(__file__).with_name("forking.py"))
POINTS = 1000 if FULL else 3
NEW = dict.fromkeys("abc", "new\n")
ACTIONS = {
    "forks": "forks done",
    "checkpoint": "rolled-back\ncheckpoint done",
    "snapshot": "snapshot done",
    "pause": "pause done",
}
"""The actions of PROGRAM, and what it prints after each."""


class Forks(Stage):
    """A cache and a state folder of their own, and a folder that forks change. steps: of actions, without a fault."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__("qemu", folder, None)
        self.steps: list[tuple[str, int]] = []
        copy_cache(folder / "cache")
        self.env["X07_VM_CACHE_DIR"] = str(folder / "cache")
        for name, value in self.env.items():
            patch.setenv(name, value)

    def act(self, how: str, number: int, *actions: str) -> tuple[int, str, int]:
        """Carry out actions with a fault at one step; return the exit code, the output and the number of steps."""
        self.reset()
        count = self.folder / "count"
        count.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, RUNNER, how, str(number), str(count), PROGRAM, str(self.tree), *actions],
            env=self.env,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=False,
        )
        self.note_marks()
        steps = int(count.read_text(encoding="ascii")) if count.exists() else 0
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace"), steps

    def cleaned(self) -> list[str]:
        """Close the sandboxes that are open or paused, remove snapshots, sweep, and return what remains."""
        for one in Sandbox.list():
            with contextlib.suppress(SandboxError):  # it ends by itself
                Sandbox.connect(one.id).close("discard")
        found = [f"sandbox {one.id}" for one in Sandbox.list()]
        for kept in Snapshot.list():
            kept.remove()
        for path in self.places():
            os.utime(path, (0, 0))  # a snapshot that is new is left alone
        self.sweep()
        assert main(["prune", "--cache"]) == 0
        return found + self.left(set()) + [str(path) for path in self.places()]

    def places(self) -> list[Path]:
        """Return the folders of snapshots that are being taken."""
        return [*(self.folder / "cache/templates").glob(".*-*")]


@pytest.fixture(scope="module")
def forks(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Yield a place in which everything was done once, without a fault."""
    del image
    with pytest.MonkeyPatch.context() as patch:
        yield from made(Forks(tmp_path_factory.mktemp("forks"), patch))


def made(found: Forks) -> Iterator[Forks]:
    """Do everything once without a fault, and yield the place."""
    for action, done in ACTIONS.items():
        code, said, steps = found.act("kill", 0, action)
        assert (code, said) == (0, f"{done}\n")
        found.steps += [(action, number + 1) for number in range(steps)]
    assert found.cleaned() == []
    yield found
    assert found.cleaned() == []


@pytest.mark.parametrize("how", sample(["kill", "gate", "ENOSPC", "EMFILE", "inner", "ENOMEM"], 3))
def test_a_fault_at_any_step_leaves_nothing_behind(forks: Forks, how: str) -> None:
    """Whichever process is killed, or whichever host call fails: nothing hangs, and each action works or says why."""
    for point in points(len(forks.steps), at_most=POINTS):
        action, number = forks.steps[point - 1]
        code, said, _ = forks.act(how, number, action, *(ACTIONS if FULL else ()))  # the process goes on
        assert code == (-signal.SIGKILL if how == "kill" else 0), (action, number, said)
        assert "Traceback" not in said, (action, number, said)
        assert forks.cleaned() == [], (action, number)
        assert forks.tree_now() in (OLD, NEW), (action, number)


def test_a_fork_that_is_killed_while_it_starts_is_an_error(forks: Forks) -> None:
    """If the VM of a fork ends at any time, its sandbox fails or ends, and its parent goes on."""
    jobs, outcomes = forks.state, []
    for wait_s in [number * 0.02 for number in range(0, 20, 1 if FULL else 6)]:
        with Sandbox() as parent:
            (own,) = inner(jobs)

            def kill(wait_s: float = wait_s, own: int = own) -> None:
                until = time.monotonic() + 20
                while time.monotonic() < until and not (new := [pid for pid in inner(jobs) if pid != own]):
                    time.sleep(0.002)
                time.sleep(wait_s)
                for pid in new:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

            killer = threading.Thread(target=kill)
            killer.start()
            try:
                (fork,) = parent.fork()
                killer.join()
                outcomes.append(fork.close().reason_code)
            except SandboxError as exc:
                outcomes.append(exc.code)
            killer.join()
            assert parent.exec(["true"]).ok
        assert forks.cleaned() == [], wait_s
    assert "closed" not in outcomes


def test_a_sandbox_whose_holder_is_killed_is_no_sandbox(forks: Forks) -> None:
    """If the holder of a sandbox is killed while a snapshot is taken, the call fails, and forks go on."""
    for wait_s in [number * 0.05 for number in range(0, 16, 1 if FULL else 8)]:
        parent = Sandbox.create()
        fork, *_ = parent.fork()
        holder = holder_of(parent.id)
        killer = threading.Timer(wait_s, os.kill, (holder, signal.SIGKILL))
        killer.start()
        with pytest.raises(SandboxError):  # noqa: PT012 - which of the calls fails depends on the time
            for _ in range(100):
                parent.snapshot("again")
        killer.join()
        assert fork.exec(["true"]).ok
        assert forks.cleaned() == [], wait_s
