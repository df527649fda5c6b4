"""The description of a container for gVisor's runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from tests.unit.test_container_commands import WANTED
from x07_sandbox.backends.engines import Client
from x07_sandbox.backends.gvisor import Runsc, config
from x07_sandbox.records.stopping import Orphan

if TYPE_CHECKING:
    from pathlib import Path


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


def test_a_container_is_found_by_its_description(tmp_path: Path) -> None:
    """A container has the labels of its description, none if that is damaged, and does not exist without one."""
    runsc = Runsc(client=Client(name="gvisor", binary="runsc", env={}), folder=tmp_path, roots=tmp_path)
    assert runsc.find(WANTED.name) is None
    assert runsc.listed() == []
    assert runsc.create(WANTED) == WANTED.name
    assert runsc.find(WANTED.name) == Orphan(id=WANTED.name, labels=dict(WANTED.labels))
    assert runsc.listed() == [WANTED.name]
    (described,) = tmp_path.glob("bundles/*/*")
    described.write_bytes(b"[")
    assert runsc.find(WANTED.name) == Orphan(id=WANTED.name, labels={})
