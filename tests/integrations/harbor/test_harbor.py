"""The environment of Harbor: trials with Harbor's own agents, what is refused before them, and each of its methods."""

import asyncio
import contextvars
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harbor.environments.base import SandboxBuildFailedError
from harbor.models.task.config import EnvironmentConfig, NetworkMode, NetworkPolicy
from harbor.models.trial.paths import TrialPaths

from tests.oci_images import Entry, layer, layout
from x07_sandbox import Sandbox
from x07_sandbox.integrations.harbor import X07Environment, image_name
from x07_sandbox.jail.forms import needed_files

TASK = Path(__file__).parents[3] / "examples/harbor_task"
CLASS = "x07_sandbox.integrations.harbor:X07Environment"
IMAGE = "localhost/x07-harbor-test:1"
OFFLINE = NetworkPolicy(network_mode=NetworkMode.NO_NETWORK)
PROGRAMS = ("bash", "cat", "chmod", "cp", "find", "ls", "mkdir", "pwd", "rm", "touch", "true")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harbor sends nothing, and no saved processes are made of images."""
    monkeypatch.setenv("HARBOR_TELEMETRY", "0")
    monkeypatch.setenv("X07_VM_NO_HOT_CLONES", "1")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A guest image with the name for the task's container image, made of a few programs of the host."""
    folder = tmp_path_factory.mktemp("image")
    found = {name: shutil.which(name, path="/usr/bin:/bin") for name in PROGRAMS}
    files = {path for program in found.values() for path in needed_files(program)}
    entries = [Entry(f"bin/{name}", Path(path).read_bytes()) for name, path in found.items()]
    entries += [Entry(path.lstrip("/"), Path(path).read_bytes()) for path in files if path not in found.values()]
    dirs = [Entry(name, kind=b"5") for name in ("srv", "tmp", "root")]
    source = layout(folder / "layout", layer(*entries, *dirs), Env=["PATH=/bin"], WorkingDir="/srv")
    name = image_name(IMAGE)
    x07 = Path(sys.executable).with_name("x07")
    subprocess.run([x07, "image", "import", source, "--name", name], check=True, timeout=300)
    yield name
    subprocess.run([x07, "image", "rm", name], check=True, timeout=60)


def run(folder: Path, task: Path, *words: str) -> dict[str, Any]:
    """Run a job of Harbor, and return the result of its only trial."""
    harbor = [Path(sys.executable).with_name("harbor"), "run", "-p", task, "-e", CLASS, "-o", folder, "-y", "-q"]
    subprocess.run([*harbor, *words], check=False, timeout=300)
    return json.loads(next(folder.glob("*/*/result.json")).read_text())


def changed_task(tmp_path: Path, old: str, new: str) -> Path:
    """Return a copy of the example's task with another setting."""
    task = tmp_path / "task"
    shutil.copytree(TASK, task)
    text = (task / "task.toml").read_text()
    assert old in text
    (task / "task.toml").write_text(text.replace(old, new))
    return task


@pytest.mark.parametrize(("agent", "reward"), [("oracle", 1.0), ("nop", 0.0)])
def test_a_task_with_a_prebuilt_image(tmp_path: Path, imported: str, agent: str, reward: float) -> None:
    """The solution earns the reward, and an agent that does nothing does not."""
    assert imported in Sandbox.images()
    task = changed_task(tmp_path, "docker.io/library/debian:trixie-slim", IMAGE)
    result = run(tmp_path / "jobs", task, "-a", agent)
    assert result["exception_info"] is None
    assert result["verifier_result"]["rewards"] == {"reward": reward}


def test_a_refusal_comes_before_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose network is public starts no VM, and Harbor reports the reason."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "state"))
    task = changed_task(tmp_path, "no-network", "public")
    with pytest.raises(StopIteration):
        run(tmp_path / "jobs", task, "-a", "oracle", "--ek", "image=default")
    assert not (tmp_path / "state").exists()


