"""What a compromised VMM can reach: a hostile program in QEMU's place, started by the same launcher."""

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
    any_form_fixture,  # noqa: F401 - pytest finds it here
    descriptors,
    parse,
    status,
)
from x07_sandbox.backends.qemu.machine import OVERCOMMIT
from x07_sandbox.host import settings
from x07_sandbox.images.store import find_image
from x07_sandbox.jail.bwrap import INNER_UID, SETPRIV
from x07_sandbox.jail.forms import needed_files
from x07_sandbox.jail.resources import COUNT, free_range

pytestmark = pytest.mark.vm

IPC_CREAT = 0o1000
IPC_RMID = 0
URANDOM = "/dev/urandom"  # everybody may write to it
CAP_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


class HostTargets:
    """Targets that the test puts on the host for the program to find: sockets, queues, a process, a secret file."""

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

    def probe_script(self, account: Account, other: Runner, mine: Runner) -> tuple[str, list[str]]:
        """Return the probes for the program to try, one a line, and the paths among them."""
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
        # The program's own user may change these: file permissions do not protect them.
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

    def modified(self) -> list[str]:
        """Return the names in the target folder that were added or modified."""
        found = [name for name in os.listdir(self.folder) if name not in {"secret", "socket"}]  # noqa: PTH208 - names
        info = self.secret.stat()
        whole = self.secret.read_text(encoding="ascii") == "secret" and info.st_mode & 0o777 == self.mode
        return found + ([] if whole and info.st_mtime > 1 else ["secret"])

    def reached(self) -> list[str]:
        """Return the targets that were reached."""
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
    """Return the files that the jail holds for the program."""
    return {str(account.hostile("look")), *mine.image_files(), URANDOM}


@pytest.fixture(scope="session")
def look(any_form: Account) -> Look:
    """The findings of one hostile program that ran beside another job; both jobs have ended."""
    account = any_form
    with contextlib.ExitStack() as stack:
        host = HostTargets(stack)
        image = find_image(None) if not account.command else None
        folder = image.folder if image else next(account.cache.glob("images/[0-9a-f]*"))
        before = (folder / "root.erofs").stat()
        other = stack.enter_context(Runner(account, mode="mute", do="hold"))
        other.say("release")
        other.vmm()
        mine = stack.enter_context(Runner(account, mode="look", do="talk"))
        probe_script, paths = host.probe_script(account, other, mine)
        mine.say(json.dumps(f"{probe_script}go\n"))
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
            touched=host.modified(),
            reached=host.reached() + ([] if other.process.poll() is None else ["the other job's runner"]),
        )
        for runner in (mine, other):
            runner.say("stop")
            assert runner.hear("gone")["done"]
            assert runner.left() == []
        return seen


# --- files -----------------------------------------------------------------------------------------------------------


def test_no_file_of_the_host_can_be_opened(look: Look) -> None:
    """The jail can open none of the host's system files, homes, /proc, /sys, job records or caches."""
    tried = look.of("read")
    assert {finding.arg for finding in tried} == set(look.paths)
    # Without namespaces the host's files exist, but may not be opened.
    refused = {errno.ENOENT} if look.account.namespaces else {errno.ENOENT, errno.EACCES}
    assert [finding for finding in tried if finding.err not in refused] == []


def test_the_jail_holds_only_what_the_vmm_needs(look: Look) -> None:
    """The jail holds the VMM, its libraries, image files and /dev/urandom; without a private root it lists nothing."""
    assert [finding for finding in look.of("own") if finding.err] == []
    if not look.account.namespaces:
        assert [(finding.arg, finding.err) for finding in look.of("list")] == [("/", errno.EACCES)]
        return
    if look.account.hot:  # its filter refuses to list a folder; test_hot.py looks from outside
        assert {finding.probe for finding in look.findings} & {"file", "folder"} == set()
        return
    files = look.own | {OVERCOMMIT}  # our own copy, not a file of the host's /proc
    if look.account.form == "root":
        files |= {str(Path(path)) for path in needed_files(SETPRIV)}
    assert {finding.arg for finding in look.of("file")} == files
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"/"}
    assert {finding.arg for finding in look.of("folder")} == folders


def test_no_file_can_be_modified_or_created(look: Look) -> None:
    """The VMM can modify, remove or chmod no file in the jail, and create none."""
    probes = ("write-file", "chmod-path", "unlink", "chmod-fd", "times-fd", "create", "make-folder", "make-device")
    assert look.worked(*probes, "make-fifo", "make-link", "temporary", "chmod-folder") == []
    assert look.touched == []


