"""What a VMM that was taken over can reach: a hostile program in QEMU's place, through the same launcher."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.vm.jail_helpers import (
    Account,
    Look,
    Runner,
    accounts_fixture,  # noqa: F401 - pytest finds it here
    all_pids,
    descriptors,
    each_form_fixture,  # noqa: F401 - pytest finds it here
    parse,
    status,
)
from x07_sandbox.backends.qemu.machine import OVERCOMMIT
from x07_sandbox.host import settings
from x07_sandbox.images.store import find_image
from x07_sandbox.jail.bwrap import SETPRIV
from x07_sandbox.jail.libraries import needed_files
from x07_sandbox.jail.uids import COUNT, free_range

pytestmark = pytest.mark.vm

IPC_CREAT = 0o1000
IPC_RMID = 0
URANDOM = "/dev/urandom"  # everybody may write to it
CAP_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


class HostThings:
    """What the test puts on the host for the program to find: sockets, queues, a process, a file with a secret."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        token = secrets.token_hex(4)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="x07-host-")))
        self.folder.chmod(0o755)
        self.secret = self.folder / "secret"
        self.secret.write_text("secret", encoding="ascii")
        self.mode = self.secret.stat().st_mode & 0o777
        self.tcp = [self._listen(stack, socket.AF_INET, ("127.0.0.1", 0))]
        port = self.tcp[0].getsockname()[1]
        with contextlib.suppress(OSError):
            self.tcp.append(self._listen(stack, socket.AF_INET6, ("::1", port)))
        self.udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.udp.bind(("127.0.0.1", 0))
        self.abstract = self._listen(stack, socket.AF_UNIX, f"\0x07-{token}")
        self.path = self._listen(stack, socket.AF_UNIX, str(self.folder / "socket"))
        (self.folder / "socket").chmod(0o777)
        self.listeners = [*self.tcp, self.udp, self.abstract, self.path]
        for listener in self.listeners:
            listener.settimeout(0)
        libc = ctypes.CDLL(None, use_errno=True)
        self.key = secrets.randbelow(1 << 30) + 1
        shm = libc.shmget(self.key, 4096, IPC_CREAT | 0o666)
        assert shm >= 0
        stack.callback(libc.shmctl, shm, IPC_RMID, None)
        self.shm = shm
        self.queue = f"/x07-{token}"
        mq = libc.mq_open(self.queue.encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
        assert mq >= 0
        stack.callback(libc.mq_unlink, self.queue.encode())
        stack.callback(os.close, mq)
        self.process = subprocess.Popen(["/usr/bin/sleep", "600"], stdin=subprocess.DEVNULL)
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)

    @staticmethod
    def _listen(stack: contextlib.ExitStack, family: int, address: tuple[str, int] | str) -> socket.socket:
        listener = stack.enter_context(socket.socket(family))
        listener.bind(address)
        listener.listen()
        return listener

    def facts(self, account: Account, other: Runner, mine: Runner) -> tuple[str, list[str]]:
        """What the program is told, and the paths among it."""
        folders = [Path(runner.started["folder"]) for runner in (other, mine)]
        paths = [
            "/dev/shm",  # noqa: S108 - it must not be there
            *(
                "/etc/passwd",
                "/etc/shadow",
                "/etc",
                "/root",
                "/home",
                "/var",
                "/run",
                "/opt",
                "/boot",
                "/sys",
                "/proc/version",
            ),
            *("/proc/self", "/proc/self/fd", "/proc/1/environ", "/proc/1/root", "/proc/kcore", "/sys/kernel"),
            *("/dev/mem", "/dev/kmem", "/dev/kvm", "/dev/null", "/dev/vda", "/dev/pts", "/dev/tty"),
            *("/dev/mqueue", "/dev/fuse", "/dev/net/tun", "/dev/vsock", "/sys/fs/cgroup", "/bin/sh", "/usr/bin/env"),
            *map(str, [account.home, account.cache, account.state, *folders, folders[0] / "owner.json", self.secret]),
            *map(str, [find_image(None).folder, account.folder / "jail_driver.py", account.hostile("mute")]),
        ]
        pids = [self.process.pid, os.getpid(), other.process.pid, *other.processes().values()]
        pids += [getattr(mine, name) for name in account.outer if name != "inner"]
        # The program's own user may change these: no permission of theirs keeps it out.
        for path in (self.folder, self.secret):
            os.chown(path, account.uid, account.uid)
        files = [str(self.secret), *sorted(own_files(account, mine) - {URANDOM}), "/usr/bin/env", "/dev/null"]
        places = [str(self.folder), str(account.home), "/tmp", "/dev/shm", "/proc/self", "/"]  # noqa: S108 - host's own
        lines = [f"read {path}" for path in paths] + [f"pid {pid}" for pid in pids]
        lines += [f"own {path}" for path in own_files(account, mine)]
        lines += [f"file {path}" for path in files] + [f"folder {path}" for path in places]
        lines += [f"tcp {self.tcp[0].getsockname()[1]}", f"udp {self.udp.getsockname()[1]}"]
        lines += [f"abstract {self.abstract.getsockname()[1:].decode()}", f"unix {self.path.getsockname()}"]
        lines += [f"shm {self.key}", f"shm-id {self.shm}", f"mq {self.queue}"]
        return "".join(f"{line}\n" for line in lines), paths

    def touched(self) -> list[str]:
        """What of the folder and the file of theirs is not as it was."""
        found = [name for name in os.listdir(self.folder) if name not in {"secret", "socket"}]  # noqa: PTH208 - names
        info = self.secret.stat()
        whole = self.secret.read_text(encoding="ascii") == "secret" and info.st_mode & 0o777 == self.mode
        return found + ([] if whole and info.st_mtime > 1 else ["secret"])

    def reached(self) -> list[str]:
        """Which of them somebody has reached."""
        found = []
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                if listener is self.udp:
                    listener.recv(100)
                else:
                    listener.accept()[0].close()
                found.append(str(listener.getsockname()))
        if self.process.poll() is not None:
            found.append("the process was ended")
        return found


