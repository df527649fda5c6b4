"""Hot clones: VMs restored from a saved process. Their walls, their fallbacks, and when the process is saved again."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import FULL, need, overwrite, sample
from tests.unit.test_jail_own_limits import ALLOW, LINE, answer, number, numbers
from tests.vm.conftest import (
    BEHAVE,
    Artifacts,
    Sandbox,
    copy_cache,
    copy_saved,
    left_behind,
    owners,
    run_vm,
    usual_start,
)
from x07_sandbox.backends.qemu import hot
from x07_sandbox.backends.qemu import saved as store
from x07_sandbox.backends.qemu.machine import Paths
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.linux import children_of
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.verdicts import forget
from x07_sandbox.jail import bwrap
from x07_sandbox.jail.seccomp import VMM_CALLS, restored_filter, vmm_rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

PTRACE_ATTACH, PTRACE_DETACH, PTRACE_SECCOMP_GET_FILTER = 16, 17, 0x420C
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
WAIT = "import time\nprint('here', flush=True)\ntime.sleep(20)\n"
RUNS = 2000 if FULL else 24


@pytest.fixture(autouse=True)
def hot_here() -> None:
    """Skip these tests where no process can be saved."""
    need(usual_start() == "hot", "this host restores no processes of VMs", installable=False)


def status(path: Path) -> dict[str, str]:
    """The fields of a status file in /proc."""
    return dict(line.split(":\t", 1) for line in path.read_text(encoding="ascii").splitlines() if ":\t" in line)


@contextlib.contextmanager
def waiting_run(sandbox: Sandbox) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the pid of the VMM of a run that waits, and the record of its job."""
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(sandbox.run_text, "wait.py", WAIT, cache=True, alone=False)
        deadline = time.monotonic() + 60
        found: list[dict[str, object]] = []
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            records = [json.loads(path.read_bytes()) for path in sandbox.state.glob("*-run/owner.json")]  # no build's
            found = [one for one in records if one.get("processes") and vmm(one)]
        time.sleep(0.5)
        yield vmm(found[0]), found[0]
        subprocess.run(["/bin/kill", "-TERM", str(found[0]["processes"]["supervisor"]["pid"])], check=True)  # type: ignore[index]
        ended.result()


def vmm(owner: dict[str, object]) -> int:
    """The pid of QEMU in the jail of a job, or 0 if it does not run yet."""
    inner = owner["processes"]["inner"]["pid"]  # type: ignore[index]
    for pid in children_of(inner):
        with contextlib.suppress(OSError):
            # Its whole path belongs to a file system that is no longer mounted.
            if Path(f"/proc/{pid}/exe").readlink().name == Path(host_arch().qemu_binary).name:
                return pid
    return 0


