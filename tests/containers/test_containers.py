"""Runs in containers of real engines: isolation, refusals, and cleanup after kills."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import need
from tests.engines import REFERENCE, archive_in, ctr
from tests.vm.jail_helpers import temporary_user
from x07_sandbox import exec_command
from x07_sandbox.backends.container import reaper
from x07_sandbox.backends.containerd import ContainerdBackend
from x07_sandbox.backends.engines import engine as the_engine
from x07_sandbox.backends.engines import load
from x07_sandbox.backends.podman import engine_gaps
from x07_sandbox.images.store import find_image
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.records.stopping import Orphan, live_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engines import EngineUnderTest
    from x07_sandbox.backends.engines import Client
    from x07_sandbox.records.runs import JobRecord

pytestmark = pytest.mark.root
X07 = str(Path(sys.executable).with_name("x07"))
LOOK = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
shown = {name: int(status[name], 16) for name in ("CapBnd", "CapEff", "CapPrm", "CapInh")}
shown |= {"uid": os.getuid(), "groups": os.getgroups(), "adj": open("/proc/self/oom_score_adj").read().strip()}
shown |= {"nnp": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(), "up": os.listdir("/sys/class/net")}
def tried(call):
    try: call()
    except OSError as exc: return type(exc).__name__
    return "done"
shown["tried"] = [
    tried(lambda: open("/etc/x", "w")), tried(lambda: open("/x07/in/x", "w")), tried(lambda: os.kill(1, 9)),
    tried(lambda: os.listdir("/proc/1/fd")), tried(lambda: open("/x07/out/x", "w")),
]
print(json.dumps(shown))
"""


DOCKER = pytest.param("docker", marks=pytest.mark.full("podman runs the same code"))
ALL = pytest.mark.parametrize("engine", ["podman", "docker", "containerd"], indirect=True)
ENGINES = pytest.mark.parametrize("engine", ["podman", DOCKER], indirect=True)


