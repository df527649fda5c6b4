"""Choice between the jail's two forms: with namespaces, or with Landlock and seccomp alone.

If the kernel forbids namespaces, the second form is used without asking the user. The tests run the same hostile binary
in both forms. X07_VM_REQUIRE_NAMESPACES=1 forbids the second form. Namespaces are tried once per boot and set of
privileges.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from x07_sandbox.errors import HostError, RefusedError, printable
from x07_sandbox.host.arch import Arch
from x07_sandbox.host.paths import closing_fd, fix_for, raised_as
from x07_sandbox.host.processes import output_of
from x07_sandbox.host.variables import flag
from x07_sandbox.host.verdicts import Verdict, file_state
from x07_sandbox.jail.bwrap import BWRAP, Jail, jail_argv, probe_argv
from x07_sandbox.jail.seccomp import vmm_filter

_PROBE_S: Final = 20.0
_PRINTF: Final = "/usr/bin/printf"
_SAID_BYTES: Final = 300
# Messages of the kernel or bubblewrap that say that namespaces are forbidden. No other error, such as a lack of memory,
# justifies the second form.
_FORBIDDEN: Final = (
    *("Operation not permitted", "Permission denied", "Function not implemented", "No permissions to"),
    *("ENOSPC", "No space left on device", "does not support user namespaces", "Invalid argument"),
)
_SWITCHES: Final = (
    *("/proc/sys/user/max_user_namespaces", "/proc/sys/kernel/unprivileged_userns_clone"),
    *("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "/proc/self/attr/current"),
)
_PROC_MAX: Final = 65_536
_RIGHTS: Final = ("CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:", "Seccomp_filters:")
_NEEDED_BY_ROOT: Final = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8}
FLAGS_FOR_ROOT: Final = "--cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt apparmor=unconfined"
FLAGS_FOR_A_USER: Final = "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"


class Form(NamedTuple):
    """One form of the jail. name: its name in the result. landlock: Landlock's version in the form without namespaces.

    why: why namespaces cannot be used here, or "" if they can. named: whether the jail may set a host name.
    """

    name: str
    namespaces: bool
    landlock: int = 0
    why: str = ""
    named: bool = True

    def open_ruleset(self, jail: Jail, program: str) -> int | None:
        """Return the descriptor of the Landlock ruleset that the jail's process needs, or None. Raises OSError."""
        if self.namespaces:
            return None
        from x07_sandbox.jail.landlock import open_ruleset

        return open_ruleset(jail, program, self.landlock)

    def argv(self, jail: Jail, command: list[str], ruleset_fd: int | None) -> list[str]:
        """Return the command line of *command* in the jail."""
        if ruleset_fd is None:
            return jail_argv(jail, command, named=self.named)
        from x07_sandbox.jail.landlock import landlock_argv

        return landlock_argv(jail, command, ruleset_fd)

    def release_message(self, arch: Arch) -> Callable[[int], bytes]:
        """Return a function that turns the pid of the jail's first process into the message that releases the jail."""
        if self.namespaces:
            return lambda _pid: vmm_filter(arch)
        from x07_sandbox.jail.landlock import release_message

        return lambda pid: release_message(arch, pid)


def jail_form() -> Form:
    """Return the form that this host supports. Raises RefusedError if it is forbidden, HostError if neither works."""
    found = _verdict()
    if not (why := found["why"]):
        return Form("namespaces", namespaces=True, named=found.get("named", True))
    if flag("X07_VM_REQUIRE_NAMESPACES"):
        fix = f"Unset X07_VM_REQUIRE_NAMESPACES, which forbids other jails, or allow namespaces: {namespace_flags()}"
        raise RefusedError("a jail with namespaces was required", why, fix, code="no-namespaces")
    from x07_sandbox.kernel import landlock_version  # rarely needed

    return landlock_form(why, landlock_version(), _missing_capabilities() if os.geteuid() == 0 else [])