def made(
    tmp_path: Path,
    *,
    network: NetworkPolicy = OFFLINE,
    files: tuple[str, ...] = (),
    **options: Any,  # noqa: ANN401 - of many types
) -> X07Environment:
    """Make an environment as Harbor does. files: of the folder environment of the task."""
    folder = tmp_path / "environment"
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).write_text("FROM scratch\n")
    docker_image = options.pop("docker_image", None)
    mounts = options.pop("mounts", None)
    config = EnvironmentConfig(docker_image=docker_image, memory_mb=400, env={"GREETING": "hi"})
    paths = TrialPaths(trial_dir=tmp_path)
    return X07Environment(
        folder, "task", "task__1__env", paths, config, network_policy=network, mounts=mounts, **options
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"files": ("Dockerfile",)}, "does not build a Dockerfile.* --ek image=NAME"),
        ({"files": ("docker-compose.yaml",), "image": "default"}, "docker-compose.yaml"),
        (
            {"docker_image": "none.example/a:1"},
            r"docker://none.example/a:1 --name none.example-a-1-\w",
        ),
        ({"image": "missing"}, "no guest image missing"),
        ({"image": "default", "network": NetworkPolicy()}, "public_hosts="),
        ({"image": "default", "mounts": [{"type": "bind", "source": "/", "target": "/host"}]}, "mounts no folders"),
    ],
)
def test_what_a_sandbox_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    """The error is raised before anything starts, and says what to do."""
    with pytest.raises(SandboxBuildFailedError, match=why):
        made(tmp_path, **options)


def test_force_build_is_refused(tmp_path: Path) -> None:
    """A Dockerfile is not built, even if the task also names an image."""
    environment = made(tmp_path, files=("Dockerfile",), image="default")
    with pytest.raises(SandboxBuildFailedError, match="--force-build"):
        asyncio.run(environment.start(force_build=True))


def test_hosts_are_those_that_the_user_and_the_task_list(tmp_path: Path) -> None:
    """A public network is what the user lists, and an allowlist has the ports of the web."""
    public = made(tmp_path, image="default", network=NetworkPolicy(), public_hosts=["pypi.org:443"])
    assert public._hosts() == ["pypi.org:443"]  # noqa: SLF001 - a sandbox with a network takes longer
    hosts = ["example.org", "192.0.2.1", "2001:db8::1"]
    listed = NetworkPolicy(network_mode=NetworkMode.ALLOWLIST, allowed_hosts=hosts)
    assert made(tmp_path, image="default", network=listed)._hosts() == [  # noqa: SLF001
        "example.org:80,443",
        "192.0.2.1:80,443",
        "[2001:db8::1]:80,443",
    ]
    wild = NetworkPolicy(network_mode=NetworkMode.ALLOWLIST, allowed_hosts=["*.example.org"])
    with pytest.raises(ValueError, match="wildcard hostnames is not supported by x07"):
        made(tmp_path, image="default", network=wild)


