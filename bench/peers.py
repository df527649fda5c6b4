"""Other tools that run the same programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from bench import programs
from bench.figures import WrongRunError

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
        if done.stdout != programs.expected(nonce):
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


def podman_exec(argv: list[str], command: list[str], stack: contextlib.ExitStack) -> Peer:
    """Return `podman exec` of a command in a container that runs until *stack* ends. argv: from `podman`."""
    store, name = argv[: argv.index("run")], "bench-exec"
    env = os.environ | PODMAN_ENV
    run = [*argv[:-1], "--name", name, argv[-1], "cat"]  # until its input ends: then podman has cleaned up when it ends
    container = stack.enter_context(subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env))
    while subprocess.run([*store, "exec", name, "true"], check=False, capture_output=True, env=env).returncode:
        if container.poll() is not None:
            raise WrongRunError("podman did not start a container")
    return Peer(argv=(*store, "exec", "-i", name, *command))


def docker(root: Path, work: Path, runtime: str) -> list[str] | None:
    """Do the same for docker with *runtime*, runc or gVisor's runsc. Return None without docker or the runtime."""
    listing = ["docker", "info", "--format", "{{range $name, $_ := .Runtimes}}{{println $name}}{{end}}"]
    if not shutil.which("docker"):
        return None
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    if done.returncode or runtime not in done.stdout.split():
        return None
    _import(["docker", "import"], root, work)
    return ["docker", *_RUN, "--runtime", runtime, _IMAGE]


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