def landlock_form(why: str, version: int, missing: list[str]) -> Form:
    """Return the form without namespaces. Raises HostError if this host does not support it either.

    why: why namespaces cannot be used. version: the kernel's Landlock version. missing: capabilities that root lacks.
    """
    from x07_sandbox.jail.landlock import KERNEL_NEEDED, VERSION_NEEDED

    what = "cannot build the jail around the virtual machine"
    if version < VERSION_NEEDED:
        found = f"has Landlock {version}" if version else "has no Landlock, or Landlock is switched off"
        needed = f"Landlock {VERSION_NEEDED} ({KERNEL_NEEDED})"
        reason = f"{why}; the jail without namespaces needs {needed}, but the kernel {found}"
        raise HostError(what, reason, f"Allow namespaces here: {namespace_flags()}")
    if missing:
        reason = f"{why}, and root lacks {' '.join(missing)}, which it needs to give the job its own uid"
        fix = f"Run as an ordinary user, grant these capabilities to root, or allow namespaces: {namespace_flags()}"
        raise HostError(what, reason, fix)
    return Form("Landlock and seccomp", namespaces=False, landlock=version, why=why)


def namespace_flags() -> str:
    """Return the container flags that allow the form with namespaces."""
    return f"in a container {FLAGS_FOR_ROOT if os.geteuid() == 0 else FLAGS_FOR_A_USER}, or --privileged"


def forbidden() -> str:
    """Return why namespaces cannot be used here, or "" if they can. Raises HostError if the test itself fails."""
    return str(_verdict()["why"])


def _verdict() -> Mapping[str, Any]:
    return Verdict("namespaces", key=_key()).read_or_make(_try_each)


def _try_each() -> dict[str, object]:
    if (why := _try_namespaces(named=True)) and not _try_namespaces(named=False):
        return {"why": "", "named": False}
    return {"why": why}


def _key() -> list[object]:
    """Return everything known to affect namespaces, as JSON values."""
    found: list[object] = [os.geteuid(), file_state(BWRAP)]
    found += [os.readlink(f"/proc/self/ns/{name}") for name in ("user", "mnt", "pid", "net")]  # noqa: PTH115 - in each run
    found += [line for line in _text("/proc/self/status").splitlines() if line.startswith(_RIGHTS)]
    for path in _SWITCHES:
        with contextlib.suppress(OSError):
            found.append([path, _text(path)])
    return found


def _text(path: str) -> str:
    with closing_fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return os.read(fd, _PROC_MAX).decode(errors="replace")


def _try_namespaces(*, named: bool) -> str:
    what = "cannot test the jail around the virtual machine"
    argv = probe_argv(needed_files(_PRINTF), named=named)
    try:
        done = output_of(argv, timeout_s=_PROBE_S)
    except OSError as exc:
        raise HostError(what, f"{argv[0]} failed with {exc}", fix_for(exc, "Run x07 doctor")) from exc
    except subprocess.TimeoutExpired as exc:
        raise HostError(what, f"{argv[0]} failed with {exc}", "Run x07 doctor") from exc
    if done.stdout == b"ok":
        return ""
    said = printable(done.stderr[:_SAID_BYTES].decode(errors="replace").strip()) or f"status {done.returncode}"
    if any(words in said for words in _FORBIDDEN):
        return f"namespaces are forbidden here ({said})"
    raise HostError(what, said, "Try again, or run x07 doctor")


def _missing_capabilities() -> list[str]:
    status = _text("/proc/self/status").splitlines()
    held = int(next(line.split()[1] for line in status if line.startswith("CapEff:")), 16)
    return [name for name, bit in _NEEDED_BY_ROOT.items() if not held >> bit & 1]


_LDD = "/usr/bin/ldd"
_LINE = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$")


def needed_files(binary: str) -> tuple[str, ...]:
    """Return the absolute paths of *binary*, its shared libraries and its loader. Raises HostError.

    ldd(1) is slow, so the result is cached for this boot, until the binary or the library cache (ld.so.cache) changes.
    """
    with raised_as(HostError, f"cannot find {binary}", "Run x07 doctor to see what is missing"):
        verdict = Verdict("libraries", binary, key=(file_state(binary), file_state("/etc/ld.so.cache")))
    return tuple(verdict.read_or_make(lambda: {"files": _ask(binary)})["files"])


def _ask(binary: str) -> list[str]:
    done = output_of([_LDD, binary], timeout_s=30)
    said, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode == 1 and "not a dynamic executable" in said + errors:
        return [binary]  # linked statically
    if done.returncode != 0:
        why = errors.strip()[:200] or "ldd failed"
        raise HostError(f"cannot list the libraries of {binary}", why, "Reinstall its package")
    found = [match.group(1) for line in said.splitlines() if (match := _LINE.match(line))]
    return [binary, *dict.fromkeys(found)]
