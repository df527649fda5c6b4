"""The command line that creates a container by containerd's client, and the check of the created one."""

from __future__ import annotations

import os
from typing import Any

import pytest
from msgspec.structs import replace

from tests.unit.test_container_commands import WANTED, after, changed
from x07_sandbox.backends.containerd import create_argv, differences
from x07_sandbox.backends.firecracker import FirecrackerBackend

RUNC = "io.containerd.runc.v2"


def argv_of(*, network: bool = False, in_machine: bool = False) -> list[str]:
    """The words for the container of the other engines' tests."""
    spec = replace(WANTED, network=network)
    return list(create_argv(spec, "guest:1", snapshotter="overlayfs", runtime=RUNC, in_machine=in_machine))


def made() -> dict[str, Any]:
    """Containerd's description of the wanted container."""
    held = [*WANTED.listening_capabilities]
    mounts = [
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/mqueue", "mqueue"),
        ("/sys", "sysfs"),
    ]
    mounts += [("/sys/fs/cgroup", "cgroup"), *((place, "tmpfs") for place in WANTED.tmpfs())]
    kinds = ("cgroup", "ipc", "mount", "network", "pid", "uts")
    spec = {
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": argv_of()[argv_of().index("/usr/bin/python3") :],
            "capabilities": {"bounding": held, "effective": held, "permitted": held},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [{"destination": place, "type": kind} for place, kind in mounts],
        "linux": {
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "namespaces": [{"type": kind} for kind in kinds],
            "resources": {"memory": {"limit": WANTED.memory_bytes}},
        },
    }
    return {"Runtime": {"Name": RUNC}, "Labels": {**WANTED.labels, "more": "x"}, "Spec": spec}


def test_a_container_gets_few_rights_and_no_file_of_the_host() -> None:
    """All default capabilities but the agent's are dropped, the root is read-only, and only tmpfs is mounted."""
    argv = argv_of()
    assert {"--read-only", "--seccomp"} <= set(argv)
    assert sorted(after(argv, "--cap-add")) == ["CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
    assert set(after(argv, "--cap-drop")) >= {"CAP_DAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SYS_CHROOT"}
    assert {word.split(",")[0] for word in after(argv, "--mount")} == {"type=tmpfs", "type=cgroup"}
    assert after(argv, "--memory-limit") == [str(WANTED.memory_bytes)]
    assert "network" not in argv
    assert {"CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"} <= set(after(argv_of(network=True), "--cap-add"))


def test_a_container_in_a_vm_names_it_and_limits_its_own_tasks() -> None:
    """The VM has the container's name, and the agent is asked to limit tasks."""
    argv = argv_of(in_machine=True)
    assert after(argv, "--annotation") == [f"aws.firecracker.vm.id={WANTED.name}"]
    assert argv[-2:] == ["tasks", WANTED.mark]


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("Runtime", "Name"), "other", "its runtime"),
        (("Spec", "process", "args"), ["/bin/sh"], "its command"),
        (("Spec", "process", "user", "uid"), 1, "its user"),
        (("Spec", "process", "noNewPrivileges"), False, "its rights"),
        (("Spec", "linux", "seccomp"), None, "its rights"),
        (("Spec", "process", "capabilities", "ambient"), ["CAP_SYS_ADMIN"], "its capabilities"),
        (("Spec", "root", "readonly"), False, "its writable root"),
        (("Spec", "linux", "namespaces"), [], "its namespaces"),
        (("Spec", "linux", "namespaces", 0, "path"), "/proc/1/ns/pid", "the owner of its namespaces"),
        (("Spec", "linux", "devices"), [{"path": "/dev/sda"}], "its devices"),
        (("Spec", "hooks"), {"poststop": [{"path": "/bin/x"}]}, "its hooks"),
        (("Spec", "linux", "resources"), {}, "its limit on memory"),
        (("Spec", "mounts", 0, "type"), "bind", "its mounts"),
        (("Spec", "mounts"), [], "its mounts"),
        (("Labels",), {}, "its labels"),
    ],
)
def test_a_container_that_differs_is_refused(path: tuple[Any, ...], value: object, name: str) -> None:
    """Each part of the description that containerd's configuration could change is compared."""
    description = made()
    assert differences(WANTED, description, RUNC, in_machine=False) == []
    assert differences(WANTED, changed(description, path, value), RUNC, in_machine=False) == [name]
    assert len(differences(WANTED, {}, RUNC, in_machine=False)) > 8


def test_the_variables_of_firecracker_and_their_defaults_are_x07s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four variables name client, socket, namespace and snapshotter of firecracker-containerd, by default X07's."""
    for name in [name for name in os.environ if name.startswith("X07_VM_")]:
        monkeypatch.delenv(name)
    words = "firecracker-ctr --address /run/firecracker-containerd/containerd.sock --namespace x07 images import"
    backend = FirecrackerBackend()
    assert f"{words} --snapshotter devmapper FILE" in backend.fix_image
    assert backend.needs[0].place == "firecracker-ctr"
    monkeypatch.setenv("X07_VM_FIRECRACKER_CTR_BIN", "/opt/ctr")
    monkeypatch.setenv("X07_VM_FIRECRACKER_CONTAINERD_SOCK", "/run/other.sock")
    monkeypatch.setenv("X07_VM_FIRECRACKER_SNAPSHOTTER", "other-snapshotter")
    monkeypatch.setenv("X07_VM_CONTAINERD_NAMESPACE", "other-namespace")
    backend = FirecrackerBackend()
    words = "--address /run/other.sock --namespace other-namespace images import --snapshotter other-snapshotter"
    assert words in backend.fix_image
    assert backend.needs[0].place == "/opt/ctr"
