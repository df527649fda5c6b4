"""Real container runtimes for tests, loaded with our image: podman with its own store, dockerd and containerd.

The daemons have their own sockets. The host's own runtimes, firewall and networks are not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from x07_sandbox.backends.engines import engine
from x07_sandbox.host.linux import of_process
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.processes import processes_with_mark, wait_gone
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.images.archive import write_archive
from x07_sandbox.images.build import build_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from x07_sandbox.backends.engines import Name

REFERENCE = "x07-guest-runner:test"
FOLDERS: set[str] = set()
"""The folders of the daemons that this process runs."""
_START_S = 30.0
_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}
_TOOLS = {
    "podman": ("podman", "runc"),
    "docker": ("docker", "dockerd", "containerd", "runc"),
    "containerd": ("ctr", "containerd", "runc"),
}
_DOCKERD = (
    *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
    *("--bridge=none", "--userland-proxy=false", "--log-level=warn", "--shutdown-timeout=2"),
)


class EngineUnderTest(NamedTuple):
    """A running engine. env: variables by which a backend finds it and our image. digest: the image's id."""

    name: Name | Literal["containerd", "apple-container"]
    env: Mapping[str, str]
    digest: str

    def call(self, *words: str) -> str:
        """Return the client's output. Raises CalledProcessError if it fails."""
        argv = [self.env.get("X07_VM_PODMAN_BIN", f"/usr/bin/{self.name}"), *words]
        if self.name == "containerd":
            argv = [*ctr(self.env["X07_VM_CONTAINERD_SOCK"]), *words]
        elif self.name == "apple-container":
            argv = [self.env["X07_VM_APPLE_CONTAINER_BIN"], *words]
        done = subprocess.run(argv, capture_output=True, timeout=60, check=True, env=_ENV | dict(self.env))
        return done.stdout.decode()

    def labels(self, container: str) -> dict[str, str]:
        """Return the labels of a container."""
        if self.name == "containerd":
            found: dict[str, str] = json.loads(self.call("containers", "info", container))["Labels"]
        else:
            found = json.loads(self.call("inspect", container))[0]["Config"]["Labels"]
        return found

    def containers(self) -> list[str]:
        """Return the names of all its containers."""
        if self.name == "containerd":
            return self.call("containers", "ls", "--quiet").split()
        if self.name == "apple-container":
            listed = json.loads(self.call("list", "--all", "--format", "json"))
            return [one["configuration"]["id"] for one in listed]
        return self.call("ps", "--all", "--format", "{{.Names}}").split()


def ctr(address: str) -> list[str]:
    """Return the start of a command for a containerd."""
    return ["/usr/bin/ctr", "--address", address, "--namespace", "x07"]


def shims_left() -> list[str]:
    """Return the shims of this process's daemons, after those of jobs that ended just now have had time to end."""
    found = [one for folder in FOLDERS for one in processes_with_mark(folder)]
    shims = [one for one in found if b"/containerd-shim" in (of_process(one.pid, "cmdline") or b"").split(b"\0")[0]]
    deadline = Deadline.after(_START_S)
    return [f"shim {one.pid}" for one in shims if not wait_gone(one, deadline.left_s())]


def missing(name: str) -> str:
    """Return why this engine cannot be tested here, or ""."""
    if os.geteuid() != 0:
        return f"{name} with a store of its own needs root"
    absent = [tool for tool in _TOOLS[name] if shutil.which(tool, path=_ENV["PATH"]) is None]
    return f"missing: {', '.join(absent)}" if absent else ""


class Archive(NamedTuple):
    """Our image in a file, as REFERENCE, and its id."""

    path: Path
    digest: str


def archive_in(folder: Path) -> Archive:
    """Return the archive in a folder that all workers share; the first one writes it, which takes seconds."""
    note = folder / "image.id"
    with file_lock(folder / "image.lock"):
        if not note.exists():
            image = build_image(progress=lambda _text: None)
            with tempfile.TemporaryDirectory(dir=folder) as work, (folder / "image.tar").open("wb") as target:
                digest = write_archive(image, REFERENCE, target, Path(work), lambda _text: None)
            note.write_text(digest, encoding="ascii")
    return Archive(folder / "image.tar", note.read_text(encoding="ascii"))


@contextlib.contextmanager
def running(name: Name, archive: Archive) -> Iterator[EngineUnderTest]:
    """Start the engine and load our image; remove all of it on exit."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"x07-{name}-", dir="/var/tmp")))
        env = stack.enter_context((podman_store if name == "podman" else dockerd)(folder))
        with _variables(env):
            loaded = engine(name).call("load", "--quiet", "--input", str(archive.path), timeout_s=300)
            assert loaded.status == 0, loaded.error
        yield EngineUnderTest(name, env | {"X07_VM_GUEST_IMAGE": REFERENCE}, archive.digest)


@contextlib.contextmanager
def running_containerd(archive: Archive) -> Iterator[EngineUnderTest]:
    """Start a containerd and import our image; remove all of it on exit."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="x07-ctr-", dir="/var/tmp")))
        address = stack.enter_context(containerd(folder))
        found = EngineUnderTest("containerd", {"X07_VM_CONTAINERD_SOCK": address, "X07_VM_GUEST_IMAGE": REFERENCE}, "")
        found.call("images", "import", "--snapshotter", "overlayfs", str(archive.path))
        listed = found.call("images", "ls").splitlines()[1].split()
        yield found._replace(digest=listed[2])


