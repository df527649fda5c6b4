"""Calls from Python that a signal handler interrupts: its exception ends them, and nothing is left running."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import left_behind
from x07_sandbox import Pool, run_program
from x07_sandbox.backends.qemu.instance import QemuInstance
from x07_sandbox.library.warm import WarmMachines

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm


def interrupted(call: Callable[..., object]) -> Callable[..., object]:
    """Return that call with one Ctrl-C at its start."""
    to_come = [signal.SIGINT]

    def interrupting(*args: object) -> object:
        while to_come:
            os.kill(os.getpid(), to_come.pop())
            time.sleep(0.1)  # the handler's exception is raised here in the main thread
        return call(*args)

    return interrupting


@pytest.mark.parametrize("name", ["record_owner", "release", "stop"])
def test_an_interrupted_call_leaves_no_machine(
    state: Path, image: Image, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Ctrl-C at any step of a machine's life, its end too, ends a library call without remains."""
    monkeypatch.setattr(QemuInstance, name, interrupted(getattr(QemuInstance, name)))
    with pytest.raises(KeyboardInterrupt):
        run_program(source="sleep 20", toolchain="shell", image=image.digest)
    assert left_behind(state) == []


def test_an_interrupted_shutdown_still_ends_the_machines(
    state: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a pool shuts down is raised at once, and the pool's machines still end."""
    pool = Pool(size=1, image=image.digest)
    assert pool.wait_ready()
    monkeypatch.setattr(WarmMachines, "close", interrupted(WarmMachines.close))
    with pytest.raises(KeyboardInterrupt):
        pool.shutdown()
    deadline = time.monotonic() + 60
    while found := left_behind(state):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)  # it ends in a thread that only the process itself can wait for


def test_a_pools_worker_cannot_wait_for_its_shutdown(state: Path, image: Image) -> None:
    """Waiting for a pool's shutdown in its own worker is an error, and the pool still ends."""
    errors: list[BaseException] = []

    def shut_down(_future: object) -> None:
        try:
            pool.shutdown()
        except RuntimeError as exc:
            errors.append(exc)

    with Pool(size=1, image=image.digest) as pool:
        future = pool.submit(source="sleep 1", toolchain="shell")
        future.add_done_callback(shut_down)
    assert errors
    assert left_behind(state) == []
