"""The runtime configuration of firecracker-containerd, usually /etc/containerd/firecracker-runtime.json."""

import json
from typing import Any, Final, NamedTuple

RUNTIME_CONFIG_MAX: Final = 1 << 20  # bytes
MACHINES: Final = "/var/lib/firecracker-containerd/shim-base"
_INTERFACES: Final = "default_network_interfaces"
_FILES: Final = ("kernel_image_path", "root_drive", "shim_base_dir")


class RuntimeConfig(NamedTuple):
    """What x07 needs to know. machines: the folder with the working folders of VMs.

    problems: why x07 cannot use this configuration, one clause for each problem.
    """

    machines: str = MACHINES
    problems: tuple[str, ...] = ()


def runtime_config(data: bytes) -> RuntimeConfig:
    """Return what x07 needs of this configuration. The jailer in it is used only by calls that ask for it.

    A VM without a list of network cards gets default_network_interfaces. An empty list in the call changes nothing.
    """
    if len(data) > RUNTIME_CONFIG_MAX:
        return RuntimeConfig(problems=(f"it has more than {RUNTIME_CONFIG_MAX} bytes",))
    try:
        # Pairs instead of dictionaries: the daemon accepts a key several times, and in any case.
        pairs = json.loads(data.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return RuntimeConfig(problems=("it is not valid JSON",))
    if not isinstance(pairs, tuple):
        return RuntimeConfig(problems=("it is not a JSON object",))
    found: dict[str, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key.casefold(), []).append(value)
    problems = [
        f"{name} is not an absolute path"
        for name in _FILES
        if not all(isinstance(value, str) and value.startswith("/") for value in found.get(name, []))
    ]
    if any(value not in (None, []) for value in found.get(_INTERFACES, [])):
        problems.append(f"{_INTERFACES} is not empty, so every VM would have a network card")
    places = {str(value).rstrip("/") for value in found.get("shim_base_dir", [])} or {MACHINES}
    if len(places) > 1:
        problems.append("shim_base_dir is set twice")
    return RuntimeConfig(machines=min(places), problems=tuple(problems))
