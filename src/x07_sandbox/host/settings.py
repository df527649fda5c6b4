"""Every number of the tool that a policy does not decide, in one table."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

OUTPUT_MAX_BYTES: Final = 64 * MIB  # per stream
ARTIFACT_MAX_BYTES: Final = 256 * MIB
SOURCE_MAX_BYTES: Final = 64 * MIB
CONSOLE_MAX_BYTES: Final = 64 * KIB
STDERR_MAX_BYTES: Final = 64 * KIB  # of the VMM itself

QUEUE_S: Final = 600.0
BOOT_S: Final = 30.0
BOOTS_MAX: Final = 4  # cold machines for one job, where the kernels of the first measured their timers wrong
CLONE_S: Final = 10.0  # until a clone answers; then the job starts cold
WARM_BYTES: Final = 256 * MIB  # what a warm machine that waits takes, generously; it runs nothing of anybody's
WARM_S: Final = 1800.0  # how long a warm machine waits in a pool at most; then another takes its place
POOL_IDLE_S: Final = 600  # how long a pool lives that nobody uses
TEMPLATE_S: Final = 60.0  # making a VM template: boot, warm-up, saving
# That much more where modules are preloaded. The guest has a limit of its own, 180 s (guest/environment.py).
PRELOAD_S: Final = 200.0
COPY_IN_S: Final = 60.0  # since the guest last took something of the files that go in
CHANGES_OUT_S: Final = 60.0
KVM_PROOF_S: Final = 5.0
KVM_RETRY_S: Final = 300.0  # after a guest under KVM was late, another is tried
TEMPLATE_RETRY_S: Final = 300.0  # after a clone of a VM template was late, or one could not be made in time
# How long a guest may take to say how its program stood when it was killed at its deadline: the longest grace. A tenth
# of a short wall time is too little for an emulated machine among others.
STOPPED_S: Final = 1.0
CLEANUP_MS: Final = 30_000
SETTLE_S: Final = 1.0  # how long what is in the way of undoing changes of files may stay there before it is told

BUILD_WALL_MS: Final = 300_000
BUILD_CPU_MS: Final = 300_000
BUILD_S_MAX: Final = 3600  # what --build-timeout may set
BUILD_MEM_BYTES: Final = 2 * GIB
BUILD_TASKS: Final = 256
BUILD_FDS: Final = 1024

COPY_IN_MAX_BYTES: Final = 4 * GIB  # of all files of the host that go into one machine; its disk has 8 GiB
CHANGES_MAX_BYTES: Final = 2 * GIB  # of all that comes back
# What saving one machine takes at the most, generously: this, and that part of its RAM, which its kernel's table of all
# pages is (64 bytes for each of 4 KiB).
TEMPLATE_BYTES: Final = 384 * MIB
TEMPLATE_SHARE: Final = 64
DAY_S: Final = 86_400.0
RETENTION_S: Final = 7 * DAY_S  # how long records and folders of runs stay, and what was built and is not used
TEMPLATES_MAX_BYTES: Final = 4 * GIB  # of all VM templates together, as the disk counts them
ARTIFACTS_MAX_BYTES: Final = GIB
SCRATCH_BYTES: Final = 8 * GIB
GUEST_HOSTNAME: Final = "x07"
TMP_SHARE: Final = 4  # /tmp may hold a quarter of the memory limit


def allowance_ms() -> int:
    """Time that a job may take besides its program's own: queue, boot, copy in, changes out."""
    return int((QUEUE_S + BOOT_S + COPY_IN_S + CHANGES_OUT_S) * 1000)


def grace_ms(wall_ms: int) -> int:
    """Time between asking a program to end and killing it as X07's runner has it."""
    return min(1000, max(1, wall_ms // 10))
