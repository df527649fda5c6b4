"""Command line, ruleset and filter of the jail without namespaces: Landlock and seccomp.

data/landlock.pl applies both to the process that becomes the VMM (docs/explanation/design.md, "The jail"):

Landlock   The VMM can open only its own file, its libraries and firmware, and the files it was given, each with the
           rights that it needs.
seccomp    Only the system calls that QEMU makes are allowed, and they accept no pid but the VMM's own. No allowed call
           makes a socket or a process, changes a file's mode, owner or times, or executes a program once the VMM has
           started.

This form has no root of its own, so the VMM opens files that come as descriptors through /proc/self/fd. If root starts
the jail, the whole jail, including the supervisor, runs under the job's uid.
"""

import os
import secrets
import struct
from pathlib import Path
from typing import Final

from x07_sandbox import kernel
from x07_sandbox.host.arch import Arch, host_arch
from x07_sandbox.jail.bwrap import PERL, Jail, supervisor_argv
from x07_sandbox.jail.seccomp import ALL_64_BITS, VMM_CALLS, VMM_ERRORS, Check, allowlist_filter, vmm_rules

CONFINER: Final = Path(__file__).with_name("data") / "landlock.pl"
# Since this version truncating is a separate right; before, a file with read access could be emptied.
VERSION_NEEDED: Final = 3
KERNEL_NEEDED: Final = "Linux 6.2"

_SETUP_CALLS: Final = ("close_range", "mmap", "read", "execve", "prctl", "seccomp", "prlimit64")

_LOWEST, _HIGHEST = 0x100000000000, 0x500000000000  # where the kernel maps nothing by itself


# The addresses of the command's path, arguments and environment at execve, random for each job.
ExecAddresses = tuple[int, int, int]


def random_addresses() -> ExecAddresses:
    """Return three addresses that cannot be guessed."""
    step = 8  # the alignment of pointers
    path, arguments, environment = (_LOWEST + step * secrets.randbelow((_HIGHEST - _LOWEST) // step) for _ in range(3))
    return path, arguments, environment


def landlock_argv(jail: Jail, command: list[str], ruleset_fd: int) -> list[str]:
    """Return the command line: supervisor, confining script, *command*. ruleset_fd: see `open_ruleset`."""
    kept = [fd for fd, _ in (*jail.fd_files, *jail.fd_writable)] + list(jail.fds)
    numbers = (str(host_arch().syscalls[name]) for name in _SETUP_CALLS)
    variables = [f"X07_INSTANCE={jail.mark}", "MALLOC_ARENA_MAX=1"]  # as in jail_argv
    script = [str(CONFINER)] if jail.uid is None else ["-e", CONFINER.read_text(encoding="utf-8"), "--"]
    argv = [PERL, *script, str(jail.filter_fd), str(ruleset_fd), ",".join(map(str, kept)), *numbers]
    limits = [str(number) for which, values in jail.limits.items() for number in (which, *values)]
    argv += [str(len(limits)), *limits, str(len(variables)), *variables, *command]
    return supervisor_argv(
        argv,
        deadline_s=jail.deadline_s,
        runner_pid=jail.runner_pid,
        nest=False,
        keep_fd=jail.lock_fd,
        uid=jail.uid,
    )


def open_ruleset(jail: Jail, program: str, version: int) -> int:
    """Return the descriptor of a Landlock ruleset that allows only the jail's files. Raises OSError.

    It restricts everything that the kernel's Landlock version can restrict.
    """
    fd = kernel.landlock_ruleset(*kernel.landlock_restrictions(version))
    try:
        for file, rights in file_rights(jail, program).items():
            kernel.landlock_allow(fd, file, rights)
    except OSError:
        os.close(fd)
        raise
    return fd


def file_rights(jail: Jail, program: str) -> dict[str | int, int]:
    """Return the rights on each file, by path or descriptor."""
    rights: dict[str | int, int] = dict.fromkeys((*jail.files, *jail.devices), kernel.READ_FILE)
    for path in rights.keys() & {program, host_arch().loader}:
        rights[path] |= kernel.EXECUTE
    rights |= {fd: kernel.READ_FILE for fd, _ in jail.fd_files}
    return rights | {fd: kernel.READ_FILE | kernel.WRITE_FILE | kernel.TRUNCATE for fd, _ in jail.fd_writable}


def release_message(arch: Arch, pid: int) -> bytes:
    """Return the message that releases the jail: the addresses, and the filter for process *pid*."""
    addresses = random_addresses()
    program = landlock_filter(arch, pid, addresses)
    return struct.pack("=QQQQ", *addresses, len(program)) + program


def landlock_filter(arch: Arch, pid: int, addresses: ExecAddresses) -> bytes:
    """Return the seccomp filter, an array of struct sock_filter."""
    execute = tuple(Check(number, (place,), ALL_64_BITS) for number, place in enumerate(addresses))
    return allowlist_filter(arch, VMM_CALLS, {**vmm_rules(pid), "execve": (execute,)}, VMM_ERRORS)