def apple_container(podman: EngineUnderTest, folder: Path, version: str) -> EngineUnderTest:
    """Return a stand-in for this version of Apple's `container`, which runs containers of *podman*."""
    kept = folder / "containers"
    kept.mkdir()
    client = folder / "container"
    script = Path(__file__).with_name("apple_container.py")
    words = f"{sys.executable} {script} {version} {kept} {podman.env['X07_VM_PODMAN_BIN']}"
    client.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="ascii")
    client.chmod(0o755)
    env = {"X07_VM_APPLE_CONTAINER_BIN": str(client), "X07_VM_GUEST_IMAGE": podman.env["X07_VM_GUEST_IMAGE"]}
    return EngineUnderTest("apple-container", env, podman.digest)


@contextlib.contextmanager
def _variables(env: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def podman_store(folder: Path) -> Iterator[dict[str, str]]:
    """Make a podman with a store below *folder*; yield the variable by which a backend finds it."""
    client = folder / "podman"
    words = f"--root {folder}/store --runroot {folder}/run --storage-driver overlay"
    client.write_text(f'#!/bin/sh\nexec /usr/bin/podman {words} "$@"\n', encoding="ascii")
    client.chmod(0o755)
    try:
        yield {"X07_VM_PODMAN_BIN": str(client)}
    finally:
        _quietly(str(client), "rm", "--all", "--force", "--time", "0")
        _unmounted(folder)


@contextlib.contextmanager
def dockerd(folder: Path) -> Iterator[dict[str, str]]:
    """Run a Docker daemon below *folder*; yield the variables by which clients find it."""
    (folder / "daemon.json").write_text("{}", encoding="ascii")
    host = f"unix://{folder}/docker.sock"
    argv = ["dockerd", "--config-file", f"{folder}/daemon.json", "--host", host, "--data-root", f"{folder}/data"]
    argv += ["--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/docker.pid", "--cgroup-parent", f"/{folder.name}"]
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen([*argv, *_DOCKERD], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_ENV)
    FOLDERS.add(str(folder))
    try:
        deadline = time.monotonic() + _START_S
        while _quietly("docker", "--host", host, "info"):
            said = (folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
            assert daemon.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield {"DOCKER_HOST": host}
    finally:
        listed = subprocess.run(
            ["/usr/bin/docker", "--host", host, "ps", "--all", "--quiet"],
            capture_output=True,
            check=False,
            env=_ENV,
            timeout=60,
        )
        if ids := listed.stdout.decode().split():
            _quietly("docker", "--host", host, "rm", "--force", *ids)
        FOLDERS.discard(str(folder))
        _ended(daemon)
        _unmounted(folder)
        for group in Path("/sys/fs/cgroup").glob(f"*/{folder.name}"):
            with contextlib.suppress(OSError):
                group.rmdir()


@contextlib.contextmanager
def containerd(folder: Path) -> Iterator[str]:
    """Run containerd below *folder*, and yield its socket. The folder's path must be short (unix(7))."""
    address = f"{folder}/c.sock"
    # These three plugins would make files outside of the folder.
    disabled = ", ".join(f'"io.containerd.{name}"' for name in ("grpc.v1.cri", "internal.v1.opt", "nri.v1.nri"))
    lines = f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\ndisabled_plugins = [{disabled}]\n'
    (folder / "config.toml").write_text(f'{lines}[grpc]\naddress = "{address}"\n', encoding="ascii")
    with (folder / "log").open("wb") as log:
        argv = ["containerd", "--config", f"{folder}/config.toml"]
        daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_ENV)
    FOLDERS.add(str(folder))
    try:
        deadline = time.monotonic() + _START_S
        while not _connects(f"{address}.ttrpc"):
            said = (folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
            assert daemon.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
        yield address
    finally:
        listed = subprocess.run(
            [*ctr(address), "containers", "ls", "--quiet"], capture_output=True, check=False, env=_ENV, timeout=60
        )
        for name in listed.stdout.decode().split():
            _quietly(*ctr(address), "tasks", "delete", "--force", name)
            _quietly(*ctr(address), "containers", "delete", name)
        left = shims_left()  # without their daemon they would live for ever
        FOLDERS.discard(str(folder))
        _ended(daemon)
        _unmounted(folder)
        assert left == []


def _connects(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        return not connection.connect_ex(address)


def _ended(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(60)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _quietly(*argv: str) -> int:
    return subprocess.run(argv, capture_output=True, check=False, env=_ENV, timeout=120).returncode


def _unmounted(folder: Path) -> None:
    """Unmount what engines leave mounted below their folders, inner mounts first."""
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    places = [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]
    for place in sorted(places, key=len, reverse=True):
        _quietly("umount", "--lazy", place)
