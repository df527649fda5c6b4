"""Properties of a backend on which a plan depends."""

from typing import Final, Literal

import msgspec

# Strongest first.
Isolation = Literal["vm-hardware", "vm-emulated", "user-kernel", "container", "process", "none"]

# What a virtual machine with our agent can enforce; a limit is named after its policy field.
VM_CAPABILITIES: Final = frozenset(
    {
        *("limits.cpu_ms", "limits.mem_bytes", "limits.fds", "limits.procs", "limits.core_dumps"),
        *("confinement", "host-files", "no-host-files", "no-host-variables", "no-network"),
        *("network", "held-connections", "observed-connections", "command-groups"),
    }
)

# Why a backend does not have "command-groups".
LEAVES_TREE: Final = "a command's processes are found in its process tree and sessions, which a process can leave"
# Why a backend does not have "observed-connections".
NOT_OBSERVED: Final = "system calls are audited, and lookups answered, only in a VM with our kernel"
# Why a program of a backend cannot be root inside.
NO_ROOT: Final = "the program shares this host's kernel, on which it is never root"


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """Wording of plans and outcomes for one kind of isolation."""

    boundary: str  # what separates the program from the host
    inside: str  # the owner of the limits inside the boundary
    no_network: str  # why the program has no network
    supervisor: str  # the host process whose end ends the job
    no_files: str  # why the program has no host files


_VM: Final = Words(
    boundary="the virtual machine",
    inside="the guest's",
    no_network="the VM has no network card",
    supervisor="the virtual machine monitor",
    no_files="the VM contains no host files",
)
_PROCESS: Final = Words(
    boundary="the confined process",
    inside="the sandbox's",
    no_network="its network namespace has only a loopback interface",
    supervisor="the agent's process",
    no_files="only the system's programs are visible",
)
WORDS: Final[dict[Isolation, Words]] = {
    "vm-hardware": _VM,
    "vm-emulated": _VM,
    "user-kernel": msgspec.structs.replace(_PROCESS, boundary="gVisor's kernel"),
    "container": msgspec.structs.replace(_PROCESS, boundary="the container"),
    "process": _PROCESS,
    "none": msgspec.structs.replace(_PROCESS, boundary="nobody", inside="the process's"),
}


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """Features of a backend on this host.

    can_enforce: field names of limits, and abilities: "host-files" (copies in, changes back), "confinement" (of tasks
    and execution), "no-network" and others (the program has none), "network" (connections through the egress gate) and
    "held-connections" (the program sees a denial as an error of connect()), "observed-connections" (what a program
    without a network looks up and connects to is reported), "command-groups" (each command of a sandbox
    has a control group: it has limits of its own, and is killed with all its processes. Otherwise commands share the
    limits of the sandbox, and a process that has left its command's process tree lives until the sandbox is closed).
    """

    isolation: Isolation
    own_kernel: bool  # whether the program's system calls go to a kernel of its own
    can_enforce: frozenset[str]

    @property
    def words(self) -> Words:
        """The wording for this kind of isolation."""
        return WORDS[self.isolation]

    @property
    def emulated(self) -> bool:
        """Whether the CPU is emulated, which is many times slower than hardware."""
        return self.isolation == "vm-emulated"

    @property
    def separates_program(self) -> bool:
        """Whether the program cannot affect the processes that control it."""
        return self.isolation != "none"

    @property
    def weaker_isolation_accepted(self) -> bool:
        """Whether the user accepted weaker isolation. Values that the backend cannot enforce are then advisory."""
        return self.isolation in {"user-kernel", "process", "none"}


def vm_features(isolation: Isolation) -> Features:
    """Return the features of a virtual machine that runs our agent."""
    return Features(isolation=isolation, own_kernel=True, can_enforce=VM_CAPABILITIES)