def own_files(account: Account, mine: Runner) -> set[str]:
    """What the jail holds for the program."""
    return {str(account.hostile("look")), *mine.image_files(), URANDOM}


@pytest.fixture(scope="session")
def look(each_form: Account) -> Look:
    """One hostile program beside another job; both are gone when the tests look at what was found."""
    account = each_form
    with contextlib.ExitStack() as stack:
        host = HostThings(stack)
        image = find_image(None) if not account.command else None
        folder = image.folder if image else next(account.cache.glob("images/[0-9a-f]*"))
        before = (folder / "root.erofs").stat()
        other = stack.enter_context(Runner(account, mode="mute", do="hold"))
        other.say("release")
        other.vmm()
        mine = stack.enter_context(Runner(account, mode="look", do="talk"))
        facts, paths = host.facts(account, other, mine)
        mine.say(json.dumps(f"{facts}go\n"))
        message = mine.hear("findings")
        findings = parse(message["text"])
        assert findings, message
        assert findings[-1].probe == "end", (findings[-1], message["status"], message["console"])
        pids = [runner.processes() for runner in (mine, other)]
        seen = Look(
            account=account,
            findings=findings,
            started=mine.started,
            statuses=[{name: status(pid) for name, pid in jail.items()} for jail in pids],
            links=[{name: descriptors(pid) for name, pid in jail.items()} for jail in pids],
            paths=paths,
            own=own_files(account, mine),
            image=(before, (folder / "root.erofs").stat()),
            touched=host.touched(),
            reached=host.reached() + ([] if other.process.poll() is None else ["the other job's runner"]),
        )
        for runner in (mine, other):
            runner.say("stop")
            assert runner.hear("gone")["done"]
            assert runner.left() == []
        return seen


# --- files -----------------------------------------------------------------------------------------------------------


def test_no_file_of_the_host_can_be_opened(look: Look) -> None:
    """Nothing of the host's can be opened from inside the jail: no system file, home, /proc, /sys, record or cache."""
    tried = look.of("read")
    assert {finding.arg for finding in tried} == set(look.paths)
    # Where the host's files are not there, or may not be opened.
    refused = {errno.ENOENT} if look.account.namespaces else {errno.ENOENT, errno.EACCES}
    assert [finding for finding in tried if finding.err not in refused] == []


