"""What a backend says about itself, as far as a plan depends on it."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

# Strongest first.
Isolation = Literal["vm-hardware", "vm-emulated", "container", "process", "none"]

# What a virtual machine with our agent in it holds. A capability bears the name of the policy field that needs it.
VM_HOLDS: Final = frozenset(
    {
        "limits.cpu_ms",
        "limits.mem_bytes",
        "limits.fds",
        "limits.procs",
        "limits.core_dumps",
        "confinement",
        "host-files",
        "no-host-files",
        "no-host-variables",
        "no-network",
    }
)


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """A backend on this host.

    own_kernel: the program's system calls meet a kernel that is not the host's.
    can_hold: limits by field name, "host-files" (it brings copies in, and changes back), "confinement" (it
    forbids a program tasks and executing), and the walls "no-host-files", "no-host-variables", "no-network".
    """

    isolation: Isolation
    own_kernel: bool
    can_hold: frozenset[str]

    @property
    def emulated(self) -> bool:
        """Whether CPU work is many times slower than on hardware."""
        return self.isolation == "vm-emulated"


def vm_features(isolation: Isolation) -> Features:
    """Those of a virtual machine with our agent in it."""
    return Features(isolation=isolation, own_kernel=True, can_hold=VM_HOLDS)
