"""What a backend says about itself, as far as a plan depends on it."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

# Strongest first.
Isolation = Literal["vm-hardware", "vm-emulated", "container", "process", "none"]

# What a virtual machine with our agent in it holds. A capability bears the name of the policy field that needs it.
VM_HOLDS: Final = frozenset(
    {
        *("limits.cpu_ms", "limits.mem_bytes", "limits.fds", "limits.procs", "limits.core_dumps"),
        *("confinement", "host-files", "no-host-files", "no-host-variables", "no-network"),
        *("network", "held-connections"),
    }
)


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """How a plan and a verdict speak of a kind of isolation.

    boundary: what keeps the program apart. inside: whose the program's limits are. no_network: why it has none.
    supervisor: the process of the host whose end ends the job. no_files: why it has none of the host's.
    """

    boundary: str
    inside: str
    no_network: str
    supervisor: str
    no_files: str


_VM: Final = Words(
    boundary="the virtual machine",
    inside="the guest's",
    no_network="the machine has no network card",
    supervisor="the virtual machine monitor",
    no_files="no file of the host is in the machine",
)
_PROCESS: Final = Words(
    boundary="the confined process",
    inside="the sandbox's",
    no_network="its network namespace has only a loopback interface",
    supervisor="the agent's process",
    no_files="of the host's files only the system's programs are there",
)
WORDS: Final[dict[Isolation, Words]] = {
    "vm-hardware": _VM,
    "vm-emulated": _VM,
    "container": msgspec.structs.replace(_PROCESS, boundary="the container"),
    "process": _PROCESS,
    "none": msgspec.structs.replace(_PROCESS, boundary="nobody", inside="the process's"),
}


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """A backend on this host.

    own_kernel: the program's system calls meet a kernel that is not the host's. can_enforce: limits by field name,
    "host-files" (copies in, changes back), "confinement" (of tasks and executing), the walls "no-...", "network" (to
    carry connections to the egress gate) and "held-connections" (a refusal is connect()'s own error in the program).
    """

    isolation: Isolation
    own_kernel: bool
    can_enforce: frozenset[str]

    @property
    def words(self) -> Words:
        """How to speak of it."""
        return WORDS[self.isolation]

    @property
    def emulated(self) -> bool:
        """Whether CPU work is many times slower than on hardware."""
        return self.isolation == "vm-emulated"

    @property
    def separates_program(self) -> bool:
        """Whether the program is kept from the processes that hold it."""
        return self.isolation != "none"

    @property
    def weaker_isolation_accepted(self) -> bool:
        """Whether the user has accepted that it holds less than every policy asks for: that is advisory then."""
        return self.isolation in {"process", "none"}


def container_features() -> Features:
    """Those of a container with our agent in it."""
    return Features(isolation="container", own_kernel=False, can_enforce=VM_HOLDS - {"held-connections"})


def vm_features(isolation: Isolation) -> Features:
    """Those of a virtual machine with our agent in it."""
    return Features(isolation=isolation, own_kernel=True, can_enforce=VM_HOLDS)