@pytest.fixture(params=["podman", DOCKER, "containerd"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, state: Path) -> EngineUnderTest:  # noqa: ARG001 - records of its own
    """Each engine, with its own state folder."""
    found: EngineUnderTest = request.getfixturevalue(request.param)
    for name, value in found.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
    return found


def x07(engine: EngineUnderTest, *words: str, code: int = 0) -> str:
    """Return the output of `x07 run` on that engine, which must exit with *code*."""
    argv = [X07, "run", "--backend", engine.name, *words]
    done = subprocess.run(argv, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == code, said
    return said


def result_of(engine: EngineUnderTest, tmp_path: Path, source: str, *words: str) -> dict[str, Any]:
    """Return the result of a Python program."""
    program, report = tmp_path / "prog.py", tmp_path / "result.json"
    program.write_text(source, encoding="utf-8")
    argv = [X07, "run", "--backend", engine.name, "--report-out", str(report), *words, str(program)]
    subprocess.run(argv, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


@ALL
def test_the_program_has_no_rights_of_the_agent(engine: EngineUnderTest, tmp_path: Path) -> None:
    """The program can gain no capability, is the OOM killer's first victim, and cannot reach the agent or its files."""
    result = result_of(engine, tmp_path, LOOK)
    shown = json.loads(result["stdout"]["text"])
    assert [shown.pop(name) for name in ("CapBnd", "CapEff", "CapPrm", "CapInh")] == [0, 0, 0, 0]
    tried = ["OSError", "PermissionError", "PermissionError", "PermissionError", "PermissionError"]
    assert shown == {
        "uid": 65532,
        "groups": [],
        "adj": "1000",
        "nnp": "1",
        "seccomp": "2",
        "up": ["lo"],
        "tried": tried,
    }
    assert (result["isolation"], result["backend"]) == ("container", engine.name)
    assert result["digests"]["image"] == engine.digest


def test_a_command_works_in_a_folder_and_leaves_files(
    engine: EngineUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command's changes to its copy of a folder come back, and so do files in its private folders."""
    monkeypatch.setenv("X07_VM_BACKEND", engine.name)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "in").write_text("1")
    script = "cat in > out; echo no > ../private"
    found = exec_command(["sh", "-c", script], folder)
    assert (found.outcome, found.files) == ("ok", {"private": b"no\n"}), found.reason
    assert (folder / "out").read_text() == "1"
    script = "cat a > b; mkdir d; echo x > /x07/out/c; mkdir -m 0 closed"
    found = exec_command(["sh", "-c", script], files={"a": b"2"})
    assert (found.outcome, found.files) == ("ok", {"b": b"2", "c": b"x\n"}), found.reason
    assert exec_command(["no-such-command"]).exit_code == 127


@contextlib.contextmanager
def waiting_run(engine: EngineUnderTest, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], JobRecord]]:
    """Yield a run whose program waits, and the job's record."""
    program = folder / "wait.py"
    program.write_text("print('here', flush=True)\nimport time\ntime.sleep(600)\n", encoding="utf-8")
    own = {
        **os.environ,
        "X07_NO_FRONT": "1",
    }  # else a pool of another test may run it, and signals reach its client only
    command = [X07, "run", "--backend", engine.name, str(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=own) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"here\n"
        (record,) = live_records(engine.name)
        try:
            yield runner, record
        finally:
            runner.send_signal(signal.SIGCONT)  # a failed test may leave it stopped
            runner.send_signal(signal.SIGINT)


SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Plays the client of a task whose shim starts late: once the container was deleted.
LATE = """
import os, subprocess, sys
words, info = sys.argv[1].split("\\n"), [*sys.argv[2:-3], "containers", "info", sys.argv[-1]]
while not subprocess.run(info, capture_output=True).returncode:
    pass
os.execv(words[0], words)
"""


@pytest.mark.parametrize("engine", ["containerd"], indirect=True)
@pytest.mark.parametrize("case", ["no container", "no task", "a client that is starting a task"])
def test_no_shim_outlives_its_container(engine: EngineUnderTest, case: str) -> None:
    """A container is gone only once it has no shim and none is being started; a shim without a task is killed."""
    container = "x07-1764273600000-4711-0-run"
    shim = [*SLEEP, "-namespace", "x07", "-id", container, "-address", "/no.sock"]  # this one makes no task
    client = [sys.executable, "-c", LATE, "\n".join(shim), *ctr(engine.env["X07_VM_CONTAINERD_SOCK"])]
    words = [*client, "tasks", "start", container] if case.startswith("a client") else shim
    if case != "no container":
        reference = engine.call("images", "ls", "--quiet").split()[0]
        engine.call("containers", "create", "--snapshotter", "overlayfs", reference, container)
    with subprocess.Popen(words) as process:
        try:
            assert ContainerdBackend().remove(Orphan(id=container, labels={}))
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()
    assert engine.containers() == []


VIEW = """
import json, os, pty, sys
groups = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
limits = [open(path).read().strip() for path in groups if os.path.exists(path)]
times = [os.lstat(path).st_mtime_ns for path in sys.argv[1:]]
print(json.dumps([limits, os.ttyname(pty.openpty()[1]), times]))
"""


def test_a_container_shows_memory_limit_terminals_and_mtimes(engine: EngineUnderTest, tmp_path: Path) -> None:
    """Runtimes see the container's memory limit, terminals can be opened, and files keep the host's mtimes."""
    paths = []
    for root in ("in", "out"):
        (tmp_path / root / "sub").mkdir(parents=True)
        (tmp_path / root / "sub/file").write_text("x", encoding="ascii")
        paths += [str(tmp_path / root / name) for name in ("sub/file", "sub")]
    for number, path in enumerate(paths):
        os.utime(path, ns=(0, 1_700_000_000_000_000_001 + number))
    roots = ("--allow-read-root", str(tmp_path / "in"), "--allow-write-root", str(tmp_path / "out"))
    (tmp_path / "prog.py").write_text(VIEW, encoding="utf-8")
    limits, terminal, times = json.loads(x07(engine, *roots, str(tmp_path / "prog.py"), *paths))
    memory = default_policy().limits.mem_bytes
    assert memory <= int(limits[0]) < memory + (128 << 20)  # the agent is in the same group
    assert terminal == "/dev/pts/0"
    assert times == [1_700_000_000_000_000_001 + number for number in range(4)]


def test_a_container_carries_the_labels_of_its_record(engine: EngineUnderTest, tmp_path: Path) -> None:
    """A container's labels for schema, run, runner, deadline and image match the job's record."""
    with waiting_run(engine, tmp_path) as (runner, record):
        labels = engine.labels(f"x07-{record.job_id}")
        runner.send_signal(signal.SIGINT)
        assert runner.wait(60) == 130
    assert {name: labels[name] for name in record.labels()} == record.labels()
    assert labels["io.x07.deadline_unix_ms"] == str(json.loads(job_of(record.folder))["deadline_unix_ms"])
    assert labels["io.x07.image_digest"] == engine.digest
    assert engine.containers() == []


def job_of(folder: Path) -> str:
    """Return a job's record as read from disk."""
    return (folder / "job.json").read_text(encoding="utf-8")


@ALL
def test_a_container_ends_with_its_runner(engine: EngineUnderTest, tmp_path: Path) -> None:
    """A killed runner's container is removed at once, without a sweep, and its record says so."""
    with waiting_run(engine, tmp_path) as (runner, record):
        runner.kill()
    wait_until(lambda: not engine.containers() and (record.folder / "reaped").exists())
    assert (record.folder / "reaped").read_text(encoding="ascii") == "reaped\n"


@ENGINES
def test_a_container_ends_at_its_deadline(engine: EngineUnderTest, tmp_path: Path) -> None:
    """The reaper removes a container at its deadline even if the runner is stopped and still holds it."""
    container = engine.call("create", "--network", "none", engine.digest, "container", "mark").strip()
    runner_r, runner_w = os.pipe()
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + 1
    removing = client(engine).argv("rm", "--force", container)
    argv = [sys.executable, "-I", "-S", reaper.__file__, str(tmp_path), str(until), str(runner_r), *removing]
    with subprocess.Popen(argv, pass_fds=(runner_r,), env=client(engine).env) as process:
        os.close(runner_r)
        assert engine.containers() != []
        assert process.wait(60) == 0
    os.close(runner_w)
    assert engine.containers() == []
    assert (tmp_path / "reaped").exists()


def client(engine: EngineUnderTest) -> Client:
    """Return the engine's client as the backend uses it."""
    assert engine.name != "containerd"
    assert engine.name != "apple-container"
    return the_engine(engine.name)


def states_of(pid: int) -> set[str]:
    """Return the states of all threads of a process, such as T for a stopped one (proc_pid_stat(5))."""
    return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()}


def wait_until(met: Callable[[], bool]) -> None:
    """Poll until a condition holds that no event announces."""
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_the_pinned_image_runs(engine: EngineUnderTest, tmp_path: Path) -> None:
    """X07_VM_GUEST_IMAGE_DIGEST pins the image id; any other image is refused even if weaker isolation is accepted."""
    os.environ["X07_VM_GUEST_IMAGE_DIGEST"] = engine.digest
    try:
        assert result_of(engine, tmp_path, "print(1)")["outcome"] == "ok"
        os.environ["X07_VM_GUEST_IMAGE_DIGEST"] = "sha256:" + "0" * 64
        result = result_of(engine, tmp_path, "print(1)")
    finally:
        del os.environ["X07_VM_GUEST_IMAGE_DIGEST"]
    assert (result["outcome"], "X07_VM_GUEST_IMAGE_DIGEST" in result["reason"]) == ("refused", True)


@ENGINES
def test_an_absent_or_unsuitable_image_is_named(engine: EngineUnderTest, tmp_path: Path) -> None:
    """An absent or unsuitable image is named in the error, with the command that builds the right one."""
    with (tmp_path / "empty.tar").open("wb") as file:
        file.write(bytes(10240))
    engine.call("import", str(tmp_path / "empty.tar"), "localhost/other:1")
    program = tmp_path / "prog.py"
    program.write_text("print(1)", encoding="utf-8")
    for name in ("localhost/other:1", "localhost/absent:1"):
        said = x07(engine, "--image", name, str(program), code=125)
        assert name in said
        assert "x07 image load" in said
        assert "scripts/build_guest_runner_image.sh" in said
    assert engine.containers() == []


def test_a_container_reaches_the_network_only_through_the_gate(engine: EngineUnderTest, tmp_path: Path) -> None:
    """With a list of hosts a container asks the egress gate; without one it has no network access."""
    ask = (
        "import socket\ntry: socket.create_connection(('{}', 443), 5)\nexcept OSError as exc: print(type(exc).__name__)"
    )
    result = result_of(engine, tmp_path, ask.format("unlisted.example"), "--allow-host", "listed.example:443")
    assert (result["outcome"], result["stdout"]["text"]) == ("ok", "gaierror\n")
    assert [row["host"] for row in result["net"]["denied"]] == ["unlisted.example"]
    result = result_of(engine, tmp_path, ask.format("93.184.215.14"))
    assert result["stdout"]["text"] in {"OSError\n", "ConnectionRefusedError\n"}


def test_weaker_isolation_needs_acceptance(engine: EngineUnderTest, tmp_path: Path) -> None:
    """A container engine is refused unless weaker isolation is accepted, and nothing is started."""
    del os.environ["X07_I_ACCEPT_WEAKER_ISOLATION"]
    program = tmp_path / "prog.py"
    program.write_text("print(1)", encoding="utf-8")
    assert "--i-accept-weaker-isolation" in x07(engine, str(program), code=125)
    assert engine.containers() == []


@pytest.mark.usefixtures("podman")
def test_rootless_podman_that_would_ignore_the_limits_is_refused() -> None:
    """Rootless podman on cgroup v1 is refused, because it would start a container without its limits."""
    need(
        Path("/sys/fs/cgroup/memory").is_dir(), "this host has cgroup v2, where rootless limits hold", installable=False
    )
    with contextlib.ExitStack() as stack:
        user = stack.enter_context(temporary_user())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        os.chown(folder, user.pw_uid, user.pw_gid)
        env = {"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "XDG_RUNTIME_DIR": str(folder), "LC_ALL": "C"}
        argv = ["setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups", "--"]
        info = subprocess.run(
            [*argv, "/usr/bin/podman", "info", "--format", "json"],
            capture_output=True,
            check=True,
            env=env,
            timeout=60,
            cwd="/",
        )
    assert engine_gaps("podman", json.loads(info.stdout)) == ["memory", "tasks"]


@pytest.mark.usefixtures("state")
def test_a_run_makes_few_calls_of_podman(
    podman: EngineUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run calls podman six times, and four times once its limits and the image were looked up since the boot."""
    client, log, program = tmp_path / "logging-podman", tmp_path / "calls", tmp_path / "prog.sh"
    program.write_text("#!/bin/sh\necho hello\n", encoding="ascii")
    program.chmod(0o755)
    inner = podman.env["X07_VM_PODMAN_BIN"]
    client.write_text(f'#!/bin/sh\necho "$*" >>{log}\nexec {inner} "$@"\n', encoding="ascii")
    client.chmod(0o755)
    for name, value in {**podman.env, "X07_VM_PODMAN_BIN": str(client), "X07_I_ACCEPT_WEAKER_ISOLATION": "1"}.items():
        monkeypatch.setenv(name, value)
    calls = []
    for _ in range(2):
        log.write_text("", encoding="ascii")
        assert x07(podman, "--toolchain", "executable", str(program)) == "hello\n"
        calls.append([line.removeprefix("--runtime runc ").split()[0] for line in log.read_text().splitlines()])
    assert calls == [
        ["info", "image", "create", "inspect", "start", "rm"],
        ["create", "inspect", "start", "rm"],
    ]
    assert podman.containers() == []


@ENGINES
def test_a_name_that_moves_to_another_image_is_noticed(engine: EngineUnderTest, tmp_path: Path) -> None:
    """A run uses the image that has the name now, even if an earlier run of this boot has looked the name up."""
    name = "localhost/moving:1"
    with (tmp_path / "empty.tar").open("wb") as file:
        file.write(bytes(10240))
    program = tmp_path / "prog.sh"
    program.write_text("echo hello\n", encoding="ascii")
    for _ in range(2):
        engine.call("tag", engine.digest, name)
        for _ in range(2):
            assert x07(engine, "--image", name, str(program)) == "hello\n"
        engine.call("import", str(tmp_path / "empty.tar"), "localhost/empty:1")
        engine.call("tag", "localhost/empty:1", name)
        assert "it lacks x07's labels" in x07(engine, "--image", name, str(program), code=125)
        engine.call("rmi", name)
        assert "there is no guest image" in x07(engine, "--image", name, str(program), code=125)
    assert engine.containers() == []


@pytest.mark.usefixtures("state")
def test_crun_runs_a_program(podman: EngineUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Podman's own runtime, crun, runs a program as runc does, if the host's control groups allow it."""
    client = tmp_path / "crun-podman"
    inner = podman.env["X07_VM_PODMAN_BIN"]
    # crun refuses a host with both versions of control groups; in its own mount namespace it sees only one.
    script = f'umount /sys/fs/cgroup/unified 2>/dev/null; exec {inner} --runtime crun "$@"'
    lines = ["#!/bin/bash", 'words=(); for w; do [[ $w == --runtime || $w == runc ]] || words+=("$w"); done']
    lines.append(f'exec unshare --mount sh -c {shlex.quote(script)} podman "${{words[@]}}"')
    client.write_text("\n".join(lines) + "\n", encoding="ascii")
    client.chmod(0o755)
    for name, value in {**podman.env, "X07_VM_PODMAN_BIN": str(client), "X07_I_ACCEPT_WEAKER_ISOLATION": "1"}.items():
        monkeypatch.setenv(name, value)
    result = result_of(podman, tmp_path, LOOK)
    assert (result["outcome"], json.loads(result["stdout"]["text"])["uid"]) == ("ok", 65532), result["reason"]
    assert podman.containers() == []


def test_every_engine_loads_the_image_under_the_same_id(
    podman: EngineUnderTest, docker: EngineUnderTest, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive has the same bytes each time, and podman, docker and ctr load it under the same image id."""
    for name, value in {**podman.env, **docker.env}.items():
        monkeypatch.setenv(name, value)
    first, second = archive_in(shared).path, tmp_path / "second.tar"
    loaded = load(find_image("default"), REFERENCE, [], lambda _text: None, second)
    assert loaded == (podman.digest, ("podman", "docker"))
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}) == 1
    assert REFERENCE in containerd_images(tmp_path, first)


def containerd_images(folder: Path, archive: Path) -> str:
    """Return the images that a separate containerd lists after importing an archive."""
    place = tempfile.mkdtemp(prefix="x07-ctr-", dir="/run")
    config = folder / "containerd.toml"
    config.write_text(
        f'version = 2\nroot = "{folder}/root"\nstate = "{place}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "{place}/c.sock"\n',
        encoding="ascii",
    )
    daemon = subprocess.Popen(["/usr/bin/containerd", "--config", str(config), "--log-level", "error"])
    try:
        wait_until(Path(place, "c.sock").exists)
        ctr = ["ctr", "--address", f"{place}/c.sock", "--namespace", "x07test", "images"]
        subprocess.run(
            [*ctr, "import", "--snapshotter", "native", "--no-unpack", str(archive)], check=True, timeout=120
        )
        return subprocess.run([*ctr, "ls", "-q"], check=True, timeout=60, capture_output=True).stdout.decode()
    finally:
        daemon.terminate()
        daemon.wait(60)
        shutil.rmtree(place, ignore_errors=True)


def test_the_script_builds_and_loads_the_image(podman: EngineUnderTest, tmp_path: Path, state: Path) -> None:
    """scripts/build_guest_runner_image.sh ends with `ok: built NAME:TAG`; X07_VM_GUEST_IMAGE selects that image."""
    script = str(Path(__file__).parents[2] / "scripts" / "build_guest_runner_image.sh")
    env = {**os.environ, **podman.env, "DOCKER_HOST": f"unix://{tmp_path}/nobody"}
    del env["X07_VM_GUEST_IMAGE"]
    argv = [script, "--image", "localhost/x07-guest-runner", "--tag", "scripted"]
    done = subprocess.run(argv, env=env, capture_output=True, timeout=300, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == "ok: built localhost/x07-guest-runner:scripted"
    program = tmp_path / "prog.py"
    program.write_text("print('scripted')", encoding="utf-8")
    env |= {"X07_VM_GUEST_IMAGE": "localhost/x07-guest-runner:scripted", "X07_I_ACCEPT_WEAKER_ISOLATION": "1"}
    env |= {"X07_VM_BACKEND": "podman", "X07_VM_STATE_DIR": str(state), "X07_VM_GUEST_IMAGE_DIGEST": podman.digest}
    done = subprocess.run([X07, "run", str(program)], env=env, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, b"scripted\n"), done.stderr
    assert subprocess.run([script, "--nothing"], env=env, capture_output=True, check=False).returncode == 2


@pytest.mark.full("tests/vm/test_smoke_gate.py passes the gate, tests/contract the behaviours")
def test_the_smoke_gate_passes_on_an_engine(engine: EngineUnderTest, tmp_path: Path) -> None:
    """scripts/ci/check_vm_sandbox_smoke.sh passes on a container engine whose weaker isolation is accepted."""
    gate = Path(__file__).parents[2] / "scripts" / "ci" / "check_vm_sandbox_smoke.sh"
    env = {**os.environ, **engine.env, "X07_VM_BACKEND": engine.name, "TMPDIR": str(tmp_path)}
    env["PATH"] = f"{Path(X07).parent}:{env['PATH']}"
    done = subprocess.run([gate], env=env, capture_output=True, timeout=300, check=False, stdin=subprocess.DEVNULL)
    lines = done.stdout.decode().splitlines()
    assert lines[-1:] == ["ok: VM sandbox smoke passed"], lines
    assert {line.split(":")[1] for line in lines if line.startswith("skip:")} <= {" sweep", " x07-program", " bundle"}
    assert engine.containers() == []


def test_ps_and_kill_work_for_containers_of_their_engine_only(engine: EngineUnderTest, tmp_path: Path) -> None:
    """`x07 ps` lists a running container, `x07 kill` ends it, and leaves the container of another engine alone."""
    with waiting_run(engine, tmp_path) as (runner, record):
        shown = json.loads(subprocess.run([X07, "ps", "--json"], capture_output=True, check=True).stdout)
        assert [job["state"] for job in shown["jobs"]] == ["running"]
        client = {"podman": "PODMAN", "docker": "DOCKER", "containerd": "CTR"}[engine.name]
        other = {**os.environ, f"X07_VM_{client}_BIN": "/bin/true"}
        runner.send_signal(signal.SIGSTOP)  # else the runner itself ends its container
        wait_until(lambda: states_of(runner.pid) == {"T"})  # on a busy host it may still run for a moment
        done = subprocess.run([X07, "kill", record.run_id], env=other, capture_output=True, check=False, timeout=60)
        assert (done.returncode, b"another" in done.stderr) == (125, True), done.stderr
        assert not (record.folder / "reaped").exists()
        runner.send_signal(signal.SIGCONT)
        subprocess.run([X07, "kill", record.run_id], check=True, timeout=60)
        assert runner.wait(60) == 143
    assert engine.containers() == []
