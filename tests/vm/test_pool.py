"""Warm machines: what a run gets from a pool, and that no machine is left behind, whichever process is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import threading
import time
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from tests.command import X07, Done
from tests.command import x07 as command
from tests.conftest import FULL, sample
from tests.hostile_folder import BIN, HostileFolder
from tests.published import document
from tests.vm.conftest import copy_cache, left_behind, marked, owners, usual_start
from tests.vm.test_clones import RANDOM
from x07_sandbox import Pool, SandboxError
from x07_sandbox.backends import lease
from x07_sandbox.backends.base import Job, MachineKind
from x07_sandbox.backends.lease import PoolClient
from x07_sandbox.backends.qemu.backend import QemuBackend
from x07_sandbox.backends.qemu.instance import VMM_BYTES
from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.host import settings, waiting
from x07_sandbox.host.linux import of_process
from x07_sandbox.host.processes import own_identity
from x07_sandbox.host.waiting import Caller, Cancel
from x07_sandbox.images.verify import open_image
from x07_sandbox.library import warm
from x07_sandbox.library.warm import WarmMachines
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.guest import ram_class_bytes
from x07_sandbox.records.admission import admitted
from x07_sandbox.records.runs import Claim, new_run_id
from x07_sandbox.sessions.request import RunCaller, RunRequest
from x07_sandbox.sessions.run import attempt

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future

    from tests.conftest import Need
    from x07_sandbox.backends.qemu.instance import LeasedInstance, QemuInstance
    from x07_sandbox.images.store import Image
    from x07_sandbox.records.runs import JobRecord
    from x07_sandbox.sessions.result import Result

pytestmark = pytest.mark.vm

ECHO = "import sys\nprint('got', sys.stdin.read())\n"
# Prints traces that an earlier program could have left in the machine.
TRACES = """
import json, os
print(json.dumps({
    "folders": {name: sorted(os.listdir(name)) for name in (".", "/tmp", "/dev/shm", "/x07/in", "/x07/out", "/run")},
    "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "group": open("/proc/self/cgroup").read(),
    "fds": len(os.listdir("/proc/self/fd")),
    "host": os.uname().nodename,
}))
"""


def x07(*words: str, stdin: bytes = b"", folder: HostileFolder | None = None) -> Done:
    """Carry out one `x07` command, in a process of its own in a hostile folder if one is given."""
    if folder is None:
        return command(Path.cwd(), *words, stdin=stdin)
    argv, env = [str(BIN / "x07"), *words], folder.variables()
    done = subprocess.run(argv, input=stdin, capture_output=True, check=False, timeout=300, cwd=folder.path, env=env)
    return Done(done.returncode, done.stdout, done.stderr.decode())


def ran(*words: str, stdin: bytes = b"", folder: HostileFolder | None = None) -> dict[str, Any]:
    """Run `x07 run --json` successfully and return its result."""
    done = x07("run", "--json", *words, stdin=stdin, folder=folder)
    result: dict[str, Any] = json.loads(done.out)
    assert result["outcome"] == "ok", (result["reason"], done.err)
    return result


def status() -> dict[str, Any] | None:
    """Return the pool's status as `x07 pool status` reports it, or None without a pool."""
    deadline = time.monotonic() + 60
    while (done := x07("pool", "status", "--json")).code != 0:  # it did not answer in time
        assert time.monotonic() < deadline, done.err
    reported: dict[str, Any] | None = document(done.out)["pool"]
    return reported


