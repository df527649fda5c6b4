"""The runtime configuration of firecracker-containerd: what x07 accepts."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.backends.firecracker import MACHINES, RUNTIME_CONFIG_MAX, runtime_config

GOOD: dict[str, object] = {
    "firecracker_binary_path": "/usr/local/bin/firecracker",
    "kernel_image_path": "/var/lib/firecracker-containerd/runtime/vmlinux.bin",
    "root_drive": "/var/lib/firecracker-containerd/runtime/rootfs.img",
    "log_levels": ["info"],
    "jailer": {"runc_binary_path": "/usr/local/bin/runc"},
}
CARD = [{"CNIConfig": {"NetworkName": "fcnet", "InterfaceName": "veth0"}}]


def problems(**changes: object) -> list[str]:
    """The problems of GOOD with these changes; None removes a key."""
    return problems_of(
        json.dumps({key: value for key, value in (GOOD | changes).items() if value is not None}).encode()
    )


def problems_of(data: bytes) -> list[str]:
    """The problems of a configuration."""
    return [*runtime_config(data).problems]


@pytest.mark.parametrize("value", [CARD, [{}], {}, "", False, 0])
def test_a_configuration_with_network_cards_is_refused(value: object) -> None:
    """Anything but no or an empty list of network cards is a problem."""
    assert problems() == problems(default_network_interfaces=[]) == []
    text = json.dumps(GOOD)
    assert problems_of(f'{text[:-1]}, "default_network_interfaces": null}}'.encode()) == []
    assert [found.partition(" ")[0] for found in problems(default_network_interfaces=value)] == [
        "default_network_interfaces"
    ]


@pytest.mark.parametrize("name", ["Default_Network_Interfaces", "default_networ\u212a_interface\u017f"])
def test_a_network_card_does_not_hide_behind_another_spelling(name: str) -> None:
    """The daemon accepts keys in any case, and the last of several: every spelling and every one counts."""
    assert problems(**{name: CARD})
    text = json.dumps(GOOD | {name: CARD})
    assert problems_of(f'{text[:-1]}, "default_network_interfaces": []}}'.encode())


@pytest.mark.parametrize("name", ["kernel_image_path", "root_drive", "shim_base_dir"])
@pytest.mark.parametrize("value", ["", "vmlinux", 1, ["/x"]])
def test_files_and_folders_are_absolute_paths(name: str, value: object) -> None:
    """A path that is not absolute is refused, and one that is missing has the daemon's default."""
    assert problems(**{name: value}) == [f"{name} is not an absolute path"]
    assert problems(**{name: None}) == []


def test_the_folder_of_vms_is_that_of_the_daemon() -> None:
    """The working folders of VMs are looked for where the daemon makes them, and one place only is accepted."""
    assert runtime_config(b"{}").machines == MACHINES
    assert runtime_config(b'{"shim_base_dir": "/srv/vms/"}').machines == "/srv/vms"
    assert problems_of(b'{"shim_base_dir": "/a", "SHIM_BASE_DIR": "/b"}') == ["shim_base_dir is set twice"]


def test_what_is_no_configuration_is_refused() -> None:
    """Bytes that are too many, no JSON, no object or too deeply nested are one problem each."""
    assert problems_of(b" " * (RUNTIME_CONFIG_MAX + 1)) == [f"it has more than {RUNTIME_CONFIG_MAX} bytes"]
    for data in (b"", b"{", b"\xff\xfe", b"{} {}", b"[" * 500_000, b'{"a":' * 150_000, b"1" * 10_000):
        assert problems_of(data) == ["it is not valid JSON"]
    for data in (b"[]", b"null", b"1", b'[{"kernel_image_path": "/x"}]'):
        assert problems_of(data) == ["it is not a JSON object"]


KEYS = st.sampled_from(["kernel_image_path", "root_drive", "default_network_interfaces"]) | st.text(max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b'{"default_network_interfaces": NaN}')
def test_any_bytes_give_a_limited_list_of_problems(data: bytes) -> None:
    """Any bytes give at most five problems, and none only for an object."""
    found = problems_of(data)
    assert len(found) <= 5
    assert all(text.isascii() and text.isprintable() for text in found)
    assert found or isinstance(json.loads(data), dict)
