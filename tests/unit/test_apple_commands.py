"""The command line that creates a container of Apple's `container`, and the JSON of its versions."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tests.apple_container import VERSIONS, create_options
from tests.unit.test_container_commands import WANTED, after, changed
from x07_sandbox.backends.apple import (
    create_argv,
    described,
    differences,
    image_labels,
    image_names,
    memory_mib,
    options_in,
)
from x07_sandbox.errors import HostError

NEW = options_in(create_options((1, 2)).format_help())
OLD = options_in(create_options((0, 6)).format_help())
CAPABILITIES = ["CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]


def argv_of(options: frozenset[str] = NEW, *, network: bool = False) -> list[str]:
    """The words for the container of the other engines' tests."""
    return list(create_argv(replace(WANTED, network=network), "guest:1", options))


def made() -> dict[str, Any]:
    """The configuration of the wanted container."""
    return {
        "id": WANTED.name,
        "image": {"reference": "guest:1", "descriptor": {"digest": WANTED.image}},
        "networks": [],
        "mounts": [{"type": {"tmpfs": {}}, "destination": place} for place in WANTED.tmpfs()],
        "initProcess": {
            "executable": "/usr/bin/python3",
            "arguments": ["agent.zip", "container", "tasks", WANTED.mark],
            "terminal": False,
            "user": {"id": {"uid": 0, "gid": 0}},
        },
        "resources": {"cpus": 1, "memoryInBytes": memory_mib(WANTED) << 20},
        "readOnly": True,
        "capAdd": CAPABILITIES,
        "capDrop": ["ALL"],
        "labels": {**WANTED.labels, "more": "x"},
    }


def test_a_container_has_no_network_and_only_folders_in_memory() -> None:
    """The VM gets no network card and no name servers, nothing of the host is mounted, and rights are dropped."""
    argv = argv_of()
    assert {"--no-dns", "--read-only"} <= set(argv)
    assert after(argv, "--network") == ["none"]
    assert {word.split(",")[0] for word in after(argv, "--mount")} == {"type=tmpfs"}
    assert "type=tmpfs,target=/tmp,size=1M,mode=1777" in argv
    assert (after(argv, "--cap-drop"), after(argv, "--cap-add")) == (["ALL"], CAPABILITIES)
    assert argv[-3:] == ["container", "tasks", WANTED.mark]
    assert {"CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"} <= set(after(argv_of(network=True), "--cap-add"))


@pytest.mark.parametrize("version", VERSIONS)
def test_only_options_of_the_version_are_used(version: str) -> None:
    """Each version of the stand-in, which has the real grammar, takes the command line made for it."""
    parser = create_options(tuple(map(int, version.split("."))))
    parsed = parser.parse_args(argv_of(options_in(parser.format_help()))[1:])
    assert (parsed.name, parsed.image, parsed.network) == (WANTED.name, "guest:1", ["none"])


def test_what_no_vm_can_hold_is_refused() -> None:
    """A memory limit below the least VM is refused instead of raised, and so is a version without a needed option."""
    with pytest.raises(HostError, match="lacks --no-dns"):
        options_in("--name --network --no-dnsx --mount --label --memory --cpus --uid")
    small = replace(WANTED, needs=replace(WANTED.needs, mem_bytes=64 << 20))
    with pytest.raises(HostError, match="at least 200 MiB"):
        list(create_argv(small, "guest:1", NEW))


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("image", "descriptor", "digest"), "sha256:0", "its image"),
        (("networks",), [{"network": "default"}], "its network"),
        (("publishedPorts",), [{"hostPort": 1}], "its network"),
        (("dns",), {"nameservers": ["1.1.1.1"]}, "its name servers"),
        (("publishedSockets",), [{}], "its sockets"),
        (("ssh",), True, "its sockets"),
        (("rosetta",), True, "its runtime"),
        (("virtualization",), True, "its runtime"),
        (("initProcess", "arguments"), ["x"], "its command"),
        (("initProcess", "terminal"), True, "its command"),
        (("initProcess", "user"), {"raw": {"userString": "0:0"}}, "its user"),
        (("readOnly",), False, "its writable root"),
        (("capAdd",), ["ALL"], "its capabilities"),
        (("resources", "memoryInBytes"), 1 << 30, "its limit on memory"),
        (("mounts", 0, "type"), {"virtiofs": {}}, "its mounts"),
        (("labels",), {}, "its labels"),
    ],
)
def test_a_container_that_differs_is_refused(path: tuple[Any, ...], value: object, name: str) -> None:
    """Each part of the configuration that the service's own settings could change is compared."""
    assert differences(WANTED, made(), NEW) == []
    assert differences(WANTED, changed(made(), path, value), NEW) == [name]


def test_an_old_version_is_held_to_what_it_can_do() -> None:
    """A version without read-only roots and capabilities is not expected to report them."""
    old = {key: value for key, value in made().items() if key not in {"readOnly", "capAdd", "capDrop"}}
    assert differences(WANTED, old, OLD) == []
    assert differences(WANTED, old, NEW) == ["its writable root", "its capabilities"]
    assert len(differences(WANTED, {}, OLD)) > 6


def test_images_and_containers_of_all_versions_are_read() -> None:
    """Names, digests, labels and ids are found in the JSON from before version 1.0 and from after it."""
    variant = {"platform": {"architecture": "amd64"}, "config": {"config": {"Labels": {"a": "1"}}}}
    descriptor = {"digest": "sha256:1"}
    old = {"name": "guest:1", "index": descriptor, "variants": [variant]}
    new = {"configuration": {"name": "guest:1", "descriptor": descriptor}, "variants": [variant]}
    assert image_labels(old, "amd64") == image_labels(new, "amd64") == ("sha256:1", {"a": "1"})
    assert image_labels(new, "arm64") == ("sha256:1", None)
    assert image_names([{"reference": "guest:1", "descriptor": descriptor}, new]) == {"guest:1": "sha256:1"}
    assert described({"status": "running", "configuration": {"id": "x07-1"}})[0] == "x07-1"
    assert described({"id": "x07-1", "status": {}, "configuration": {"id": "x07-1"}})[0] == "x07-1"
