"""Command lines for container engines and the parsing of their answers, all pure."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from x07_sandbox.backends.base import Needs, RootPlace
from x07_sandbox.backends.container.runtime import ContainerSpec, is_ours
from x07_sandbox.backends.engines import DEFAULT_REFERENCE, check_reference, engine
from x07_sandbox.backends.podman import create_argv, differences, engine_gaps
from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.host.settings import __version__

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
IMAGE = "sha256:" + "ab" * 32
WANTED = ContainerSpec(
    runtime="docker",
    image=IMAGE,
    name="x07-1-2-3-run",
    mark="c0ffee",
    labels={"io.x07.schema": "1", "io.x07.run_id": "1-2-3-run"},
    needs=Needs(
        mem_bytes=256 * MIB,
        tmp_bytes=MIB,
        tasks=8,
        fds=64,
        files_bytes=1000,
        places=(RootPlace(at="/home/u/in", write=False), RootPlace(at="/home/u/out", write=True)),
    ),
    resolv_conf="/state/j/resolv.conf",
)
MADE: dict[str, Any] = {
    "Image": IMAGE,
    "HostConfig": {
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "CapAdd": ["CAP_KILL", "SETUID"],
        "SecurityOpt": ["no-new-privileges"],
        "Memory": WANTED.memory_bytes,
        "PidsLimit": WANTED.tasks,
    },
    "Mounts": [{"Destination": "/etc/resolv.conf"}, {"Destination": "/home/u/out/"}],
    "Config": {"Labels": {"io.x07.schema": "1", "io.x07.run_id": "1-2-3-run", "other": "x"}},
}


def changed(document: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    """A copy of a document with another value at one place."""
    made = copy.deepcopy(document)
    inner = made
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return made


def after(argv: list[str], flag: str) -> list[str]:
    """All values of a flag."""
    return [value for word, value in itertools.pairwise(argv) if word == flag]


@pytest.mark.parametrize("engine_name", ["podman", "docker"])
def test_a_container_is_created_hardened(engine_name: str) -> None:
    """A container has no network, a read-only root, four capabilities, limits and no log on disk."""
    argv = list(create_argv(replace(WANTED, runtime=engine_name)))
    assert argv[0] == "create"
    assert argv[-3:] == [IMAGE, "container", "c0ffee"]
    assert after(argv, "--network") == ["none"]
    assert after(argv, "--cap-drop") == ["ALL"]
    assert after(argv, "--cap-add") == ["KILL", "SETGID", "SETPCAP", "SETUID"]
    assert after(argv, "--security-opt") == ["no-new-privileges"]
    assert after(argv, "--pull") == ["never"]
    assert after(argv, "--log-driver") == ["none"]
    assert after(argv, "--memory") == after(argv, "--memory-swap") == [str(WANTED.memory_bytes)]
    assert after(argv, "--pids-limit") == ["10"]
    assert "--read-only" in argv
    assert ("--http-proxy=false" in argv) == ("--rm" in argv) == (engine_name == "podman")
    assert "--privileged" not in argv
    assert after(argv, "--label") == ["io.x07.schema=1", "io.x07.run_id=1-2-3-run"]


def test_only_a_job_with_connections_may_make_rules() -> None:
    """Only a job with network access gets NET_ADMIN and a relay."""
    argv = list(create_argv(replace(WANTED, network=True)))
    assert "NET_ADMIN" in after(argv, "--cap-add")
    assert argv[-3:] == ["container", "network", "c0ffee"]
    assert "NET_ADMIN" not in after(list(create_argv(WANTED)), "--cap-add")


def test_roots_are_sized_tmpfs() -> None:
    """Each root is a sized tmpfs, writable only if the policy allows it."""
    tmpfs = WANTED.tmpfs()
    assert "mode=0755" in tmpfs["/home/u/in"]
    assert "mode=1777" in tmpfs["/home/u/out"]
    assert "mode=0755" in tmpfs["/x07/out"]
    assert all("nosuid,nodev" in options and "size=" in options for options in tmpfs.values())
    closed = replace(WANTED, needs=replace(WANTED.needs, closed=True, alone=False, out=True)).tmpfs()
    assert all(",noexec," in options for options in closed.values())
    assert "mode=1777" in closed["/x07/out"]


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("Image",), "sha256:" + "cd" * 32, "its image"),
        (("HostConfig", "Privileged"), True, "its rights"),
        (("HostConfig", "NetworkMode"), "bridge", "its network"),
        (("HostConfig", "ReadonlyRootfs"), False, "its writable root"),
        (("HostConfig", "PidMode"), "host", "its namespaces"),
        (("HostConfig", "CapAdd"), ["CAP_SYS_ADMIN"], "its capabilities"),
        (("HostConfig", "Devices"), [{"PathOnHost": "/dev/kvm"}], "its devices"),
        (("HostConfig", "SecurityOpt"), ["seccomp=unconfined"], "its security options"),
        (("HostConfig", "Memory"), 0, "its limit on memory"),
        (("HostConfig", "PidsLimit"), 2048, "its limit on tasks"),
        (("Mounts",), [{"Destination": "/home/u"}], "its mounts"),
        (("Config", "Labels"), {}, "its labels"),
        (("HostConfig",), None, "its network"),
    ],
)
def test_a_different_container_is_rejected(place: tuple[str, ...], value: object, named: str) -> None:
    """A container that matches its request is accepted, and one that differs is rejected with the difference."""
    assert differences(WANTED, MADE) == []
    assert any(found.startswith(named) for found in differences(WANTED, changed(MADE, place, value)))


@pytest.mark.parametrize(
    ("name", "answer", "gaps"),
    [
        ("podman", {"host": {"security": {"rootless": False}, "cgroupVersion": "v1"}}, []),
        ("podman", {"host": {"cgroupVersion": "v1"}}, ["memory", "tasks"]),
        ("podman", {"host": {"security": {"rootless": True}, "cgroupVersion": "v1"}}, ["memory", "tasks"]),
        (
            "podman",
            {"host": {"security": {"rootless": True}, "cgroupVersion": "v2", "cgroupControllers": ["memory"]}},
            ["tasks"],
        ),
        (
            "podman",
            {"host": {"security": {"rootless": True}, "cgroupVersion": "v2", "cgroupControllers": ["memory", "pids"]}},
            [],
        ),
        ("docker", {"MemoryLimit": True, "PidsLimit": True}, []),
        ("docker", {"MemoryLimit": False, "PidsLimit": True}, ["memory"]),
        ("docker", {}, ["memory", "tasks"]),
    ],
)
def test_ignored_limits_are_detected(name: Any, answer: dict[str, Any], gaps: list[str]) -> None:  # noqa: ANN401 - a name of an engine
    """An engine that would ignore a limit, as rootless podman does on cgroup v1, is detected."""
    assert engine_gaps(name, answer) == gaps


def test_variables_cannot_redirect_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Environment variables cannot redirect an engine's client, and a remote DOCKER_HOST is refused."""
    client = tmp_path / "client"
    client.write_text("#!/bin/sh\n", encoding="ascii")
    client.chmod(0o755)
    for name in ("CONTAINER_HOST", "CONTAINERS_CONF", "DOCKER_CONTEXT", "DOCKER_TLS", "STORAGE_DRIVER", "LD_PRELOAD"):
        monkeypatch.setenv(name, "evil")
    for engine_name in ("podman", "docker"):
        monkeypatch.setenv(f"X07_VM_{engine_name.upper()}_BIN", str(client))
        found = engine(engine_name)
        assert "evil" not in found.env.values()
        assert found.binary == str(client)
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/user/1000/docker.sock")
    assert engine("docker").env["DOCKER_HOST"] == "unix:///run/user/1000/docker.sock"
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    with pytest.raises(HostError, match="DOCKER_HOST"):
        engine("docker")


