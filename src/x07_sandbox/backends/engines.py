"""The client of a container engine: its program and environment, the meaning of its output, loading of images."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from x07_sandbox.backends.prerequisites import Need, require
from x07_sandbox.errors import BackendError, HostError, UsageError, printable
from x07_sandbox.host.paths import cache_folder, find_program, raised_as
from x07_sandbox.host.processes import output_of
from x07_sandbox.host.settings import __version__

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

Name = Literal["podman", "docker"]
CLIENTS: Final[dict[Name, Need]] = {
    "podman": Need("program", "podman", "podman", "X07_VM_PODMAN_BIN"),
    "docker": Need("program", "docker", "docker.io", "X07_VM_DOCKER_BIN"),
}
DOCTOR: Final = "Run x07 doctor"
_ANSWER_MAX: Final = 8 << 20
_CALL_S: Final = 30.0
# How podman and docker, ctr, Apple's container and runsc say that an object does not exist. Other errors have similar
# words, such as "connect: no such file or directory" of a client without its daemon.
_ABSENT: Final = re.compile(
    r"no such (?:container|object)\b|no container with (?:name or ID|ID or name) |"
    r'\bcontainer "[^"]*" in namespace "[^"]*": not found|\bno running task found: |\b(?:container|image) not found: |'
    r"\bloading (?:container|sandbox): file does not exist",
    re.IGNORECASE,
)
CLIENT_ENV: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin", "LC_ALL": "C"}
# The client sees only these of the caller's variables: others could lead it to another engine.
_KEPT: Final = ("HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a call of the client. text, error: standard output and standard error, decoded and bounded."""

    status: int
    text: str
    error: str

    @property
    def absent(self) -> bool:
        """Whether the call failed because the object does not exist."""
        return self.status != 0 and _ABSENT.search(self.error) is not None


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """The client of a container runtime. binary: its program. env: for it. options: words that precede the command."""

    name: str
    binary: str
    env: dict[str, str]
    options: tuple[str, ...] = ()

    def argv(self, *words: str) -> list[str]:
        """Return the command line of a call."""
        return [self.binary, *self.options, *words]

    def call(self, *words: str, timeout_s: float = _CALL_S) -> Answer:
        """Call the client and wait. Raises BackendError if it cannot be started or takes too long."""
        what = f"cannot use {self.name}"
        try:
            done = output_of(self.argv(*words), timeout_s=timeout_s, env=self.env)
        except subprocess.TimeoutExpired as exc:
            why = f"{self.name} {words[0]} did not answer within {timeout_s:.0f} s"
            raise BackendError(what, why, f"Check that {self.name} works: {self.name} ps") from exc
        except OSError as exc:
            raise BackendError(what, f"{exc.strerror} ({self.binary})", DOCTOR) from exc
        output, error = done.stdout[:_ANSWER_MAX], done.stderr[-4096:]
        return Answer(
            status=done.returncode,
            text=output.decode("utf-8", "replace"),
            error=printable(" ".join(error.decode("utf-8", "replace").split()))[-500:],
        )

    def listed(self, *words: str) -> list[str]:
        """Return the words that a call prints, or none if it fails. Raises BackendError as `call`."""
        answer = self.call(*words)
        return [] if answer.status else answer.text.split()

    def objects(self, answer: Answer, fix: str = DOCTOR) -> list[dict[str, Any]]:
        """Return the objects that a call printed as JSON, or none if it said that there are none. Raises BackendError.

        fix: for the error.
        """
        if answer.absent:
            return []
        if answer.status:
            raise BackendError(f"cannot use {self.name}", answer.error or f"status {answer.status}", fix)
        try:
            found = msgspec.json.decode(answer.text, type=dict[str, Any] | list[dict[str, Any]])
        except msgspec.DecodeError as exc:
            raise BackendError(f"cannot use {self.name}", answer.error or str(exc), fix) from exc
        return [found] if isinstance(found, dict) else found