def test_the_jail_holds_only_what_the_vmm_needs(look: Look) -> None:
    """The jail holds the VMM, its libraries, the image's files and /dev/urandom; without a root nothing is listed."""
    assert [finding for finding in look.of("own") if finding.err] == []
    if not look.account.namespaces:
        assert [(finding.arg, finding.err) for finding in look.of("list")] == [("/", errno.EACCES)]
        return
    files = look.own | {OVERCOMMIT}  # a copy of ours, no file of the host's /proc
    if look.account.form == "root":
        files |= {str(Path(path)) for path in needed_files(SETPRIV)}
    assert {finding.arg for finding in look.of("file")} == files
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"/"}
    assert {finding.arg for finding in look.of("folder")} == folders


def test_nothing_can_be_written_or_made(look: Look) -> None:
    """No file in the jail can be written, removed or given other rights, and none can be made anywhere in it."""
    probes = ("write-file", "chmod-path", "unlink", "chmod-fd", "times-fd", "create", "make-folder", "make-device")
    assert look.worked(*probes, "make-fifo", "make-link", "temporary", "chmod-folder") == []
    assert look.touched == []


def test_the_image_stays_as_it_is(look: Look) -> None:
    """The VMM can change the image's bytes, mode and times by no means, and has no descriptor of it, or one to read."""
    inode = look.started["root_inode"]
    held = [finding.arg.split()[1:] for finding in look.of("descriptor") if finding.value == inode]
    assert held == ([] if look.account.namespaces else [["regular", "read"]])
    if held:
        assert look.worked("chmod-given", "times-given", "write-given", "cut-given") == []
    before, after = look.image
    assert before.st_ino == inode
    assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_ctime_ns,
        before.st_size,
    )


def test_exactly_the_given_descriptors_are_open(look: Look) -> None:
    """The VMM has two null streams, its errors, channel, network port, QMP, console, disk; without a root its files."""
    kinds = sorted(finding.arg.split(maxsplit=1)[1] for finding in look.of("descriptor"))
    files = [] if look.account.namespaces else ["regular read"] * 3
    assert kinds == ["device write"] * 2 + files + ["regular write"] + ["socket write"] * 5


def test_the_scratch_disk_has_its_size(look: Look) -> None:
    """The scratch disk takes 8 GiB and not a byte more, and cannot be given a name."""
    results = {finding.arg: finding for finding in look.of("scratch")}
    assert results["last byte"].err == 0
    assert results["size"].value == settings.SCRATCH_BYTES
    for refused in ("past the end", "longer", "allocate"):
        assert results[refused].err == errno.EFBIG
    assert results["give it a name"].err != 0


# --- processes -------------------------------------------------------------------------------------------------------


def test_no_other_process_is_seen_or_signalled(look: Look) -> None:
    """The VMM sees no process but the jail's own first one, and signals none of the host's or of another job's."""
    assert [finding.value for finding in look.findings if finding.probe == "sees-process"] == []
    assert [finding.err for finding in look.of("kill-all")] == [errno.ESRCH]
    assert look.worked("signal", "ptrace", "pidfd", "reach-process") == []
    assert "the process was ended" not in look.reached
    assert "the other job's runner" not in look.reached
    assert all(name in jail for jail in look.statuses for name in (*look.account.outer, "vmm"))


def test_the_first_process_of_the_jail_cannot_be_taken_over(look: Look) -> None:
    """The VMM cannot trace, read or take descriptors from the first process that it sees, which no filter holds."""
    assert look.worked("ptrace-init", "ptrace-me", "read-init", "descriptor-of-init") == []


def test_no_process_can_be_started(look: Look) -> None:
    """The VMM can start threads only, so no child can outlive it or have its bounds a second time."""
    assert len(look.of("fork")) >= 4
    assert look.worked("fork", "execute") == []