def test_the_image_cannot_be_changed(look: Look) -> None:
    """The VMM cannot change the image's content, mode or times, and holds at most a read-only descriptor of it."""
    inode = look.started["root_inode"]
    held = [finding.arg.split()[1:] for finding in look.of("descriptor") if finding.value == inode]
    assert held == ([] if look.account.namespaces else [["regular", "read"]])
    if held:
        assert look.worked("chmod-given", "times-given", "write-given", "cut-given") == []
    before, after = look.image
    assert before.st_ino == inode
    # Not st_ctime, which also changes when another test links the image.
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)


def test_exactly_the_given_descriptors_are_open(look: Look) -> None:
    """The VMM has exactly the descriptors it was given: two null streams, stderr, disk, sockets and its files."""
    kinds = sorted(finding.arg.split(maxsplit=1)[1] for finding in look.of("descriptor"))
    files = [] if look.account.namespaces else ["regular read"] * 3
    assert kinds == ["device write"] * 2 + files + ["regular write"] + ["socket write"] * 5


def test_the_scratch_disk_has_its_size(look: Look) -> None:
    """The scratch disk takes 8 GiB and not a byte more, and cannot be linked to a name."""
    results = {finding.arg: finding for finding in look.of("scratch")}
    assert results["last byte"].err == 0
    assert results["size"].value == settings.SCRATCH_BYTES
    for refused in ("past the end", "longer", "allocate"):
        assert results[refused].err == errno.EFBIG
    assert results["give it a name"].err != 0


# --- processes -------------------------------------------------------------------------------------------------------


def test_no_other_process_is_seen_or_signalled(look: Look) -> None:
    """The VMM sees only the jail's init, and can signal no process of the host or of another job."""
    assert [finding.value for finding in look.findings if finding.probe == "sees-process"] == []
    assert [finding.err for finding in look.of("kill-all")] == [errno.ESRCH]
    assert look.worked("signal", "ptrace", "pidfd", "reach-process") == []
    assert "the process was ended" not in look.reached
    assert "the other job's runner" not in look.reached
    assert all(name in jail for jail in look.statuses for name in (*look.account.outer, "vmm"))


@pytest.mark.parametrize(
    "probes",
    [
        ("ptrace-init", "ptrace-me", "read-init", "descriptor-of-init"),
        ("fork", "execute"),
        ("tcp", "udp", "abstract", "unix"),
        ("host-shm", "host-mq"),
        ("clone", "unshare"),
        ("kernel",),
    ],
    ids=["the jail's init", "other processes", "sockets", "IPC", "namespaces", "system calls"],
)
def test_nothing_outside_the_vmm_is_reached(look: Look, probes: tuple[str, ...]) -> None:
    """The VMM cannot take over the jail's init, start processes, make namespaces, or reach sockets or IPC outside."""
    assert look.worked(*probes) == []


@pytest.mark.parametrize(
    ("probe", "error"), [("family", errno.EAFNOSUPPORT), ("keyring", errno.EPERM), ("aio", errno.EPERM)]
)
def test_what_no_namespace_separates_is_refused(look: Look, probe: str, error: int) -> None:
    """The VMM can use neither other socket families than Unix, nor the user's keyring, nor the host-wide AIO events."""
    assert {finding.err for finding in look.of(probe)} == {error}


def test_the_probes_try_all_they_are_meant_to(look: Look) -> None:
    """The hostile program tries several ways to fork and every kind of namespace, and no server was reached."""
    assert len(look.of("fork")) >= 4
    assert {finding.arg for finding in look.of("unshare")} >= {"user", "mount", "net", "user and mount"}
    assert look.reached == []


def test_the_vmm_cannot_outlive_its_supervisor(look: Look) -> None:
    """Without a pid namespace, the VMM cannot clear its parent-death signal."""
    kept = look.worked("outlive") == []
    assert kept or look.account.namespaces  # there the namespace ends it


# --- rights ----------------------------------------------------------------------------------------------------------


def test_the_vmm_cannot_gain_capabilities(look: Look) -> None:
    """The VMM has no capability in any of its five sets, before and after it tries to gain some."""
    found = look.of("caps")
    assert len(found) == 10
    assert {finding.value for finding in found} == {0}
    assert [finding.value for finding in look.of("no-new-privs")] == [1]


def test_the_vmm_cannot_become_root_mount_or_make_a_device(look: Look) -> None:
    """The VMM cannot become root, change its groups or host name, mount, or create a device node."""
    assert look.worked("become-root", "mount", "hostname", "make-device") == []
    # An ordinary user's restored VMM has uid 0 in its user namespace, without capabilities: criu needs that uid.
    assert 0 not in {finding.value for finding in look.of("uid", "gid")} or _inner_uid(look.account) == 0
    # Only root may leave a group: an ordinary user's VMM keeps the user's groups.
    kept = len(os.getgroups()) if os.geteuid() else 0
    assert [finding.value for finding in look.of("groups")] == [kept]