class Opened:
    """An environment that was started, for callers without an event loop."""

    def __init__(self, environment: X07Environment, runner: asyncio.Runner) -> None:
        self.environment, self.runner = environment, runner

    def __call__(self, method: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - of many types
        """Call a method."""
        call = getattr(self.environment, method)(*args, **options)
        return self.runner.run(call, context=contextvars.copy_context())  # Harbor keeps callbacks in it


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """An environment for the tests of its methods."""
    environment = made(tmp_path_factory.mktemp("trial"), image="default")
    with asyncio.Runner() as runner:
        runner.run(environment.start(force_build=False))
        yield Opened(environment, runner)
        runner.run(environment.stop(delete=True))


def test_commands_are_root_in_bash(opened: Opened) -> None:
    """A command has the task's variables and those of the call, and both streams apart."""
    command = "set -o pipefail; id -u; echo $GREETING $A; pwd; echo e >&2; exit 3"
    result = opened("exec", command, cwd="/usr", env={"A": "b"})
    assert (result.stdout, result.stderr, result.return_code) == ("0\nhi b\n/usr\n", "e\n", 3)


def test_a_timeout_has_a_code(opened: Opened) -> None:
    """After a timeout the code is 124, with the output so far and the reason."""
    result = opened("exec", "echo started; sleep 60", timeout_sec=1)
    assert (result.stdout, result.return_code, "time limit" in result.stderr) == ("started\n", 124, True)


def test_a_command_may_have_a_user(opened: Opened) -> None:
    """A task may let its agent be another user, by name or number; an unknown one is an error."""
    opened("exec", "echo bob:x:1000:1000::/home/bob:/bin/bash >> /etc/passwd; echo bob:x:1000: >> /etc/group")
    for user in ("bob", 1000):
        result = opened("exec", "id -un; echo $A; pwd; exit 4", cwd="/tmp", env={"A": "b"}, user=user)  # noqa: S108
        assert (result.stdout, result.return_code) == ("bob\nb\n/tmp\n", 4)
    assert opened("exec", "true", user="alice").return_code == 126
    with opened.environment.with_default_user("bob"):
        assert opened("exec", "id -un").stdout == "bob\n"
    assert opened("exec", "id -u", user="root").stdout == "0\n"


def test_output_is_streamed_to_callbacks(opened: Opened) -> None:
    """Agents that follow their output get it."""
    seen = []

    async def callback(text: str, stream: str) -> None:
        seen.append((stream, text))

    with opened.environment.scoped_output_callback(callback):
        opened("exec", "echo out; echo err >&2")
    assert [each for each in seen if each[1]] == [("stdout", "out\n"), ("stderr", "err\n")]


def test_folders_are_copied_both_ways(opened: Opened, tmp_path: Path) -> None:
    """A folder is merged into one that exists, with modes, and links out of it do not reach the host."""
    (tmp_path / "up/sub").mkdir(parents=True)
    (tmp_path / "up/sub/run.sh").write_text("echo ran\n")
    (tmp_path / "up/sub/run.sh").chmod(0o755)
    opened("exec", "mkdir -p '/a b' && echo old > '/a b/old'")
    opened("upload_dir", tmp_path / "up", "/a b")
    assert opened("exec", "cat '/a b/old'; '/a b/sub/run.sh'; ls -d /x07-*").stdout == "old\nran\n"
    opened("exec", "ln -s /etc/passwd '/a b/out'; ln -s old '/a b/in'; mkfifo '/a b/pipe'")
    (tmp_path / "down").mkdir()
    (tmp_path / "down/mine").write_text("mine")
    opened("download_dir", "/a b", tmp_path / "down")
    assert sorted(path.name for path in (tmp_path / "down").iterdir()) == ["in", "mine", "old", "sub"]
    assert (tmp_path / "down/in").read_text() == "old\n"


def test_files_are_copied_both_ways(opened: Opened, tmp_path: Path) -> None:
    """A file gets the folders above it, and a folder in place of a file is an error."""
    (tmp_path / "file").write_bytes(b"\0\1")
    opened("upload_file", tmp_path / "file", "/new/folder/file")
    opened("download_file", "/new/folder/file", tmp_path / "sub/copy")
    assert (tmp_path / "sub/copy").read_bytes() == b"\0\1"
    with pytest.raises(IsADirectoryError):
        opened("download_file", "/new/folder", tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        opened("download_file", "/new/missing", tmp_path / "copy")
    opened("download_dir_with_exclusions", source_dir="/new", target_dir=tmp_path / "part", exclude=["none"])
    assert (tmp_path / "part/folder/file").exists()


def test_a_stopped_environment_is_an_error(tmp_path: Path) -> None:
    """After the end nothing runs, and stopping again is harmless."""
    environment = made(tmp_path, image="default")

    async def use() -> None:
        await environment.start(force_build=False)
        await environment.stop(delete=False)
        await environment.stop(delete=True)
        with pytest.raises(RuntimeError, match="stopped"):
            await environment.exec("true")

    asyncio.run(use())
