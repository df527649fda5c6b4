"""Other tools that run the same programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.figures import WrongRunError, expected
from tests import engines

PODMAN_ENV = {"PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A command that runs the program, with input on standard input."""

    argv: tuple[str, ...]

    def seconds(self) -> float:
        """Time one run. Raises WrongRunError if its output is wrong."""
        nonce = os.urandom(8).hex()
        started = time.monotonic()
        done = subprocess.run(
            self.argv, input=f"{nonce}\n".encode(), capture_output=True, check=False, env=os.environ | PODMAN_ENV
        )
        seconds = time.monotonic() - started
        if done.stdout != expected(nonce):
            raise WrongRunError(f"{self.argv[0]} did not run the program: {done.stderr.decode()[-500:]}")
        return seconds


def unpacked_root(image_root: Path, work: Path) -> Path:
    """Unpack the guest image's root file system, so that all tools run the same libc and Python."""
    root = work / "root"
    subprocess.run(["fsck.erofs", f"--extract={root}", str(image_root)], check=True, capture_output=True)
    (root / "prog").mkdir()
    return root


def bwrap(root: Path, command: list[str]) -> Peer:
    """Return bubblewrap with all namespaces."""
    argv = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", str(root), "/"]
    return Peer(argv=(*argv, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--clearenv", *command))


def podman(root: Path, work: Path) -> list[str] | None:
    """Make an image in a separate store; return the start of a podman command with runc, or None if it cannot run."""
    if os.geteuid() != 0 or not (shutil.which("podman") and shutil.which("runc")):
        return None
    store = ["podman", "--root", str(work / "store"), "--runroot", str(work / "run"), "--storage-driver", "overlay"]
    store += ["--runtime", "runc"]
    _import([*store, "import"], root, work)
    return [*store, *_RUN, _IMAGE]


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A running container. enter: `exec` of its engine, up to the name of the container, without options of `exec`."""

    enter: tuple[str, ...]
    name: str

    def peer(self, command: list[str]) -> Peer:
        """Return a command in the container that reads input."""
        return Peer(argv=(*self.enter, "-i", self.name, *command))

    def true_seconds(self) -> float:
        """Time `true`."""
        started = time.monotonic()
        self.true()
        return time.monotonic() - started

    def true(self) -> None:
        """Run `true`."""
        argv = (*self.enter, self.name, "true")
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True, env=os.environ | PODMAN_ENV)


def container(argv: list[str], stack: contextlib.ExitStack) -> Container:
    """Return a container that runs until *stack* ends. argv: from `podman` or `docker`."""
    started = Container(enter=(*argv[: argv.index("run")], "exec"), name="bench-exec")
    # `cat` ends with its input. Then the engine has cleaned up when it ends.
    run = [*argv[:-1], "--name", started.name, argv[-1], "cat"]
    process = stack.enter_context(
        subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | PODMAN_ENV)
    )
    while True:
        try:
            started.true()
        except subprocess.CalledProcessError as exc:
            if process.poll() is not None:
                raise WrongRunError(f"{argv[0]} did not start a container") from exc
        else:
            return started


def docker_client(work: Path, stack: contextlib.ExitStack) -> tuple[list[str], str]:
    """Return a docker command that reaches a daemon, or nothing and the reason. Start a daemon if none runs."""
    client = ["docker"]
    if shutil.which("docker") and not subprocess.run([*client, "info"], check=False, capture_output=True).returncode:
        return client, ""
    if reason := engines.missing("docker"):
        return [], reason
    try:
        env = stack.enter_context(engines.dockerd(Path(tempfile.mkdtemp(prefix="x07-docker-", dir=work))))
    except AssertionError as exc:  # with the daemon's log
        return [], f"dockerd does not start: {str(exc).strip().rpartition(chr(10))[2]}"
    return [*client, "--host", env["DOCKER_HOST"]], ""


def docker(client: list[str], root: Path, work: Path, runtime: str) -> list[str] | None:
    """Do as `podman`, with *runtime*: runc, or runsc of gVisor. Return None if the daemon does not have it."""
    listing = [*client, "info", "--format", "{{range $name, $_ := .Runtimes}}{{println $name}}{{end}}"]
    if runtime not in subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split():
        return None
    _import([*client, "import"], root, work)
    return [*client, *_RUN, "--runtime", runtime, _IMAGE]


_IMAGE = "localhost/bench:1"
_RUN = ("run", "--rm", "-i", "--pull", "never", "--network", "none", "--log-driver", "none")


def _import(command: list[str], root: Path, work: Path) -> None:
    tar = work / "root.tar"
    subprocess.run(["tar", "-C", str(root), "--numeric-owner", "-cf", str(tar), "."], check=True)
    subprocess.run([*command, str(tar), _IMAGE], check=True, capture_output=True, env=os.environ | PODMAN_ENV)
    tar.unlink()


def forget_podman(work: Path) -> None:
    """Remove the mount that podman leaves on its store."""
    subprocess.run(["umount", str(work / "store/overlay")], check=False, capture_output=True)
