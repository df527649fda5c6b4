"""The jail's second form: its seccomp filter by interpretation, its Landlock rules and command line."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from select import PIPE_BUF

import msgspec
import pytest

from tests.unit.test_jail_bwrap import COMMAND, UID, jail
from tests.unit.test_jail_own_limits import (
    ALLOW,
    KILL,
    LACKING,
    LINE,
    LINES_MOST,
    REFUSED,
    X32_READ,
    answer,
    compiled,
    each_arch,
    number,
    numbers,
)
from x07_sandbox import kernel
from x07_sandbox.errors import HostError
from x07_sandbox.host.arch import Arch, host_arch
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV
from x07_sandbox.jail.forms import FLAGS_FOR_A_USER, FLAGS_FOR_ROOT, landlock_form
from x07_sandbox.jail.landlock import (
    file_rights,
    landlock_argv,
    landlock_filter,
    random_addresses,
    release_message,
)
from x07_sandbox.jail.seccomp import VMM_CALLS, restored_filter, vmm_filter, vmm_rules

PID = 4711
ALL = (1 << 64) - 1
DRAWN = (0x2345_6789_ABC0, 0x1FFF_0000_0008, 0x4000_0000_0010)
READ, WRITE, EXECUTE, TRUNCATE = 1 << 2, 1 << 1, 1 << 0, 1 << 14
HEADER = struct.Struct("=QQQQ")


def ask(arch: Arch, name: str, *arguments: int) -> int:
    """The filter's verdict on a call by name."""
    return answer(compiled(made, arch.name), number(arch.name, name), arch.audit, arguments)


def made(arch: Arch) -> bytes:
    """The filter of one job."""
    return landlock_filter(arch, PID, DRAWN)


@each_arch
def test_a_call_that_is_not_listed_is_refused(arch: Arch) -> None:
    """An unlisted call is denied, and a call of another architecture kills the VMM."""
    program = made(arch)
    listed = {*VMM_CALLS, *vmm_rules(PID), "execve", "clone3", "socket", "kill"}
    for call in set(range(1024)) - numbers(arch, *listed):
        assert answer(program, call, arch.audit) == REFUSED, call
    assert answer(program, number(arch.name, "read"), 0x40000003) == KILL
    if arch.name == "x86_64":
        assert answer(program, X32_READ, arch.audit) == LACKING
    assert len(program) // LINE.size <= LINES_MOST


@each_arch
def test_the_command_is_executed_once(arch: Arch) -> None:
    """The filter allows execve only with the three secret addresses."""
    assert ask(arch, "execve", *DRAWN) == ALLOW
    for at in range(3):
        for wrong in (0, DRAWN[at] + 8, DRAWN[at] ^ 1 << 40, DRAWN[at] & 0xFFFFFFFF):
            assert ask(arch, "execve", *DRAWN[:at], wrong, *DRAWN[at + 1 :]) == REFUSED


def test_the_addresses_cannot_be_guessed() -> None:
    """The secret addresses of each job are random and cannot be guessed."""
    drawn = [place for _ in range(200) for place in random_addresses()]
    assert len(set(drawn)) == len(drawn)
    assert all(place % 8 == 0 and 1 << 44 <= place < 5 << 44 for place in drawn)
    assert (5 - 1 << 44) // 8 >= 1 << 43
    assert len({place >> 40 for place in drawn}) > 20


@each_arch
def test_the_vmm_starts_and_reaches_nothing_but_its_threads(arch: Arch) -> None:
    """The VMM may start threads and signal its own, but starts no process or namespace and makes no socket."""
    thread = 0x003D0F00
    assert ask(arch, "clone", thread) == ALLOW
    assert ask(arch, "clone", thread | 0x10000000) == REFUSED
    assert ask(arch, "clone", 17) == REFUSED
    assert ask(arch, "clone3") == LACKING
    assert ask(arch, "tgkill", PID, PID + 1, 6) == ALLOW
    assert ask(arch, "tgkill", PID + 1, PID + 1, 9) == REFUSED
    assert ask(arch, "kill", PID, 9) == ask(arch, "kill", 1, 0) == 0x00050000 | errno.ESRCH
    assert {ask(arch, "socket", family, 1) for family in range(46)} == {0x00050000 | errno.EAFNOSUPPORT}
    assert {ask(arch, name) for name in ("connect", "bind", "socketpair")} == {REFUSED}


