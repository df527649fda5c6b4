"""Saving VMs in the background: runs do not wait for it, it is done once, and nothing of it is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command import X07
from tests.conftest import need
from tests.vm.conftest import BEHAVE, Artifacts, Sandbox, copy_cache, left_behind, marked, owners, usual_start
from x07_sandbox import Pool
from x07_sandbox.backends.qemu import hot
from x07_sandbox.backends.qemu.saved import SUSPENDED, remove, templates_dir
from x07_sandbox.cli.main import main
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.host.processes import Identity, wait_gone
from x07_sandbox.host.verdicts import forget, stored_in
from x07_sandbox.library.images import prepare_image
from x07_sandbox.policy.guest import RAM_CLASSES
from x07_sandbox.sessions import saving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def cache(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the image and saved VMs of the usual one, and no saved process."""
    artifacts.built(BEHAVE)
    place = tmp_path_factory.mktemp("saving") / "cache"
    copy_cache(place)
    (place / "templates" / ".lock").unlink(missing_ok=True)  # the same file as that of the usual cache
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def unsaved(cache: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """Runs that find a saved VM but no saved process, and do not wait for one. Ends the process that saves one."""
    need(usual_start() == "hot", "this host restores no processes of VMs", installable=False)
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(cache))
    monkeypatch.delenv("X07_VM_SAVE_FIRST")
    forget(SUSPENDED)
    forget(saving.SAVER)
    for folder in saved_processes():
        remove(folder)
    yield sandbox
    if (saver := the_saver()) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(saver.pid, signal.SIGKILL)


def saved_processes() -> list[Path]:
    """The folders of saved processes."""
    return [path.parent for path in templates_dir().glob(f"*/{hot.IMAGES}")]


def the_saver() -> Identity | None:
    """The process in the background that a run has started, or None."""
    (stored, *_) = [*map(stored_in, cache_folder("verdicts").glob(f"{saving.SAVER}-*.json")), None]
    return None if stored is None else Identity(pid=stored["pid"], start_ticks=stored["start_ticks"])


def start_of(sandbox: Sandbox) -> tuple[str, str]:
    """How the VM of a run started, and the warnings but that of emulation."""
    ran = sandbox.behave("nothing", alone=False)
    assert ran.outcome == "ok", ran.reason
    return ran.result.phases["run"].start, "\n".join(one for one in ran.result.warnings if "emulated" not in one)


def command(saver: Identity, deadline: float) -> str:
    """The phase that `x07 ps` shows for the VM of the process in the background, once there is one."""
    argv = [*X07, "ps", "--json"]
    while True:
        jobs = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)["jobs"]
        if found := [one["phase"] for one in jobs if one["run"].split("-")[1] == str(saver.pid)]:
            return str(found[0])
        assert time.monotonic() < deadline


