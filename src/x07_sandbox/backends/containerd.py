"""The `containerd` backend: containers of an existing containerd, with runc on this host's kernel.

What its client `ctr` takes and prints was seen with version 1.7.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from x07_sandbox.backends.base import Job
from x07_sandbox.backends.container.backend import ContainerInstance, WithImages
from x07_sandbox.backends.container.runtime import CREATE, ContainerSpec, Runtime
from x07_sandbox.backends.engines import DOCTOR, Client, client_of
from x07_sandbox.backends.prerequisites import Need
from x07_sandbox.errors import BackendError, Flag, HostError
from x07_sandbox.host.processes import kill_identity, processes_with_mark, wait_gone
from x07_sandbox.host.variables import text
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.images.store import ENTRY

_CONNECT_S: Final = 2.0
_NAMESPACE: Final = "x07"
_GROUPS: Final = ("/sys/fs/cgroup/pids", "/sys/fs/cgroup")  # of versions 1 and 2
_SOCKET: Final = "/run/containerd/containerd.sock"
_STEP_S: Final = 5.0
_SHIM_S: Final = 1.0
# Arguments of a container's shim, the process of a task, which containerd starts before it knows the task; and of the
# client that starts the task. As long as the client runs, containerd may start a shim, also after the container was
# deleted. `ctr` cannot name the task of a deleted container, but containerd removes a task whose shim has ended.
_SHIM: Final = "-id\0{}\0"
_CLIENT: Final = "tasks\0start\0{}\0"
_IMAGE: Final = re.compile(r"(\S{1,512}) +\S+ +(sha256:[0-9a-f]{64}) ")  # REF TYPE DIGEST SIZE ...
# Those of containerd's default, which `ctr` adds unless each is dropped.
_DEFAULT: Final = (
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
)
_CGROUP: Final = "/sys/fs/cgroup"
_NAMESPACES: Final = {"cgroup", "ipc", "mount", "network", "pid", "uts"}
# The mounts of containerd's default, and the control group. They belong to root, and hold nothing of the host.
_USUAL: Final = {
    "/proc": "proc",
    "/dev": "tmpfs",
    "/dev/pts": "devpts",
    "/dev/mqueue": "mqueue",
    "/sys": "sysfs",
    _CGROUP: "cgroup",
}
_FDS_MAX: Final = 1024  # containerd's default limit, which `ctr` cannot change
_PERIOD_US: Final = 100_000


class ContainerdBackend(WithImages):
    """The backend for a containerd of this host."""

    name = "containerd"
    needs: Sequence[Need] = (Need("program", "ctr", "containerd", "X07_VM_CTR_BIN"),)
    variables = ("X07_VM_CONTAINERD_SOCK", "X07_VM_CONTAINERD_NAMESPACE")
    oci_runtime = "io.containerd.runc.v2"

    def __init__(self) -> None:
        self._socket = text("X07_VM_CONTAINERD_SOCK") or _SOCKET
        self._snapshotter = text("X07_VM_CONTAINERD_SNAPSHOTTER") or "overlayfs"
        self._namespace = text("X07_VM_CONTAINERD_NAMESPACE") or _NAMESPACE

    @property
    def fix_image(self) -> str:
        """What to do if there is no suitable image."""
        words = f"{self.needs[0].name} --address {self._socket} --namespace {self._namespace} images import"
        return f"Run x07 image load --archive FILE, and then {words} --snapshotter {self._snapshotter} FILE"

    def _runtime(self) -> Ctr:
        options = ("--address", self._socket, "--namespace", self._namespace)
        client = client_of(self.name, self.needs[0], *options)
        self._connect()  # the client itself would wait for ten seconds
        return self._made(client)

    def _made(self, client: Client) -> Ctr:
        return Ctr(client=client, snapshotter=self._snapshotter, oci_runtime=self.oci_runtime)

    def _connect(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_CONNECT_S)
            try:
                sock.connect(self._socket)
            except OSError as exc:
                why = f"{exc.strerror or exc} ({self._socket})"
                fix = "Start it, and run x07 as a user who may use its socket, such as root"
                raise HostError(f"cannot connect to {self.name}", why, fix) from exc

    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the digest of an image's manifest, and the image's labels. Raises ImageError, BackendError."""
        runtime = self._runtime()
        if (digest := runtime.images().get(wanted)) is None:
            raise self._missing(wanted)
        config = runtime.content(digest).get("config") or {}
        details = runtime.content(str(config.get("digest"))).get("config") or {}
        return digest, details.get("Labels")

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[ContainerInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        with super().start(job) as instance:
            self._limit_tasks(instance)
            yield instance

    def _limit_tasks(self, instance: ContainerInstance) -> None:
        """Limit the tasks of a container by its control group, since `ctr` cannot. Raises BackendError."""
        try:
            group = next(
                folder
                for place in _GROUPS
                if (folder := Path(place, self._namespace, instance.spec.name)).joinpath("pids.max").exists()
            )
            (group / "pids.max").write_text(str(instance.spec.tasks), encoding="ascii")
        except (OSError, StopIteration) as exc:
            why = getattr(exc, "strerror", None) or "its control group was not found"
            raise BackendError("cannot limit the tasks of the container", why, "Use another backend") from exc

    def _prove(self, *, boot: bool) -> str:  # noqa: ARG002 - nothing boots
        self._runtime().images()
        return f"{self.name} answers"


class Ctr(Runtime, frozen=True, kw_only=True):
    """A containerd and the way to use it. See `Runtime`.

    oci_runtime: such as "io.containerd.runc.v2". in_machine: whether each container runs in a VM of its own.
    """

    snapshotter: str
    oci_runtime: str
    in_machine: bool = False

    def images(self) -> dict[str, str]:
        """Return the digests of the manifests of all images, by name. Raises BackendError."""
        answer = self.client.call("images", "ls")
        if answer.status:
            raise BackendError(f"cannot use {self.name}", answer.error or "it lists no images", DOCTOR)
        rows = map(_IMAGE.match, answer.text.splitlines())
        return {row[1]: row[2] for row in rows if row is not None}

    def content(self, digest: str) -> dict[str, Any]:
        """Return a JSON document from containerd's content store. Raises BackendError."""
        found = self.client.objects(self.client.call("content", "get", digest), "Import the guest image again")
        return next(iter(found), {})

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its name. Raises BackendError, HostError."""
        if spec.needs.fds > _FDS_MAX:
            why = f"containerd gives a container at most {_FDS_MAX} open files, not {spec.needs.fds}"
            raise HostError(CREATE, why, ("Lower the limit with ", Flag("--fds"), ", or use another backend"))
        reference, runtime, in_machine = self.image_name(spec.image), self.oci_runtime, self.in_machine

        def different(made: Mapping[str, Any]) -> list[str]:
            found = differences(spec, made, runtime, in_machine=in_machine)
            return found if self.images().get(reference) == spec.image else [*found, "its image"]

        words = create_argv(spec, reference, snapshotter=self.snapshotter, runtime=runtime, in_machine=in_machine)
        return self.created(spec, words, different)

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """Return containerd's description of a container, or None if there is none. Raises BackendError."""
        return next(iter(self.client.objects(self.client.call("containers", "info", container))), None)

    def _labels_in(self, made: Mapping[str, Any]) -> Mapping[str, object] | None:
        return made.get("Labels")

    def _names(self) -> Iterable[str]:
        return self.client.listed("containers", "ls", "--quiet", 'labels."io.x07.schema"==1')

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        return self.client.argv("tasks", "start", container)

    def _try_remove(self, container: str) -> bool:
        """Kill a container's task, and remove both. A step fails if there is nothing to do. Raises BackendError."""
        self.client.call("tasks", "kill", "--signal", "SIGKILL", container, timeout_s=_STEP_S)
        deleted = self.client.call("tasks", "delete", "--force", container, timeout_s=_STEP_S)
        machine_gone = self.end_machine(container)
        shim, client = _SHIM.format(container), _CLIENT.format(container)
        if _ended(shim, _SHIM_S):
            self.client.call("containers", "delete", container, timeout_s=_STEP_S)
        elif deleted.absent or not deleted.status:  # containerd has no task with this shim
            _kill(shim)
        if not machine_gone or self.inspect(container) is not None:
            return False
        if not _ended(client, _STEP_S):
            _kill(client)  # containerd then cancels its request; a shim started before that is found next time
            return False
        return _ended(shim, _SHIM_S)

    def end_machine(self, container: str) -> bool:  # noqa: ARG002 - there is none
        """End the VM of a container, and return whether it is proven gone. Raises BackendError."""
        return True


def _ended(words: str, timeout_s: float) -> bool:
    """Wait until the processes with these arguments have ended, for a limited time. Return whether they have."""
    deadline = Deadline.after(timeout_s)
    return all(wait_gone(process, deadline.left_s()) for process in processes_with_mark(words))


def _kill(words: str) -> None:
    for process in processes_with_mark(words):
        with contextlib.suppress(PermissionError):  # an ordinary user's: the container is then not proven gone
            kill_identity(process, words)


def create_argv(
    spec: ContainerSpec, reference: str, *, snapshotter: str, runtime: str, in_machine: bool
) -> Iterator[str]:
    """Yield the words of the command line after the options of `ctr`. reference: the image's name.

    in_machine: whether the container runs in a VM of the same name. `ctr` has no limit on tasks: in a VM the agent
    limits them, and else the backend does.
    """
    ours = spec.listening_capabilities
    yield from ("containers", "create", "--snapshotter", snapshotter, "--runtime", runtime, "--read-only", "--seccomp")
    for name in _DEFAULT:
        if f"CAP_{name}" not in ours:
            yield from ("--cap-drop", f"CAP_{name}")
    for name in ours:
        yield from ("--cap-add", name)
    yield from ("--memory-limit", str(spec.memory_bytes), "--hostname", "x07", "--user", "0:0", "--cwd", "/")
    yield from ("--cpu-quota", str(_PERIOD_US), "--cpu-period", str(_PERIOD_US), "--with-ns", "cgroup:")
    yield from ("--mount", f"type=cgroup,src=cgroup,dst={_CGROUP},options=ro:nosuid:noexec:nodev")
    for place, options in spec.tmpfs().items():
        yield from ("--mount", f"type=tmpfs,src=tmpfs,dst={place},options={options.replace(',', ':')}")
    for label, value in spec.labels.items():
        yield from ("--label", f"{label}={value}")
    if in_machine:
        yield from ("--annotation", f"aws.firecracker.vm.id={spec.name}")
    yield from (reference, spec.name, *_arguments(spec, in_machine=in_machine))


def _arguments(spec: ContainerSpec, *, in_machine: bool) -> list[str]:
    return [*ENTRY, *spec.agent_words(limits_tasks=in_machine)]


def differences(spec: ContainerSpec, made: Mapping[str, Any], runtime: str, *, in_machine: bool) -> list[str]:
    """Return how a created container differs from *spec*. made: containerd's description of it (`containers info`)."""
    oci = made.get("Spec") or {}
    process, linux, labels = oci.get("process") or {}, oci.get("linux") or {}, made.get("Labels") or {}
    user = process.get("user") or {}
    held = {name for names in (process.get("capabilities") or {}).values() for name in names or ()}
    mounts = {(str(mount.get("destination")), mount.get("type")) for mount in oci.get("mounts") or ()}
    expected = _USUAL | dict.fromkeys(spec.tmpfs(), "tmpfs")
    namespaces = linux.get("namespaces") or ()
    seen = {
        "its runtime": (made.get("Runtime") or {}).get("Name") == runtime,
        "its command": process.get("args") == _arguments(spec, in_machine=in_machine),
        "its user": (user.get("uid"), user.get("gid")) == (0, 0),
        "its rights": process.get("noNewPrivileges") is True and bool(linux.get("seccomp")),
        "its capabilities": held == set(spec.listening_capabilities),
        "its writable root": (oci.get("root") or {}).get("readonly") is True,
        "its namespaces": {one.get("type") for one in namespaces} == _NAMESPACES,
        "the owner of its namespaces": not any(one.get("path") for one in namespaces),
        "its devices": not linux.get("devices"),
        "its hooks": not any((oci.get("hooks") or {}).values()),
        "its limit on memory": ((linux.get("resources") or {}).get("memory") or {}).get("limit") == spec.memory_bytes,
        "its mounts": mounts == set(expected.items()),
        "its labels": spec.labels.items() <= labels.items(),
    }
    return [name for name, right in seen.items() if not right]
