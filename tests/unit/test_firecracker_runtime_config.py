"""The runtime configuration of firecracker-containerd: what x07 accepts."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.backends.firecracker.runtime_config import RUNTIME_CONFIG_MAX, runtime_config_problems

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
    return runtime_config_problems(
        json.dumps({key: value for key, value in (GOOD | changes).items() if value is not None}).encode()
    )


def test_a_configuration_without_network_cards_is_accepted() -> None:
    """A configuration without network cards has no problem, whether it omits them or has an empty list."""
    assert problems() == problems(default_network_interfaces=[]) == []
    text = json.dumps(GOOD)
    assert runtime_config_problems(f'{text[:-1]}, "default_network_interfaces": null}}'.encode()) == []


@pytest.mark.parametrize("value", [CARD, [{}], {}, "", False, 0])
def test_a_configuration_with_network_cards_is_refused(value: object) -> None:
    """Anything but an empty list of network cards is a problem."""
    assert [found.partition(" ")[0] for found in problems(default_network_interfaces=value)] == [
        "default_network_interfaces"
    ]


@pytest.mark.parametrize("name", ["Default_Network_Interfaces", "default_networ\u212a_interface\u017f"])
def test_a_network_card_does_not_hide_behind_another_spelling(name: str) -> None:
    """The daemon accepts keys in any case, and the last of several: every spelling and every one counts."""
    assert problems(**{name: CARD})
    text = json.dumps(GOOD | {name: CARD})
    assert runtime_config_problems(f'{text[:-1]}, "default_network_interfaces": []}}'.encode())


@pytest.mark.parametrize("name", ["kernel_image_path", "root_drive"])
@pytest.mark.parametrize("value", [None, "", "vmlinux", 1, ["/x"]])
def test_kernel_and_root_drive_are_absolute_paths(name: str, value: object) -> None:
    """A configuration without an absolute path of the kernel or the root drive is refused."""
    assert problems(**{name: value}) == [f"{name} is missing or not an absolute path"]


def test_what_is_no_configuration_is_refused() -> None:
    """Bytes that are too many, no JSON, no object or too deeply nested are one problem each."""
    assert runtime_config_problems(b" " * (RUNTIME_CONFIG_MAX + 1)) == [f"it has more than {RUNTIME_CONFIG_MAX} bytes"]
    for data in (b"", b"{", b"\xff\xfe", b"{} {}", b"[" * 500_000, b'{"a":' * 150_000, b"1" * 10_000):
        assert runtime_config_problems(data) == ["it is not valid JSON"]
    for data in (b"[]", b"null", b"1", b'[{"kernel_image_path": "/x"}]'):
        assert runtime_config_problems(data) == ["it is not a JSON object"]


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["kernel_image_path", "root_drive", "default_network_interfaces"])
                | st.text(max_size=4),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
@example(b'{"default_network_interfaces": NaN}')
def test_any_bytes_give_a_limited_list_of_problems(data: bytes) -> None:
    """Any bytes give at most three problems, and none only for an object that names both files."""
    found = runtime_config_problems(data)
    assert len(found) <= 3
    assert all(text.isascii() and text.isprintable() for text in found)
    assert found or {"kernel_image_path", "root_drive"} <= {key.casefold() for key in json.loads(data)}
