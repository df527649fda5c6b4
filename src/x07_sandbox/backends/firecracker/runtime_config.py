"""The runtime configuration of firecracker-containerd, usually /etc/containerd/firecracker-runtime.json."""

import json
from typing import Any, Final

RUNTIME_CONFIG_MAX: Final = 1 << 20  # bytes
_INTERFACES: Final = "default_network_interfaces"
_FILES: Final = ("kernel_image_path", "root_drive")


def runtime_config_problems(data: bytes) -> list[str]:
    """Return why x07 cannot use this configuration, one clause for each problem; [] if it can.

    A VM without a list of network cards gets default_network_interfaces. An empty list in the call changes nothing.
    """
    if len(data) > RUNTIME_CONFIG_MAX:
        return [f"it has more than {RUNTIME_CONFIG_MAX} bytes"]
    try:
        # Pairs instead of dictionaries: the daemon accepts a key several times, and in any case.
        pairs = json.loads(data.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return ["it is not valid JSON"]
    if not isinstance(pairs, tuple):
        return ["it is not a JSON object"]
    found: dict[str, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key.casefold(), []).append(value)
    problems = [
        f"{name} is missing or not an absolute path"
        for name in _FILES
        if not all(isinstance(value, str) and value.startswith("/") for value in found.get(name, [None]))
    ]
    if any(value not in (None, []) for value in found.get(_INTERFACES, [])):
        problems.append(f"{_INTERFACES} is not empty, so every VM would have a network card")
    return problems