def socket_flags(place: Path) -> list[int]:
    """The status flags of a process's sockets but standard error."""
    found = []
    for fd in (place / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed
            if os.readlink(fd).startswith("socket:") and int(fd.name) > 2:  # noqa: PTH115 - text
                found.append(int((place / "fdinfo" / fd.name).read_text().split()[3], 8))
    return found


def test_a_restored_vmm_has_every_wall(sandbox: Sandbox) -> None:
    """A restored VMM has its uid, mark and limits, no capability, a filter on each thread, and no host files."""
    with waiting_run(sandbox) as (pid, owner):
        place = Path(f"/proc/{pid}")
        mark = str(owner["instance"])
        assert f"X07_INSTANCE={mark}" in (place / "environ").read_text(encoding="ascii").split("\0")
        assert f"x07-{mark}" in (place / "cmdline").read_text(encoding="ascii").split("\0")
        threads = [status(thread / "status") for thread in (place / "task").iterdir()]
        assert len(threads) >= 3
        for found in threads:
            assert (found["Seccomp"], found["NoNewPrivs"]) == ("2", "1")
            assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert "0" not in threads[0]["Uid"].split() + threads[0]["Gid"].split() or os.geteuid()
        first = status(Path(f"/proc/{owner['processes']['inner']['pid']}/status"))  # type: ignore[index]
        assert {first[name] for name in ("CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        limits = {line[:25].strip(): line[26:].split()[0] for line in (place / "limits").read_text().splitlines()}
        assert [flags & os.O_NONBLOCK for flags in socket_flags(place)] == [os.O_NONBLOCK] * 4
        assert limits["Max open files"] == "64"
        assert limits["Max core file size"] == limits["Max locked memory"] == "0"
        mounts = {line.split()[4] for line in (place / "mountinfo").read_text(encoding="utf-8").splitlines()}
        assert mounts == {"/", "/dev/urandom", Paths().ram, Paths().root}
        kinds = {os.path.basename(path) for path in map(os.readlink, (place / "ns").iterdir())}  # noqa: PTH119 - names
        ours = {os.path.basename(path) for path in map(os.readlink, Path("/proc/self/ns").iterdir())}  # noqa: PTH119
        assert {kind.partition(":")[0] for kind in kinds & ours} <= {"time"}


@pytest.mark.root
def test_the_filter_allows_no_more_than_qemus_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a restored VMM may do, QEMU's own filter would allow too."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path))
    arch = host_arch()
    argv = [arch.qemu_binary, "-machine", "none", "-nodefaults", "-display", "none", "-S", "-sandbox", SANDBOX]
    with subprocess.Popen(argv) as process:
        try:
            own = filter_of(process.pid)
        finally:
            process.kill()
    made = restored_filter(arch, bwrap.DUMPED_PID)
    rules = vmm_rules(bwrap.DUMPED_PID)
    arguments = [(*(0,) * at, value) for at in range(3) for value in (0, 1, 15, 38, 1030, 0x541B, 0x3D0F00, 0x3D0FFF)]
    for call in numbers(arch, *VMM_CALLS, *rules):
        for words in arguments:
            if answer(made, call, arch.audit, words) == ALLOW:
                assert answer(own, call, arch.audit, words) == ALLOW, (call, words)
    assert answer(own, number(arch.name, "fork"), arch.audit) != ALLOW


def filter_of(pid: int) -> bytes:
    """The filter that a process has loaded last (ptrace(2)), once it has one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    while status(Path(f"/proc/{pid}/status"))["Seccomp"] != "2":
        time.sleep(0.01)
    found: list[bytes] = []

    def read() -> None:  # each thread of the tracer traces on its own
        assert libc.ptrace(PTRACE_ATTACH, pid, None, None) == 0
        os.waitpid(pid, 0)
        lines = libc.ptrace(PTRACE_SECCOMP_GET_FILTER, pid, 0, None)
        buffer = ctypes.create_string_buffer(lines * LINE.size)
        assert libc.ptrace(PTRACE_SECCOMP_GET_FILTER, pid, 0, buffer) == lines
        libc.ptrace(PTRACE_DETACH, pid, None, None)
        found.append(buffer.raw)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return found[0]


# unusable saved processes, in a cache of their own


@pytest.fixture(scope="module")
def own_cache(
    image: Image, artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """A cache with the image, built programs and saved VMs of the usual one; and a saved process for it, set aside."""
    folder = tmp_path_factory.mktemp("hot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(folder / "jobs"))
        Sandbox(folder / "jobs", folder, artifacts).behave("nothing")  # it may have been used for some hours
    usual = hot.hot_template(run_vm(image)).folder
    aside = folder / usual.name
    copy_saved(usual, aside)
    cache = folder / "cache"
    copy_cache(cache)
    (cache / "templates" / ".lock").unlink(missing_ok=True)  # the same file as that of the usual cache
    yield cache, aside
    shutil.rmtree(cache, ignore_errors=True)


def remove_processes() -> None:
    """Remove all saved processes."""
    for folder in process_folders():
        store.remove(folder)


def process_folders() -> list[Path]:
    """The saved processes."""
    return [folder for folder in store.templates_dir().iterdir() if (folder / hot.IMAGES).is_dir()]


@pytest.fixture
def saved(own_cache: tuple[Path, Path], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Runs with that cache and one saved process, intact whatever earlier tests did to it."""
    cache, aside = own_cache
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(cache))
    forget(store.SUSPENDED)
    remove_processes()
    copy_saved(aside, store.templates_dir() / aside.name)
    return sandbox


def start_of(sandbox: Sandbox) -> tuple[str, list[str]]:
    """How the VM of a run started, and the warnings but that of emulation."""
    ran = sandbox.behave("nothing")
    assert ran.outcome == "ok", ran.reason
    return ran.result.phases["run"].start, [text for text in ran.result.warnings if "emulated" not in text]


def test_the_setting_gives_todays_clones(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """With X07_VM_NO_HOT_CLONES=1 a run clones the saved VM, without a warning."""
    monkeypatch.setenv(hot.VARIABLE, "1")
    assert start_of(sandbox) == ("clone", [])


def test_a_damaged_process_is_saved_again(saved: Sandbox) -> None:
    """A saved process with one changed byte is noticed despite its times, and saved again."""
    (folder,) = process_folders()
    for name in sample((f"{hot.IMAGES}/pages-1.img", "ram", f"{hot.IMAGES}/core-{bwrap.DUMPED_PID}.img"), 1):
        overwrite(folder / name, b"\x55")
        start, warnings = start_of(saved)
        assert start == "hot"
        assert [text for text in warnings if "saved process" in text and "it was saved again" in text], warnings


def test_a_process_that_cannot_be_restored_costs_a_clone(saved: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """If criu fails, the run clones the saved VM and says why, and later runs do so too, for a while."""
    with monkeypatch.context() as patch:
        patch.setattr(bwrap, "DUMPED_PID", bwrap.DUMPED_PID + 1)  # not the dumped number: the jail refuses the process
        found = [start_of(saved) for _ in range(2)]
    for start, warnings in found:
        assert start == "clone"
        assert [text for text in warnings if "was cloned without a saved process" in text], warnings


def test_a_jail_that_cannot_be_built_costs_a_clone(saved: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the jail of a hot clone cannot be built, the run clones the saved VM and says why."""
    with monkeypatch.context() as patch:
        patch.setattr(bwrap, "_CAPABILITIES", ("NO_SUCH",))
        start, warnings = start_of(saved)
    assert start == "clone"
    assert [text for text in warnings if "cannot build the jail" in text], warnings


def test_a_host_without_criu_uses_clones(saved: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without criu a run clones the saved VM, without a warning; x07 doctor says what to install."""
    monkeypatch.setattr(hot, "CRIU", "/usr/sbin/no-criu")
    assert start_of(saved) == ("clone", [])
    assert hot.unsupported(kvm=False).endswith("(Debian: apt-get install criu)")


def test_a_process_is_used_for_some_hours(saved: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some hours, and after a reboot, a process is saved again and the old one removed; others do not wait."""
    before = process_folders()
    monkeypatch.setattr(settings, "HOT_S", settings.HOT_S / 1e6)
    with file_lock(store.templates_dir() / ".lock"):
        start, warnings = start_of(saved)
    assert start == "clone"
    assert [text for text in warnings if "another process is saving one" in text]
    ran = saved.behave("nothing")
    assert [text for text in ran.result.warnings if "was saved first" in text]
    assert not set(before) & set(process_folders())


@pytest.mark.parametrize("limit", ["ulimit -t 30", "ulimit -s 4096", "ulimit -n 100"])
def test_the_limits_of_a_shell_do_not_spoil_a_saved_process(saved: Sandbox, limit: str) -> None:
    """A run in a shell with lower limits works, and others still use their saved process."""
    (folder,) = process_folders()
    argv = ["/bin/sh", "-c", f'{limit}; exec "$@"', "sh", shutil.which("x07") or "x07", "exec", "--", "/bin/true"]
    with contextlib.nullcontext() if FULL else file_lock(store.templates_dir() / ".lock"):  # saves none of its own
        done = subprocess.run(argv, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert folder in process_folders()
    assert start_of(saved) == ("hot", [])
    assert folder.is_dir()


# many runs


@pytest.mark.timeout(2400 if FULL else 180)
def test_many_hot_runs_at_once(sandbox: Sandbox, artifacts: Artifacts) -> None:
    """Hot runs, eight at a time, while their processes are stopped at odd moments, give right results and end."""
    artifacts.built(BEHAVE)
    done = threading.Event()

    def disturb() -> None:
        """Stop and continue the processes of jobs, again and again."""
        while not done.wait(0.05):
            for owner in owners(sandbox.state):
                for identity in (owner.get("processes") or {}).values():  # type: ignore[attr-defined]
                    for name in ("STOP", "CONT"):
                        subprocess.run(
                            ["/bin/kill", f"-{name}", str(identity["pid"])], check=False, capture_output=True
                        )

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            ran = list(pool.map(lambda _: sandbox.behave("nothing", alone=False), range(RUNS)))
    finally:
        done.set()
        thread.join()
    assert {one.outcome for one in ran} == {"ok"}, [one.reason for one in ran if one.outcome != "ok"]
    starts = [one.result.phases["run"].start for one in ran]
    assert starts.count("hot") >= 0.99 * RUNS, starts
    assert left_behind(sandbox.state) == []