@each_arch
def test_arguments_are_checked(arch: Arch) -> None:
    """Dangerous arguments of allowed calls are denied."""
    assert ask(arch, "ioctl", 3, 0xAE80) == ALLOW
    assert {ask(arch, "ioctl", 3, request) for request in (0x8901, 0x8902, 0x40086602, 0x5412)} == {REFUSED}
    assert {ask(arch, "fcntl", 3, command) for command in (5, 6, 8, 36, 1024, 1026, 1036)} == {REFUSED}
    assert ask(arch, "prctl", 15) == ALLOW
    assert ask(arch, "prctl", 1) == REFUSED
    assert ask(arch, "prlimit64", 0, 7, 0) == ALLOW
    assert ask(arch, "prlimit64", 0, 7, 1 << 32) == ask(arch, "prlimit64", 1, 7, 0) == REFUSED
    assert ask(arch, "openat", 0, 0, 0o2000101) == ALLOW  # Landlock decides
    assert ask(arch, "openat", 0, 0, 0x410000) == REFUSED  # a file without a name


# Values that a filter tells apart, for each argument.
INTERESTING = (0, 1, 2, 4, 5, 8, 15, 17, 38, 1030, 1036, 0x541B, 0x5412, 0xAE80, 0x3D0F00, 0x103D0F00, PID, ALL)


@each_arch
def test_a_restored_vmm_may_do_nothing_that_a_started_one_may_not(
    arch: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored VMM executes nothing, and its filter allows only what the jail's filter of a started VMM allows."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path))
    restored, started = restored_filter(arch, PID), vmm_filter(arch)
    assert restored_filter(arch, PID) == restored
    assert len(restored) + 100 <= PIPE_BUF  # the message is written whole or not at all
    assert answer(restored, number(arch.name, "execve"), arch.audit, DRAWN) == REFUSED
    calls = numbers(arch, *VMM_CALLS, *vmm_rules(PID))
    arguments = [(*(0,) * at, value) for at in range(4) for value in INTERESTING]
    allowed = [
        (call, words) for call in calls for words in arguments if answer(restored, call, arch.audit, words) == ALLOW
    ]
    assert allowed
    assert [one for one in allowed if answer(started, one[0], arch.audit, one[1]) != ALLOW] == []


def test_the_release_message_is_atomic() -> None:
    """The message that releases the jail is written atomically and states its length."""
    message = release_message(host_arch(), PID)
    path, arguments, environment, length = HEADER.unpack_from(message)
    assert message[HEADER.size :] == landlock_filter(host_arch(), PID, (path, arguments, environment))
    assert (length, len(message) < 65536) == (len(message) - HEADER.size, True)


@pytest.mark.parametrize(
    ("version", "wanted"),
    [(3, (0x7FFF, 0, 0)), (4, (0x7FFF, 3, 0)), (5, (0xFFFF, 3, 0)), (6, (0xFFFF, 3, 3)), (9, (0xFFFF, 3, 3))],
)
def test_landlock_uses_all_of_its_version(version: int, wanted: tuple[int, int, int]) -> None:
    """Landlock restricts everything that its version supports."""
    assert kernel.landlock_restrictions(version) == wanted


def test_files_have_no_more_rights_than_they_need() -> None:
    """Files are readable; only the VMM is executable, and only given descriptors are writable."""
    made = msgspec.structs.replace(jail(UID), fd_writable=((13, "/proc/self/fd/13"),))
    assert file_rights(made, COMMAND[0]) == {
        "/usr/bin/qemu": READ | EXECUTE,
        "/lib64/ld.so": READ,
        "/usr/share/seabios/bios.bin": READ,
        "/dev/urandom": READ,
        11: READ,
        12: READ,
        13: READ | WRITE | TRUNCATE,
    }


@pytest.mark.parametrize("uid", [UID, None], ids=["root", "user"])
def test_all_of_it_runs_under_the_job_s_uid(uid: int | None) -> None:
    """As root the whole jail, including its supervisor, runs under the job's uid."""
    argv = landlock_argv(jail(uid), COMMAND, 20)
    assert argv[-len(COMMAND) :] == COMMAND
    assert BWRAP not in argv
    assert argv.count(PERL) == 2
    script = next(word for word in argv[argv.index(PERL, argv.index(PERL) + 1) :] if "landlock" in word)
    if uid is None:
        assert SETPRIV not in argv
        assert Path(script).name == "landlock.pl"
    else:
        assert argv[0] == SETPRIV
        assert argv[argv.index("--reuid") + 1] == str(UID)
        assert "Confines this process" in script


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_kernel_with_too_old_a_landlock_is_refused(version: int) -> None:
    """Without namespaces, nothing runs with a Landlock older than version 3, or as root that cannot change its uid."""
    with pytest.raises(HostError) as caught:
        landlock_form("namespaces are forbidden here", version, [])
    assert "needs Landlock 3 (Linux 6.2)" in caught.value.why
    assert any(flags in caught.value.fix for flags in (FLAGS_FOR_ROOT, FLAGS_FOR_A_USER))
    with pytest.raises(HostError, match="root lacks CAP_SETUID"):
        landlock_form("namespaces are forbidden here", 7, ["CAP_SETUID"])
    assert landlock_form("why", 7, []).landlock == 7
