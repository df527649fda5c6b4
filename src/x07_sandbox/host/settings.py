"""Constants: the version of this package, and what a policy does not control."""

from typing import Final

__version__ = "0.1.0.dev0"

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

OUTPUT_MAX_BYTES: Final = 64 * MIB  # per stream
FILES_BYTES: Final = 64 * MIB  # all files of a result, unless the caller sets another limit
ARTIFACT_MAX_BYTES: Final = 256 * MIB
SOURCE_MAX_BYTES: Final = 64 * MIB
CONSOLE_MAX_BYTES: Final = 64 * KIB
STDERR_MAX_BYTES: Final = 64 * KIB  # of the VMM

QUEUE_S: Final = 600.0
BOOT_S: Final = 30.0  # timeout of a boot
FOREIGN_BOOT_S: Final = 120.0  # timeout of a boot of another architecture than the host's, which is emulated
BOOTS_SLOWER: Final = 4  # or this many times the boot that proved KVM, if that is more
BOOTS_MAX: Final = 4  # boot attempts per job, if a kernel miscalibrates its timers
HOLD_S: Final = 5.0  # for programs to stop before a snapshot; the guest itself waits for at most 2 s
CLONE_S: Final = 10.0  # timeout of a clone; then the job starts cold
WARM_BYTES: Final = 256 * MIB  # upper bound for an idle warm machine
WARM_S: Final = 1800.0  # maximum age of a warm machine in a pool
POOL_IDLE_S: Final = 600  # idle timeout of a pool
TEMPLATE_S: Final = 60.0  # making a VM template: boot, warm-up, saving
# In addition, if modules are preloaded. The guest's own limit is 180 s (guest/environment.py).
PRELOAD_S: Final = 200.0
SAVING_S: Final = 900  # how long a background process may take to save a VM and a process
SAVING_BYTES: Final = 1536 * MIB  # spare memory without which none is started
HOT_S: Final = 43_200.0  # how long a saved process of a VM is used (12 hours)
COPY_IN_S: Final = 60.0  # without progress of the copy
CHANGES_OUT_S: Final = 60.0
FILES_S: Final = 60.0  # a file request of a sandbox without progress, unless its caller sets another limit
KVM_PROOF_S: Final = 5.0  # least time for the test of KVM; the most is BOOT_S
KVM_PROOF_JAILS: Final = 100  # in between: this many times the measured start of the jail
RETRY_S: Final = 300.0  # before KVM or a template is tried again after a failure that the host may have caused
RETRY_MAX_S: Final = 3600.0  # the most: each further failure doubles that time
# How long a guest may take to report the state of its program at the deadline. Equals the longest grace, because a
# tenth of a short wall time is too short for an emulated machine.
STOPPED_S: Final = 1.0
# The same in a sandbox that stays open: a guest that has many commands to end may be slow, and would be lost.
SANDBOX_STOPPED_S: Final = 30.0
CLEANUP_MS: Final = 30_000
SETTLE_S: Final = 1.0  # how long an obstacle to an undo may persist before it is reported

BUILD_WALL_MS: Final = 300_000
BUILD_CPU_MS: Final = 300_000
BUILD_S_MAX: Final = 3600  # what --build-timeout may set
BUILD_MEM_BYTES: Final = 2 * GIB
BUILD_TASKS: Final = 256
BUILD_FDS: Final = 1024

COPY_IN_MAX_BYTES: Final = 4 * GIB  # host files of one machine; its disk has 8 GiB
CHANGES_MAX_BYTES: Final = 2 * GIB  # all changes of a run
# Upper bound for a saved machine: this, plus this share of its RAM for the kernel's page table (64 bytes per 4 KiB).
TEMPLATE_BYTES: Final = 384 * MIB
TEMPLATE_SHARE: Final = 64
DAY_S: Final = 86_400.0
LIFETIME_MAX_S: Final = 86_400  # of a sandbox
LIFETIME_S: Final = 3600.0  # of a sandbox, unless its creator sets another one
RETENTION_S: Final = 7 * DAY_S  # of records and folders of runs, and unused artifacts
ARTIFACTS_MAX_BYTES: Final = GIB
SCRATCH_BYTES: Final = 8 * GIB
GUEST_HOSTNAME: Final = "x07"
TMP_SHARE: Final = 4  # /tmp gets a quarter of the memory limit


def allowance_ms() -> int:
    """Return the time that a job may take besides its program: queue, boot, copying files in, copying changes out."""
    return int((QUEUE_S + BOOT_S + COPY_IN_S + CHANGES_OUT_S) * 1000)


def grace_ms(wall_ms: int) -> int:
    """Return the time between SIGTERM and SIGKILL. X07's own runner uses the same time."""
    return min(1000, max(1, wall_ms // 10))