@pytest.mark.parametrize("name", ["/nonexistent/podman", "./podman", "no-such-podman"])
def test_a_missing_engine_client_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If X07_VM_PODMAN_BIN names a missing client, or one in the current folder, an error names the variable."""
    (tmp_path / "podman").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("X07_VM_PODMAN_BIN", name)
    with pytest.raises(HostError, match="Set X07_VM_PODMAN_BIN to an absolute path"):
        engine("podman")


@pytest.mark.parametrize(
    ("text", "ours"),
    [("ab" * 32, True), ("x07-1-2-3-run", True), ("ab" * 31, False), ("name", False), ("", False), ("--rm", False)],
)
def test_an_id_is_only_what_looks_like_one(text: str, ours: bool) -> None:  # noqa: FBT001 - a table
    """Only 64 hexadecimal digits, or a name that x07 gives, are accepted from an engine as a container."""
    assert is_ours(text) == ours


@pytest.mark.parametrize("name", ["", "x07", "X:1", "-x:1", "a:b c", "a:" + "b" * 200, "../a:b", "a;b:c"])
def test_names_of_images_that_engines_do_not_take(name: str) -> None:
    """An image name is NAME:TAG, with or without a registry, by default of this version; others are usage errors."""
    for good in ("x07-guest-runner:dev", "localhost:5000/a/b:1.0", DEFAULT_REFERENCE):
        assert check_reference(good) == good
    assert DEFAULT_REFERENCE.endswith(f":{__version__}")
    with pytest.raises(UsageError, match="NAME:TAG"):
        check_reference(name)