def test_the_vmm_cannot_outlive_its_supervisor(look: Look) -> None:
    """Without a pid namespace the VMM cannot give up the signal that ends it with its supervisor."""
    kept = look.worked("outlive") == []
    assert kept or look.account.namespaces  # there the namespace ends it


# --- sockets and IPC -------------------------------------------------------------------------------------------------


def test_no_socket_of_the_host_is_reached(look: Look) -> None:
    """TCP, UDP, abstract and named sockets of the host cannot be reached, and nothing arrives at them."""
    assert look.worked("tcp", "udp", "abstract", "unix") == []
    assert look.reached == []


def test_no_family_of_sockets_but_unix(look: Look) -> None:
    """No socket can be made but a Unix one: also none of the families that namespaces do not part, such as vsock."""
    assert {finding.err for finding in look.of("family")} == {errno.EAFNOSUPPORT}


def test_no_ipc_of_the_host_is_reached(look: Look) -> None:
    """System V objects and message queues of the host, open to all there, cannot be found from inside."""
    assert look.worked("host-shm", "host-mq") == []


def test_no_keyring_is_reached(look: Look) -> None:
    """The session keyring, which a child inherits from the user's login, can be neither read nor written."""
    assert {finding.err for finding in look.of("keyring")} == {errno.EPERM}


# --- rights ----------------------------------------------------------------------------------------------------------


def test_no_capability_from_inside(look: Look) -> None:
    """The VMM finds no capability in any of its five sets, before and after it has tried to get some."""
    found = look.of("caps")
    assert len(found) == 10
    assert {finding.value for finding in found} == {0}
    assert [finding.value for finding in look.of("no-new-privs")] == [1]


def test_no_namespace_can_be_made(look: Look) -> None:
    """No namespace can be made by clone, clone3 or unshare, so no user namespace gives capabilities anew."""
    assert look.worked("clone", "unshare") == []
    assert {finding.arg for finding in look.of("unshare")} >= {"user", "mount", "net", "user and mount"}


def test_no_root_no_mount_no_device(look: Look) -> None:
    """The VMM cannot become root, change group or name, mount, or make a device node."""
    assert look.worked("become-root", "mount", "hostname", "make-device") == []
    assert 0 not in {finding.value for finding in look.of("uid", "gid")}
    # The kernel lets nobody but root leave a group: an ordinary user's VMM keeps the user's own.
    kept = len(os.getgroups()) if os.geteuid() else 0
    assert [finding.value for finding in look.of("groups")] == [kept]


def test_large_parts_of_the_kernel_are_closed(look: Look) -> None:
    """Calls that a VMM does without (bpf, perf, userfaultfd, io_uring, x86's second numbering) are refused."""
    assert look.worked("kernel") == []


def test_the_host_s_pool_of_asynchronous_io_cannot_be_used_up(look: Look) -> None:
    """No context for asynchronous I/O can be made: all users of a host, root included, share one number of events."""
    assert {finding.err for finding in look.of("aio")} == {errno.EPERM}


def test_the_shared_image_file_carries_no_words_between_jobs(look: Look) -> None:
    """On the image's files, which jobs share, no lock, lease, hint or notice can be set: no job signals another so."""
    (opened,) = look.of("shared")
    assert opened.err == 0
    tried = look.of("lock", "notice")
    assert len(tried) >= 12
    assert [finding for finding in tried if finding.err != errno.EPERM] == []


def test_capabilities_and_uids_from_outside(look: Look) -> None:
    """Seen from the host the VMM has no capability in any set, no-new-privileges, and a uid of its own, never 0."""
    vmms = [jail["vmm"] for jail in look.statuses]
    # An ordinary user may not empty the bounding set; without new privileges nothing comes of what is in it.
    sets = CAP_SETS if look.account.namespaces or look.account.form == "root" else CAP_SETS[:3]
    for vmm in vmms:
        assert {vmm[name] for name in sets} == {"0" * 16}
        assert vmm["NoNewPrivs"] == "1"
        assert vmm["Seccomp"] == "2"
        assert len(set(vmm["Uid"].split())) == 1
        assert "0" not in vmm["Uid"].split() + vmm["Gid"].split()
    uids = [int(vmm["Uid"].split()[0]) for vmm in vmms]
    if look.account.form == "user":
        assert set(uids) == {look.account.uid}  # a user has no other; what parts two jobs is the namespaces
        assert {finding.value for finding in look.of("uid")} == {64000 if look.account.namespaces else look.account.uid}
        return
    first = free_range()
    assert all(first <= uid < first + COUNT for uid in uids)
    assert uids[0] != uids[1]
    assert not [pid for pid in all_pids() if _uid(pid) in uids]  # the jobs have ended


