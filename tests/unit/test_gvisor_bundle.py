"""The description of a container for gVisor's runtime."""

from __future__ import annotations

from msgspec.structs import replace

from tests.unit.test_container_commands import WANTED
from x07_sandbox.backends.gvisor.bundle import config


def test_a_container_on_gvisor_has_few_rights_and_no_file_of_the_host() -> None:
    """The root is read-only, all mounts are in memory, and the agent alone has capabilities."""
    made = config(WANTED, "/cache/root")
    assert made["root"] == {"path": "/cache/root", "readonly": True}
    assert {mount["type"] for mount in made["mounts"]} == {"proc", "cgroup", "tmpfs"}
    assert set(WANTED.tmpfs()) < {mount["destination"] for mount in made["mounts"]}
    held = made["process"]["capabilities"]
    assert set(held) == {"bounding", "effective", "permitted"}
    assert sorted(held["bounding"]) == ["CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
    assert made["process"]["noNewPrivileges"]
    assert made["annotations"] == dict(WANTED.labels)
    assert made["process"]["args"][-2:] == ["tasks", WANTED.mark]


def test_each_network_namespace_is_new() -> None:
    """No namespace is one of the host's, also for a job with a network."""
    for network in (False, True):
        made = config(replace(WANTED, network=network), "/cache/root")
        assert [one["type"] for one in made["linux"]["namespaces"]] == ["ipc", "mount", "network", "pid", "uts"]
        assert not any("path" in one for one in made["linux"]["namespaces"])