def client_of(name: str, program: Need, *options: str, env: Mapping[str, str] = CLIENT_ENV) -> Client:
    """Return the client of the runtime *name*. program: its client's program. Raises HostError if that is missing."""
    require([program], f"cannot use {name}")
    return Client(name=name, binary=find_program(program.place) or program.name, env=dict(env), options=options)


def engine(name: Name) -> Client:
    """Return the engine of this host. Raises HostError if there is none, or if DOCKER_HOST is another machine."""
    env = {key: os.environ[key] for key in _KEPT if key in os.environ} | CLIENT_ENV
    env["PODMAN_IGNORE_CGROUPSV1_WARNING"] = "1"
    # The clients are Go programs that live for milliseconds. By default a quarter of that is garbage collection.
    env["GOGC"] = "400"
    if name == "docker":
        if host := os.environ.get("DOCKER_HOST", ""):
            if not host.startswith("unix://"):
                why = f"DOCKER_HOST is {host[:200]}, but x07's folders and sockets are on this host"
                fix = "Unset DOCKER_HOST, or set it to a local socket: unix:///path"
                raise HostError("cannot use docker", why, fix)
            env["DOCKER_HOST"] = host
        # The user's configuration may add variables to containers or lead to another machine.
        env["DOCKER_CONFIG"] = "/nonexistent"
    return client_of(name, CLIENTS[name], env=env)


DEFAULT_REFERENCE: Final = f"ghcr.io/x07lang/x07-guest-runner:{__version__}"
# OCI distribution-spec: NAME:TAG, with an optional host in front.
_REFERENCE: Final = re.compile(r"[a-z0-9]+(?:[._:/-]+[a-z0-9]+)*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_REFERENCE_MAX: Final = 255
_LOAD_S: Final = 600.0


def check_reference(reference: str) -> str:
    """Return *reference* if it is a valid image name. Raises UsageError."""
    if len(reference) > _REFERENCE_MAX or not _REFERENCE.fullmatch(reference):
        fix = "Use NAME:TAG in lower case, such as x07-guest-runner:dev"
        why = "container engines do not accept this name"
        raise UsageError(f"cannot use {reference[:80]!r} as an image name", why, fix)
    return reference


def load(
    image: Image, reference: str, names: Sequence[Name], progress: Callable[[str], None], archive: Path | None = None
) -> tuple[str, tuple[str, ...]]:
    """Load *image* as *reference* into engines. Return its id, and the engines that have it now.

    names: the engines; () for all of this host. archive: a file to write the image to as well. Raises SandboxError.
    """
    import tempfile  # loaded here like the archive, which imports much: a run loads no image

    from x07_sandbox.images.archive import write_archive

    engines = [engine(name) for name in names]
    for name in () if names else CLIENTS:
        with contextlib.suppress(HostError, BackendError):
            one = engine(name)
            if not one.call("info").status:  # docker's client may be installed without the engine
                engines.append(one)
    if not engines and archive is None:
        fix = "Install podman or docker.io, or write a file to load elsewhere: --archive FILE"
        raise HostError("cannot load the guest image", "no container engine answers on this host", fix)
    with tempfile.TemporaryDirectory(prefix="archive-", dir=cache_folder("tmp")) as folder:
        file = Path(folder, "image.tar") if archive is None else archive
        with raised_as(HostError, f"cannot write {file}", "Free disk space"), file.open("wb") as target:
            digest = write_archive(image, reference, target, Path(folder), progress)
        for one in engines:
            progress(f"loading the image into {one.name}")
            answer = one.call("load", "--quiet", "--input", str(file.absolute()), timeout_s=_LOAD_S)
            if answer.status:
                fix = f"Check that {one.name} works: {one.name} info"
                raise HostError(f"{one.name} did not load the image", answer.error or f"status {answer.status}", fix)
    return digest, tuple(one.name for one in engines)