def _uid(pid: int) -> int | None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(status(pid)["Uid"].split()[0])
    return None


def test_the_outer_processes_hold_nothing(look: Look) -> None:
    """Supervisor and bubblewrap hold no effective or permitted capability, no descriptor of channel, QMP or disk."""
    given = {finding.arg.split()[0]: finding.value for finding in look.of("descriptor") if "socket" in finding.arg}
    errors = f"socket:[{given['2']}]"
    for jail, links in zip(look.statuses, look.links, strict=True):
        for name in look.account.outer:
            assert {jail[name]["CapEff"], jail[name]["CapPrm"]} == {"0" * 16}
            assert jail[name]["NoNewPrivs"] == "1"
            held = {what for fd, what in links[name].items() if fd > 2}
            assert not [what for what in held if what.startswith("socket:") or "/dev/kvm" in what], held
            files = {what for what in held if what.startswith("/")}
            assert {os.path.dirname(path) for path in files} <= {"/run/x07-sandbox/uids"}, held  # noqa: PTH120
    mine = look.links[0]
    assert [what for what in mine["vmm"].values() if what == errors] == [errors]
    assert {what for name in look.account.outer for what in mine[name].values() if what.startswith("socket:")} <= {
        errors
    }


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_name_of_the_host_is_not_known(look: Look) -> None:
    """The VMM sees a name that every jail has, or none, not the host's."""
    assert [finding.arg for finding in look.of("nodename")] == ["x07" if look.account.namespaces else ""]


def test_limits_hold_and_cannot_be_raised(look: Look) -> None:
    """File size, address space, descriptors, tasks and core files are limited, and no limit can be raised."""
    limits = {int(finding.arg): finding.value for finding in look.of("limit")}
    assert limits[1] == settings.SCRATCH_BYTES  # RLIMIT_FSIZE
    assert limits[2] == limits[9]  # RLIMIT_DATA
    assert limits[4] == 0  # RLIMIT_CORE
    if look.account.namespaces or look.account.form == "root":
        assert limits[6] == 96  # RLIMIT_NPROC
    else:
        assert limits[6] >= 96  # and what the user has besides, which is counted too
    assert limits[7] == 64  # RLIMIT_NOFILE
    assert limits[9] == (512 * settings.MIB) + 3 * settings.GIB  # RLIMIT_AS
    # What is counted for all of a user's processes together.
    assert limits[11] == 64  # RLIMIT_SIGPENDING
    assert limits[12] == 0  # RLIMIT_MSGQUEUE
    assert look.worked("raise-limit") == []


def test_threads_are_bounded(look: Look) -> None:
    """A bomb of threads ends at 96 tasks, with the host's control groups or, without any, by the jail's own limit."""
    (bomb,) = look.of("threads")
    assert bomb.err == errno.EAGAIN
    assert bomb.value < 96


def test_memory_is_bounded(look: Look) -> None:
    """The address space ends 3 GiB above the machine's RAM, and memory outside of it cannot be had."""
    results = {finding.arg: finding for finding in look.of("memory")}
    assert results.pop("mapped").value <= 512 * settings.MIB + 3 * settings.GIB
    assert {finding.err for finding in results.values()} == {errno.EPERM}


def test_the_result_tells_which_groups_hold(look: Look) -> None:
    """The result's word on the jail names the form, and says truthfully whether control groups of the host hold it."""
    jail, holds = look.started["jail"], look.started["holds"]
    assert jail.startswith(look.account.jail)
    assert jail.endswith(f"hold {' and '.join(holds)}" if holds else "no host control groups")