def test_a_run_does_not_wait_for_what_later_runs_need(unsaved: Sandbox) -> None:
    """A run uses what is saved; a process of low priority saves the rest for later runs of usual priority."""
    start, warnings = start_of(unsaved)
    saver = the_saver()
    assert saver is not None
    assert start == "clone"
    assert f"process {saver.pid} saves one in the background" in warnings
    assert command(saver, time.monotonic() + 60) == "template"
    assert os.getpriority(os.PRIO_PROCESS, saver.pid) > os.getpriority(os.PRIO_PROCESS, 0)
    assert wait_gone(saver, 120)
    assert start_of(unsaved) == ("hot", "")
    assert left_behind(unsaved.state) == []
    with Pool(size=1) as pool:
        assert pool.wait_ready(60)
        (warm,) = [one for one in owners(unsaved.state) if marked(str(one["instance"]))]
        found = [pid for pid in marked(str(warm["instance"])) if is_vmm(pid)]
        assert found
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in found} == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_a_killed_process_in_the_background_loses_only_its_vm(unsaved: Sandbox) -> None:
    """Ctrl-C of a run spares the process in the background; when killed, its VM ends, and a run starts another."""
    argv = [*X07, "exec", "--", "/bin/sh", "-c", "echo here; exec sleep 60"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        saver = the_saver()
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(60) == 130
    assert saver is not None
    command(saver, time.monotonic() + 60)
    os.kill(saver.pid, signal.SIGSTOP)
    assert f"process {saver.pid} is saving one" in start_of(unsaved)[1]
    assert the_saver() == saver
    os.kill(saver.pid, signal.SIGKILL)
    assert wait_gone(saver, 60)
    for owner in owners(unsaved.state):
        for name in owner["processes"]:  # type: ignore[attr-defined]
            assert wait_gone(Identity(**owner["processes"][name]), 60)  # type: ignore[index]
    assert main(["sweep"]) == 0
    assert left_behind(unsaved.state) == []
    assert [path.name for path in templates_dir().glob(".new-*")] == []
    start_of(unsaved)
    other = the_saver()
    assert other not in {None, saver}
    assert other is not None
    assert wait_gone(other, 120)
    assert start_of(unsaved) == ("hot", "")


def is_vmm(pid: int) -> bool:
    """Whether a process is QEMU."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name == Path(host_arch().qemu_binary).name
    return False


def test_a_host_short_of_memory_saves_nothing(unsaved: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host short of memory no process is started in the background, and the result says so."""
    monkeypatch.setattr(settings, "SAVING_BYTES", 1 << 60)
    start, warnings = start_of(unsaved)
    assert (start, "MiB of memory are free" in warnings) == ("clone", True)
    assert the_saver() is None


def save(image: Image, deadline_s: int | None = None) -> int:
    """Save what ordinary runs of the image start from, as the process in the background does. Return its status."""
    setting = "" if deadline_s is None else f"settings.SAVING_S = {deadline_s}; "
    text = f"import sys; from x07_sandbox.sessions.saving import main, settings; {setting}sys.exit(main(sys.argv[1:]))"
    words = "qemu", image.digest, str(RAM_CLASSES[0]), "run", "0"
    return subprocess.run([sys.executable, "-c", text, *words], check=False, capture_output=True).returncode


def test_what_cannot_be_saved_is_not_tried_by_each_run(unsaved: Sandbox, image: Image) -> None:
    """If nothing can be saved, the next run says why, and starts no process for some minutes."""
    with no_lock():
        assert save(image) == 1
    start, warnings = start_of(unsaved)
    assert start == "clone"
    assert "Is a directory" in warnings
    assert "for 5 minutes" in warnings
    assert the_saver() is None


def test_the_process_in_the_background_ends_in_time(unsaved: Sandbox, image: Image) -> None:
    """The process in the background ends at its deadline, also while it waits for another one."""
    with file_lock(templates_dir() / ".lock"):
        assert save(image, deadline_s=1) == 1
    assert left_behind(unsaved.state) == []
    # It was not its fault, so nothing keeps the next one from saving.
    assert "saves one in the background" in start_of(unsaved)[1]
    assert the_saver() is not None


@contextlib.contextmanager
def no_lock() -> Iterator[None]:
    """Let each attempt to save a VM fail, as on a broken disk."""
    lock = templates_dir() / ".lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    try:
        yield
    finally:
        lock.rmdir()


# pools


@pytest.fixture
def empty(cache: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sandbox]:
    """Runs with a cache without any saved VM. No processes are saved, which takes as long again."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(cache))
    monkeypatch.setenv(hot.VARIABLE, "1")
    forget(SUSPENDED)
    aside = tmp_path / "templates"
    templates_dir().rename(aside)
    yield sandbox
    shutil.rmtree(templates_dir(), ignore_errors=True)
    aside.rename(cache / "templates")
    forget(SUSPENDED)


def test_a_pool_goes_on_without_a_saved_vm(empty: Sandbox) -> None:
    """If no VM can be saved, a pool runs commands in VMs that boot, and its results say why."""
    with no_lock(), Pool(size=1) as pool:
        assert pool.wait_ready(120)
        with pool.sandbox() as sandbox:
            assert sandbox.exec(["echo", "42"]).stdout == b"42\n"
            result = sandbox.close()
    assert (result.outcome, result.phases["run"].start) == ("ok", "pool"), result.reason
    assert [one for one in result.warnings if "booted without a saved VM" in one and "Is a directory" in one]
    assert left_behind(empty.state) == []


def test_a_node_goes_on_without_a_saved_vm(empty: Sandbox, image: Image) -> None:
    """A node of a cluster is ready also if no VM can be saved there, and says why none is."""
    said: list[str] = []
    with no_lock():
        prepare_image(image.digest, [], said.append)
    assert [one for one in said if one.startswith("programs start more slowly") and "Is a directory" in one], said
    assert left_behind(empty.state) == []