def test_jobs_cannot_signal_each_other_through_the_image(look: Look) -> None:
    """The VMM can set no lock, lease, write hint or notification on the image files that jobs share."""
    (opened,) = look.of("shared")
    assert opened.err == 0
    tried = look.of("lock", "notice")
    assert len(tried) >= 12
    assert [finding for finding in tried if finding.err != errno.EPERM] == []


def test_capabilities_and_uids_from_outside(look: Look) -> None:
    """The host sees the VMM with no capability in any set, with no-new-privileges, and with a uid that is never 0."""
    vmms = [jail["vmm"] for jail in look.statuses]
    # An ordinary user may not empty the bounding set; no-new-privileges makes it harmless.
    sets = CAP_SETS if look.account.namespaces or look.account.form == "root" else CAP_SETS[:3]
    for vmm in vmms:
        assert {vmm[name] for name in sets} == {"0" * 16}
        assert vmm["NoNewPrivs"] == "1"
        assert vmm["Seccomp"] == "2"
        assert len(set(vmm["Uid"].split())) == 1
        assert "0" not in vmm["Uid"].split() + vmm["Gid"].split()
    uids = [int(vmm["Uid"].split()[0]) for vmm in vmms]
    if look.account.form == "user":
        assert set(uids) == {look.account.uid}  # a user has only this uid; namespaces separate two jobs
        assert {finding.value for finding in look.of("uid")} == {_inner_uid(look.account)}
        return
    first = free_range()
    assert all(first <= uid < first + COUNT for uid in uids)
    assert uids[0] != uids[1]
    assert not [pid for pid in all_pids() if _uid(pid) in uids]  # the jobs have ended


def _inner_uid(account: Account) -> int:
    if not account.namespaces:
        return account.uid
    return 0 if account.hot and account.form == "user" else INNER_UID


def _uid(pid: int) -> int | None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(status(pid)["Uid"].split()[0])
    return None


def test_supervisor_and_bubblewrap_hold_no_resources(look: Look) -> None:
    """The supervisor and bubblewrap hold no capability and no descriptor of channel, QMP or disk."""
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


def test_the_host_name_is_hidden(look: Look) -> None:
    """The VMM does not see the host's name."""
    shown = look.account.namespaces and not look.account.hot  # else the filter refuses uname
    assert [finding.arg for finding in look.of("nodename")] == ["x07" if shown else ""]


def test_limits_hold_and_cannot_be_raised(look: Look) -> None:
    """File size, address space, descriptors, tasks and core files are limited, and the VMM can raise no limit."""
    limits = {int(finding.arg): finding.value for finding in look.of("limit")}
    assert limits[1] == settings.SCRATCH_BYTES  # RLIMIT_FSIZE
    assert limits[2] == limits[9]  # RLIMIT_DATA
    assert limits[4] == 0  # RLIMIT_CORE
    if look.account.namespaces or look.account.form == "root":
        assert limits[6] == 96  # RLIMIT_NPROC
    else:
        assert limits[6] >= 96  # plus the user's other processes, which count too
    assert limits[7] == 64  # RLIMIT_NOFILE
    assert limits[9] == (512 * settings.MIB) + 3 * settings.GIB  # RLIMIT_AS
    # These limits count all of a user's processes together.
    assert limits[11] == 64  # RLIMIT_SIGPENDING
    assert limits[12] == 0  # RLIMIT_MSGQUEUE
    assert look.worked("raise-limit") == []


def test_threads_are_bounded(look: Look) -> None:
    """A thread bomb stops at 96 tasks, with or without the host's control groups."""
    (bomb,) = look.of("threads")
    assert bomb.err == errno.EAGAIN
    assert bomb.value < 96


def test_memory_is_bounded(look: Look) -> None:
    """The VMM's address space is limited to its RAM plus 3 GiB, and no memory is available outside it."""
    results = {finding.arg: finding for finding in look.of("memory")}
    assert results.pop("mapped").value <= 512 * settings.MIB + 3 * settings.GIB
    assert {finding.err for finding in results.values()} == {errno.EPERM}


def test_the_result_names_the_jail_and_its_control_groups(look: Look) -> None:
    """The result names the jail's form and the host control groups that hold it, if any."""
    jail, holds = look.started["jail"], look.started["holds"]
    assert jail.startswith(look.account.jail)
    assert jail.endswith(f"hold {' and '.join(holds)}" if holds else "no host control groups")