def is_front(pid: int) -> bool:
    """Return whether a process carries out commands for a pool."""
    return b"x07_sandbox.cli.front" in (of_process(pid, "cmdline") or b"")


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    """Poll until a condition in another process holds, for which there is no event."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def own_cache(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this file's own, since a pool serves every run of its user, other tests' included."""
    del image
    place = tmp_path_factory.mktemp("pool") / "cache"
    copy_cache(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_CACHE_DIR", str(place))
        yield


@contextlib.contextmanager
def pool_process(size: int, folder: HostileFolder | None = None) -> Iterator[int]:
    """Start a pool with all machines warm, yield its process's pid, and stop it."""
    started = x07("pool", "start", "--size", str(size), folder=folder)
    assert started.code == 0, started.err
    reported = status()
    assert reported is not None
    try:
        yield reported["pid"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(reported["pid"], signal.SIGCONT)
        assert x07("pool", "stop").code == 0


@pytest.fixture(scope="module")
def echo(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program in the build cache, so that its runs need one machine only."""
    del own_cache
    folder = tmp_path_factory.mktemp("echo")
    (folder / "echo.py").write_text(ECHO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(folder / "jobs"))
        ran(str(folder / "echo.py"), "--no-pool")
    return str(folder / "echo.py")


@pytest.fixture
def kind(image: Image) -> Iterator[MachineKind]:
    """The kind of machine that a pool holds."""
    with open_image(image) as opened:
        yield MachineKind(image=opened, ram_bytes=ram_class_bytes(default_policy().limits.mem_bytes))


def claim() -> Claim:
    """Return a claim for the job of a new run."""
    return Claim(run_id=new_run_id(), phase="run", wall_ms=1000)


def test_a_run_takes_a_warm_machine_and_leaves_nothing(echo: str, state: Path, tmp_path: Path) -> None:
    """A run takes a warm machine under its own name and record, and nothing is left once the pool stops."""
    hostile = HostileFolder(tmp_path / "hostile")
    with pool_process(2, hostile) as pid:
        result = ran(echo, stdin=b"hello", folder=hostile)
        assert hostile.executed() == ""
        assert (result["stdout"]["text"], result["phases"]["run"]["start"]) == ("got hello\n", "pool")
        folder = state / f"{result['run']}-run"
        job, owner = (json.loads((folder / name).read_bytes()) for name in ("job.json", "owner.json"))
        assert (folder / "done").is_file()
        assert job["run_id"] == folder.name == owner["labels"]["io.x07.run_id"]
        assert (owner["run"], owner["runner"]["pid"] != pid) == (result["run"], True)
        assert str(job["deadline_unix_ms"]) == owner["labels"]["io.x07.deadline_unix_ms"]
        alone = ran(echo, "--no-pool")
        assert alone["phases"]["run"]["start"] == usual_start(), alone["warnings"]
        if FULL:
            assert ran(echo, "--cold")["phases"]["run"]["start"] == "cold"
        again = x07("pool", "start")
        assert (again.code, "has one already" in again.err) == (125, True)
        reported = status()
        assert reported is not None
        assert (reported["claimed"], reported["problem"]) == (1, None)
        assert is_front(reported["front"])
    assert status() is None
    assert not is_front(reported["front"])
    assert left_behind(state) == []
    assert ran(echo)["phases"]["run"]["start"] == usual_start()


def test_a_pool_serves_small_policies(echo: str, state: Path, tmp_path: Path) -> None:
    """A run with a 48 MiB policy takes a warm machine, and still ends as `oom` at 48 MiB."""
    values = msgspec.to_builtins(default_policy())
    values["limits"]["mem_bytes"] = 48 << 20
    policy, hog = tmp_path / "small.json", tmp_path / "hog.py"
    policy.write_bytes(render_policy(values))
    hog.write_text("print(len(bytearray(200 << 20)))\n")
    ran(str(hog), "--no-pool")
    with pool_process(2):
        assert ran(echo, "--policy", str(policy), stdin=b"hello")["phases"]["run"]["start"] == "pool"
        killed = json.loads(x07("run", "--json", str(hog), "--policy", str(policy)).out)
        assert (killed["outcome"], killed["phases"]["run"]["start"]) == ("oom", "pool"), killed["reason"]
        assert "48 MiB" in killed["reason"]
    assert left_behind(state) == []


def test_a_claimed_machine_is_held_to_the_memory_and_deadline_of_its_job(state: Path, need: Need) -> None:
    """A claimed machine has the memory limit of its job, and the kernel ends it at its deadline, without help."""
    machines = WarmMachines(1)
    machines.start()
    with contextlib.closing(machines):
        wait_for(lambda: machines.ready() == 1, 120)
        used = 200 << 20
        machine = machines.take(claim(), own_identity(), used)
        assert machine is not None
        instance = cast("QemuInstance", machine.instance)
        names = ("memory.max", "memory.limit_in_bytes")
        limits = [folder / name for folder in instance.groups.folders for name in names if (folder / name).exists()]
        held = {int(path.read_text(encoding="ascii")) for path in limits}
        instance.set_deadline(1)
        assert select.select([instance.pidfd], [], [], 60)[0]
        assert machine.close()
        assert instance.exit_status() == -signal.SIGALRM
    assert left_behind(state) == []
    need(limits, "this host gives us no memory group", installable=False)
    assert held == {used + VMM_BYTES}


def test_a_warm_machine_is_as_new(state: Path, tmp_path: Path) -> None:
    """A warm machine looks like a clone to a program, with unique random values and the right time."""
    traces, random = tmp_path / "traces.py", tmp_path / "random_values.py"
    traces.write_text(TRACES)
    random.write_text(RANDOM)
    clone = json.loads(ran(str(traces), "--no-pool")["stdout"]["text"])
    with Pool(size=3) as pool:
        assert pool.wait_ready()
        warm = pool.submit(traces).result()
        values = [future.result() for future in [pool.submit(random), pool.submit(random)]]
        assert [result.phases["run"].start for result in (warm, *values)] == ["pool"] * 3, [warm.reason]
    found = json.loads(warm.stdout.text or "")
    assert found.pop("group") != ""
    clone.pop("group")
    assert found == clone
    one, other = (json.loads(result.stdout.text or "") for result in values)
    assert [name for name in one if one[name] == other[name]] == []
    assert abs(one["time"] - waiting.unix_ms() / 1000) < 60
    assert left_behind(state) == []


def test_no_machine_is_served_twice(
    state: Path,
    kind: MachineKind,
    full: bool,  # noqa: FBT001 - a fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each warm machine serves one claimer only, even with many claims at once; the other claims get none."""
    monkeypatch.setattr(lease, "ANSWER_S", 60.0)  # wait for a busy pool
    size, claims = (10, 100) if full else (2, 20)
    held = contextlib.ExitStack()
    cancel = held.enter_context(contextlib.closing(Cancel()))
    marks: list[str] = []
    lock = threading.Lock()

    def take() -> None:
        job = Job(claim=claim(), kind=kind, caller=Caller(cancel=cancel))
        waiting = PoolClient().claim(QemuBackend(), job)
        if waiting is not None:
            with lock:
                marks.append(held.enter_context(waiting).record.mark)

    with pool_process(size):
        threads = [threading.Thread(target=take) for _ in range(claims)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert size <= len(marks) < claims
        assert len(set(marks)) == len(marks)
        for mark in marks:
            assert marked(mark) != []
        held.close()
        for mark in marks:
            assert marked(mark) == []
    assert left_behind(state) == []


def alive(state: Path) -> set[str]:
    """Return the marks of all live machines recorded below *state*."""
    return {str(owner["instance"]) for owner in owners(state) if marked(str(owner["instance"]))}


@pytest.mark.parametrize("killed", sample(["claimer", "pool", "both"], 1))
def test_killing_claimer_or_pool_leaves_no_machine(echo: str, state: Path, killed: str, full: bool) -> None:  # noqa: FBT001
    """SIGKILL of the claimer, the pool or both, at any moment of a run, leaves no machine behind."""
    moments = range(40, 400, 15) if full else (140,)
    argv = [*X07, "run", "--json", echo]
    kept = 1 if killed == "claimer" else 0

    def at_rest() -> bool:
        reported = status()
        return reported is None or (reported["ready"], reported["running"]) == (kept, 0)

    for moment in moments:
        with pool_process(1) as pool:
            front = (status() or {})["front"]
            child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moment / 1000)  # the test needs this exact moment
            if killed != "pool":
                child.kill()
            if killed != "claimer":
                os.kill(pool, signal.SIGKILL)
            child.communicate(b"late\n", timeout=120)
            # The pool replaces a claimed machine; after that only its warm machines may live.
            wait_for(at_rest, 120)
            # A killed pool's machines end moments after it.
            wait_for(lambda: len(alive(state)) <= kept, 60)
            wait_for(partial(lambda pid: is_front(pid) == (kept > 0), front), 60)
        wait_for(lambda: alive(state) == set(), 60)


@pytest.mark.usefixtures("state")
def test_runs_fall_back_to_clones_without_an_answer(echo: str) -> None:
    """Runs fall back to clones if the pool is stopped or dead, with a warning if it does not answer."""
    with pool_process(1) as pid:
        os.kill(pid, signal.SIGSTOP)
        result = ran(echo)
        assert result["phases"]["run"]["start"] == usual_start(), result["warnings"]
        assert [text for text in result["warnings"] if "the pool did not answer" in text]
        asked = x07("pool", "status")
        assert (asked.code, asked.out) == (125, b"")
        assert f"its process {pid} does not answer" in asked.err
        os.kill(pid, signal.SIGKILL)  # which ends a stopped process too
        assert ran(echo)["phases"]["run"]["start"] == usual_start()


@pytest.mark.full("one more pool")
@pytest.mark.usefixtures("state")
def test_a_clone_replaces_a_warm_machine_that_died(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone replaces a claimed machine that died before it got the program, with a warning."""
    leased = QemuBackend.leased

    def dead(
        backend: QemuBackend, lease: socket.socket, record: JobRecord, jail: str, fds: Mapping[str, int]
    ) -> LeasedInstance:
        for pid in marked(record.mark):
            os.kill(pid, signal.SIGKILL)
        return leased(backend, lease, record, jail, fds)

    monkeypatch.setattr(QemuBackend, "leased", dead)
    cancel = Cancel()
    with pool_process(1), contextlib.closing(cancel):
        result, _ = attempt(RunRequest(program=Path(echo)), RunCaller(cancel=cancel, machines=PoolClient()))
    assert (result.outcome, result.phases["run"].start) == ("ok", usual_start()), result.reason
    assert "no VM of the pool was used for the run: the VM did not answer" in result.warnings


@pytest.mark.full("one more pool")
def test_a_pool_start_that_waits_reports_it_and_can_be_stopped(
    echo: str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool start reports that it waits if too many machines run, and fails if the pool is stopped meanwhile."""
    del echo
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "1")
    with pool_process(1):  # fills the build cache
        pass
    with (
        contextlib.closing(Cancel()) as cancel,
        admitted(cancel_fd=cancel.fd, timeout_s=60),
        subprocess.Popen([*X07, "pool", "start"], stderr=subprocess.PIPE, text=True) as start,
    ):
        assert start.stderr is not None
        assert any("only 1 may run at once" in line for line in start.stderr)
        assert x07("pool", "stop").code == 0
        assert "it was stopped during its start" in start.stderr.read()
    assert start.returncode == 125
    assert left_behind(state) == []


def test_an_idle_pool_ends(state: Path) -> None:
    """A pool and its machines end after the idle time."""
    started = x07("pool", "start", "--size", "1", "--idle", "2")
    assert started.code == 0, started.err
    try:
        wait_for(lambda: status() is None, 120)
        wait_for(lambda: left_behind(state) == [], 60)
    finally:
        x07("pool", "stop")


def test_programs_run_from_short_lived_threads_and_from_asyncio(state: Path, echo: str, full: bool) -> None:  # noqa: FBT001
    """One pool serves short-lived threads and coroutines, and each gets its own program's output."""
    count = 50 if full else 2
    with Pool(size=2) as pool:
        futures: list[tuple[bytes, Future[Result]]] = []

        def submit(text: bytes) -> None:
            futures.append((text, pool.submit(echo, text)))

        for number in range(count):
            thread = threading.Thread(target=submit, args=(b"%d" % number,))
            thread.start()
            thread.join()
        for text, future in futures:
            result = future.result(300)
            assert result.stdout.text == f"got {text.decode()}\n", result.reason

        async def main() -> list[str | None]:
            loop = asyncio.get_running_loop()
            runs: list[asyncio.Future[Result]] = [
                loop.run_in_executor(pool, echo, b"%d" % number)  # type: ignore[arg-type] # the test submits programs
                for number in range(count)
            ]
            return [result.stdout.text for result in await asyncio.gather(*runs)]

        assert asyncio.run(main()) == [f"got {number}\n" for number in range(count)]
        assert [result.stdout.text for result in pool.map(echo, [b"a", b"b"])] == ["got a\n", "got b\n"]
    assert left_behind(state) == []


def test_a_pool_takes_what_run_program_takes(state: Path, echo: str, tmp_path: Path) -> None:
    """A pool streams output, uses a project's input, a policy and limits, and rejects an unknown option at once."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "main.py").write_text(ECHO)
    (project / "road").write_bytes(b"Ulm")
    text = (
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nfiles = ["main.py"]\nentry = "main.py"\n'
    )
    (project / "x07-sandbox.toml").write_text(f'{text}[run]\ninput = "road"\n')
    came: list[tuple[str, bytes]] = []
    descriptors = tmp_path / "descriptors.py"
    descriptors.write_text("import resource as r\nprint(input(), r.getrlimit(r.RLIMIT_NOFILE)[0])\n")
    with Pool(size=1) as pool:
        with pytest.raises(TypeError, match=re.escape("submit() got an unexpected keyword argument 'stdin'")):
            pool.submit(echo, stdin=b"x")  # type: ignore[call-arg]  # the point
        result = pool.submit(echo, input=b"a", on_output=lambda name, data: came.append((name, data))).result(300)
        assert (result.stdout.text, b"".join(data for _, data in came)) == ("got a\n", b"got a\n")
        assert {name for name, _ in came} == {"stdout"}
        assert pool.submit(project).result(300).stdout.text == "got Ulm\n"
        assert pool.submit(project, b"").result(300).stdout.text == "got \n"
        left = pool.submit(command=["sh", "-c", "cat a > b"], files={"a": b"1"}).result(300)
        assert left.files == {"b": b"1"}
        found = pool.map(descriptors, [b"a"], policy="built-in:cli", fds=64)
        assert [result.stdout.text for result in found] == ["a 64\n"]
        with pytest.raises(SandboxError, match=r"cannot use fds=4000|fds is 4000"):
            pool.submit(echo, fds=4000).result(300)
    assert left_behind(state) == []


def test_cancelling_a_future_and_an_exception_end_the_pools_runs(state: Path) -> None:
    """Cancelling a future, as asyncio does, or leaving the pool's block by an exception ends the VM of a program."""
    source = "import time\nprint('up', flush=True)\ntime.sleep(500)\n"

    def submit(pool: Pool) -> Future[Result]:
        is_up = threading.Event()
        future = pool.submit(source=source, toolchain="python", on_output=lambda _name, _data: is_up.set())
        assert is_up.wait(60)
        return future

    async def cancelled(future: Future[Result]) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(future), 0.01)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Pool(size=1) as pool:  # noqa: PT012 - the test needs the whole block
        first = submit(pool)
        asyncio.run(cancelled(first))
        assert wait([first], 30).done == {first}
        assert first.cancelled()
        assert [folder.name for folder in state.glob("*-run*") if not (folder / "done").is_file()] == []
        second = submit(pool)
        raise KeyboardInterrupt
    assert second.cancelled()
    assert time.monotonic() - began < 60  # and not a timeout
    assert left_behind(state) == []


@pytest.mark.full("one more VM; a forked child that submits is tested always")
def test_a_forked_child_cannot_use_its_parents_pool(state: Path, echo: str) -> None:
    """A forked child can neither take nor end a machine of its parent's pool."""
    machines = WarmMachines(1)
    machines.start()
    with contextlib.closing(machines):
        wait_for(lambda: machines.ready() == 1, 120)
        child = os.fork()
        if child == 0:
            taken = machines.take(claim(), own_identity(), machines.kind.ram_bytes)
            machines.close()
            os._exit(0 if taken is None else 1)
        assert os.waitpid(child, 0)[1] == 0
        machine = machines.take(claim(), own_identity(), machines.kind.ram_bytes)
        assert machine is not None
        assert machine.instance.exit_status() is None
        assert machine.close()
    assert left_behind(state) == []
    assert echo


def test_a_forked_child_cannot_submit_programs(state: Path, echo: str) -> None:
    """A forked child that submits a program to its parent's pool gets an error instead of hanging."""
    with Pool(size=1) as pool:
        child = os.fork()
        if child == 0:
            try:
                pool.submit(echo)
            except SandboxError as exc:
                os._exit(0 if "parent process" in exc.why else 2)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert left_behind(state) == []


def test_leaving_a_pool_waits_for_its_machines(state: Path) -> None:
    """Leaving the `with` block waits until every machine is gone, even after `shutdown(wait=False)`."""
    with Pool(size=1) as pool:
        pool.wait_ready(120)
        pool.shutdown(wait=False)
    assert left_behind(state) == []


def test_stopping_a_pool_ends_its_runs(state: Path, tmp_path: Path, echo: str) -> None:
    """`x07 pool stop` ends a run in one of its machines as lost, and its job is recorded as done."""
    assert echo
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("print('up', flush=True)\nimport time\ntime.sleep(50)\n")
    with pool_process(1):
        argv = [*X07, "run", str(sleeper)]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"up\n"
            assert x07("pool", "stop").code == 0
            child.communicate(timeout=60)
            assert child.returncode == 125
    assert left_behind(state) == []


@pytest.mark.usefixtures("state")
def test_a_pool_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool with no machines, with more than memory allows, or on an unknown image is refused with the reason."""
    for size in (0, 100_000):
        with pytest.raises(UsageError, match="whole number from 1 to"):
            Pool(size=size)
    with pytest.raises(SandboxError, match="nobody-made-this"):
        Pool(size=1, image="nobody-made-this")
    monkeypatch.setattr(warm, "memory_bytes", lambda: 1000 * settings.MIB)
    with pytest.raises(HostError, match="more than a quarter of the 1000 MiB"):
        Pool(size=1)
