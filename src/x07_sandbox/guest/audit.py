"""Denied system calls of the program, from the kernel's audit subsystem (netlink, without auditd).

For each errno, an audit rule records the listed calls of the program's user that fail with that errno. The kernel
records seccomp refusals without a rule. Auditing must start before the program's first process, since tasks get their
audit context when they are created. The kernel's rate limit bounds a flood, and lost records are counted. The records
are used for the report only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.channel.messages import CWD, DENIED_MAX, OUT
from x07_sandbox.guest import confine
from x07_sandbox.guest.confine import UID

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Mount
    from x07_sandbox.guest.trees import Tree

_RATE: Final = 1200  # records per second; a denied call makes three or four
_BACKLOG: Final = 1024
_READS: Final = 64  # records read in one turn of the agent
_LAST_S: Final = 0.2  # timeout for the last records
_PATH_MAX: Final = 1024
_PENDING_MAX: Final = 16  # calls with incomplete records
_STEPS_MAX: Final = 256  # folders and links on the way to one file

_NETLINK_AUDIT: Final = 9  # linux/audit.h, from here on
_GET, _SET, _ADD_RULE = 1000, 1001, 1011
_SYSCALL, _PATH, _SOCKADDR, _CWD, _SECCOMP, _PROCTITLE, _EOE = 1300, 1302, 1306, 1307, 1326, 1327, 1320
_STATUS: Final = struct.Struct("=11I")  # mask, enabled, failure, pid, rate, backlog's limit, lost, backlog, ...
_LOST, _QUEUED = 6, 7
_ENABLED, _FAILURE, _PID, _RATE_LIMIT, _BACKLOG_LIMIT, _BACKLOG_WAIT = 1, 2, 4, 8, 16, 32
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST, _ACK, _ERROR = 1, 4, 2
_EXIT_LIST, _EXCLUDE_LIST, _ALWAYS = 4, 5, 2
_FIELD_UID, _FIELD_TYPE, _FIELD_EXIT = 1, 12, 103
_EQUAL: Final = 0x40000000
_FIELDS: Final = 64
_AT_FDCWD: Final = 0xFFFFFF9C
_EXECUTES: Final = frozenset({"execve", "execveat"})
# Calls with a path that is not written to: the target of a symlink, the source of a hard link.
_TARGETS: Final = frozenset({"symlink", "symlinkat"})
_SOURCES: Final = frozenset({"link", "linkat"})
# The arguments that hold the folder descriptor of a relative path.
_FOLDERS: Final[dict[str, tuple[bytes, ...]]] = {
    **dict.fromkeys(("openat", "openat2", "mkdirat", "unlinkat", "mknodat", "fchmodat", "fchmodat2"), (b"a0",)),
    **dict.fromkeys(("fchownat", "utimensat", "execveat", "newfstatat", "statx", "readlinkat"), (b"a0",)),
    **dict.fromkeys(("renameat", "renameat2", "linkat"), (b"a0", b"a2")),
    "symlinkat": (b"a1",),
}
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

ERRNOS: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.EBUSY, errno.ENETUNREACH)
# Calls that fail with ENETUNREACH where there is no network; only for them that errno is recorded, and no other.
CONNECTS: Final = frozenset({"connect", "sendto", "sendmsg", "sendmmsg"})
# A struct sockaddr_in or sockaddr_in6 (ip(7), ipv6(7)): the family in the host's byte order, the port, the address.
_ADDRESSES: Final = {
    socket.AF_INET: (struct.Struct("!2xH4s"), "{}:{}"),
    socket.AF_INET6: (struct.Struct("!2xH4x16s"), "[{}]:{}"),
}
# Calls that fail with EBUSY on a mount point, such as a root; the only ones for which that errno is recorded.
_REPLACES: Final = frozenset({"rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"})
# The argument that holds the open flags. Calls that are neither here nor in _READS_ONLY count as writes.
_FLAGS: Final = {"open": b"a1", "openat": b"a2"}
# The argument that names the resource, and the resources that a policy limits (getrlimit(2)).
_RAISES: Final = {"setrlimit": b"a0", "prlimit64": b"a1"}
_RESOURCES: Final = {0: "cpu", 4: "core", 7: "nofile"}
_READS_ONLY: Final = frozenset(
    {"openat2", "execve", "execveat", "chdir", "stat", "lstat", "newfstatat", "statx", "readlink", "readlinkat"}
)

Find = Callable[[str, int, str], str]
Resolve = Callable[[str], str]
Services = Callable[[], Collection[int]]


class Refusal(NamedTuple):
    """One kind of denied call.

    by: `kernel`, `seccomp`, or `network` for a connection where there is no network. path: the path in the call; "" if
    the call has none. If the call creates a file or folder: the parent folder with a trailing slash. If the call raises
    a limit: `core`, `cpu` or `nofile`. By `network`: ADDRESS:PORT, or the name that was looked up.
    """

    by: str
    call: str
    errno: int
    path: str
    write: bool


class View(NamedTuple):
    """The functions that complete the paths of denials.

    find(device, inode, name): returns the path of an inode, or "" if that is unknown or no better than *name*.
    name: the path in the call, possibly of a link; "" if the path in the call was relative to a descriptor.
    roots: mount points of host folders.
    resolve(path): returns the path with its links resolved if the program may have made them, else "".
    services(): returns the pids of the agent's services, which answer for their own denials.
    """

    find: Find | None = None
    roots: Sequence[str] = ()
    resolve: Resolve | None = None
    services: Services = frozenset


class Audit:
    """The kernel's audit records of this machine. The descriptor *fd* is readable when `take` has records to read."""

    def __init__(self, audited: dict[str, int], refused: dict[str, int]) -> None:
        """Set up auditing. audited: calls to record. refused: calls that filters refuse. Both give numbers by name."""
        self._refusals = Refusals(refused | audited)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_AUDIT)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 1, 0))
        self._socket.bind((0, 0))
        self.fd = self._socket.fileno()
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)
        self._sequence = 0
        only = {errno.EBUSY: _REPLACES, errno.ENETUNREACH: CONNECTS}
        for number in ERRNOS:
            names = only.get(number, audited.keys() - CONNECTS)
            calls = [audited[name] for name in names if name in audited]
            self._ask(_ADD_RULE, _rule(_EXIT_LIST, ((_FIELD_UID, UID), (_FIELD_EXIT, -number)), calls))
        for kind in (_PROCTITLE, _EOE):
            self._ask(_ADD_RULE, _rule(_EXCLUDE_LIST, ((_FIELD_TYPE, kind),), ()))
        mask = _ENABLED | _FAILURE | _PID | _RATE_LIMIT | _BACKLOG_LIMIT | _BACKLOG_WAIT
        # A full backlog must drop records, not block the program.
        self._ask(_SET, _STATUS.pack(mask, 1, 0, os.getpid(), _RATE, _BACKLOG, 0, 0, 0, 0, 0))
        self._lost_before = 0

    def settle(self) -> None:
        """Discard all records and the count of lost records. Called before the VM is saved."""
        self.begin()
        self._lost_before = self._status()[_LOST]

    def begin(self, view: View = View()) -> None:  # noqa: B008 - it cannot be changed
        """Discard all records. Later records are the program's."""
        while self._next() is not None:
            pass
        self._refusals.reset(view)

    def take(self) -> None:
        """Read and process at most _READS records."""
        for _ in range(_READS):
            if (record := self._next()) is None:
                return
            self._refusals.note(*record)

    def end(self) -> tuple[dict[Refusal, int], int]:
        """Return how often each call was denied since `begin`, and how many denials that does not include."""
        deadline = time.monotonic() + _LAST_S
        # Give the kernel's audit thread a chance to run. Without any record none was lost either, and asking the kernel
        # would cost most programs milliseconds.
        self.take()
        if not self._refusals.any_record:
            os.sched_yield()
            self.take()
            if not self._refusals.any_record:
                return {}, 0
        while True:
            late = time.monotonic() > deadline
            status = self._status()  # before the records that it counts as queued are read
            # Read all of them, even past the deadline: no process is left to make more.
            while (record := self._next()) is not None:
                self._refusals.note(*record)
            if late or not status[_QUEUED]:
                break
        self._refusals.finish()
        return self._refusals.found, max(0, status[_LOST] - self._lost_before) + self._refusals.uncounted

    # netlink

    def _next(self) -> tuple[int, bytes] | None:
        """Return type and text of the next record, or None if there is no record."""
        # Poll first: the error path would run for the first time in a fresh clone, which is slow.
        if not self._poll.poll(0):
            return None
        try:
            data = self._socket.recv(16384)
        except OSError:  # ENOBUFS: the kernel dropped records, and counts them
            return 0, b""
        if len(data) < _HEADER.size:
            return 0, b""
        return _HEADER.unpack_from(data)[1], data[_HEADER.size :].rstrip(b"\0")

    def _status(self) -> tuple[int, ...]:
        """Return the kernel's audit counters; zeros if the kernel does not answer."""
        answer = b""
        with contextlib.suppress(OSError):
            answer = self._ask(_GET, b"")
        return _STATUS.unpack_from(answer.ljust(_STATUS.size, b"\0"))

    def _ask(self, kind: int, body: bytes) -> bytes:
        """Send a request to the kernel. Return the answer, which is empty except for queries. Raises OSError."""
        self._sequence += 1
        # Request no acknowledgement for a query: it may come before the answer, which another kernel thread sends.
        flags = _REQUEST if kind == _GET else _REQUEST | _ACK
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))
        while True:
            data = self._socket.recv(16384)
            _, got, _, sequence, _ = _HEADER.unpack_from(data)
            body = data[_HEADER.size :]
            if got == _ERROR and sequence == self._sequence:
                number = struct.unpack_from("=i", body)[0]
                if number:
                    raise OSError(-number, os.strerror(-number), f"audit request {kind}")
                return b""
            if got == kind:
                return body
            self._refusals.note(got, body.rstrip(b"\0"))


class NoAudit:
    """A stand-in for `Audit` on a shared kernel, whose audit records belong to the host. *fd* is never readable."""

    def __init__(self) -> None:
        self.fd, self._other_end = os.pipe2(os.O_CLOEXEC)

    def settle(self, *_names: object) -> None:
        """Do nothing, since there are no records."""

    begin = take = settle

    def end(self) -> tuple[dict[Refusal, int], int]:
        """Return that there were no denials."""
        return {}, 0


class Denials:
    """Denials, which are bounded. found: how often each occurred. uncounted: how many did not fit in *found*."""

    def __init__(self) -> None:
        self.found: dict[Refusal, int] = {}
        self.uncounted = 0

    def count(self, refusal: Refusal) -> None:
        """Count a denial."""
        if refusal in self.found or len(self.found) < DENIED_MAX:
            self.found[refusal] = self.found.get(refusal, 0) + 1
        else:
            self.uncounted += 1


class Refusals(Denials):
    """Denials from audit records."""

    def __init__(self, calls: dict[str, int]) -> None:
        super().__init__()
        self._names = {number: name for name, number in calls.items()}
        self._pending: dict[bytes, _Call] = {}
        self.reset(View())

    def reset(self, view: View) -> None:
        """Discard everything recorded, and complete further paths by *view*."""
        self._view = view
        self._pending.clear()
        self.found.clear()
        self.uncounted = 0
        self.any_record = False

    def finish(self) -> None:
        """Count the denied calls for which some records have not arrived."""
        for call in self._pending.values():
            self._count(call)
        self._pending.clear()

    def note(self, kind: int, text: bytes) -> None:
        """Process a record, given its type and the part of its text that begins with "audit("."""
        self.any_record = True
        serial, _, rest = text.partition(b": ")
        if kind == _SECCOMP:
            values = _values(rest)
            self._count(_Call("seccomp", self._name(values.get(b"syscall", b"")), errno.EPERM))
        elif kind == _SYSCALL:
            self._note_call(serial, _values(rest))
        elif serial in self._pending:
            call = self._pending[serial]
            if kind == _CWD:
                call.cwd = _text(rest, b"cwd=")
            elif kind == _SOCKADDR:
                call.items, call.path = 0, _address(rest)
                self._count_if_complete(serial, call)
            elif kind == _PATH:
                call.items -= 1
                self._note_path(call, rest)
                self._count_if_complete(serial, call)

    def _note_call(self, serial: bytes, values: dict[bytes, bytes]) -> None:
        name, error = self._name(values.get(b"syscall", b"")), -_number(values.get(b"exit", b""))
        # The kernel also records successful calls for reasons of its own, such as a new login uid.
        if error not in ERRNOS or _number(values.get(b"pid", b"")) in self._view.services():
            return
        # Ignore the limits of other processes (a0), and reads without a new limit (a2).
        if name == "prlimit64" and not (values.get(b"a0") == b"0" and values.get(b"a2") != b"0"):
            return
        if name in CONNECTS:
            self._pend(serial, _Call("network", "connect", error, items=1))  # its address follows
            return
        argument = _FLAGS.get(name)
        call = _Call("kernel", name, error, items=_number(values.get(b"items", b"")))
        call.write = bool(_number(values.get(argument, b""), 16) & _WRITES) if argument else name not in _READS_ONLY
        call.write |= call.errno == errno.EROFS  # the flags of openat2 are in memory
        if name in _RAISES:
            call.path = _RESOURCES.get(_number(values.get(_RAISES[name], b""), 16) & 0xFFFFFFFF, "")
        folders = (_number(values.get(word, b""), 16) & 0xFFFFFFFF for word in _FOLDERS.get(name, ()))
        call.by_descriptor = any(folder != _AT_FDCWD for folder in folders)
        self._pend(serial, call)

    def _pend(self, serial: bytes, call: _Call) -> None:
        if len(self._pending) >= _PENDING_MAX:
            self._count(self._pending.pop(next(iter(self._pending))))
        self._pending[serial] = call
        self._count_if_complete(serial, call)

    def _note_path(self, call: _Call, record: bytes) -> None:
        values, name = _values(record), _text(record, b"name=")
        kind = values.get(b"nametype")
        unrelated = call.name in _TARGETS and kind != b"CREATE"
        unrelated |= call.name in _SOURCES and call.errno == errno.EROFS
        if kind == b"PARENT":
            # For a name without a slash the kernel records the working directory, even if a descriptor was given.
            name = "." if call.by_descriptor and name == call.cwd else name
            call.folders.append(self._path(call, name, values))
            call.folder = call.folder or call.folders[0]
        elif call.name in _EXECUTES:
            # A script, then its interpreter: the last one was denied.
            call.path = self._executed(call, name) or call.path
        elif call.name in _REPLACES:
            self._note_replaced(call, name, values)
        elif not unrelated:
            call.path = call.path or self._path(call, name, values)

    def _note_replaced(self, call: _Call, name: str, values: dict[bytes, bytes]) -> None:
        if call.by_descriptor and not name.startswith("/"):
            # One folder record per name precedes, in the same order.
            folder = call.folders[min(call.names, len(call.folders) - 1)] if call.folders else ""
            name = posixpath.join(folder, posixpath.basename(name)) if folder.startswith("/") else name
        call.names += 1
        if call.errno == errno.EBUSY:
            # Either of two names may be the mount point. The inode in the record is the one below the mount.
            call.path = self._root(call, name) or call.path or name
        else:
            call.path = call.path or self._path(call, name, values)

    def _path(self, call: _Call, name: str, values: dict[bytes, bytes]) -> str:
        """Return the path of the record's inode if it is known and more exact than the record's *name*, else *name*."""
        if self._view.find is None:
            return name
        vague = not name or (call.by_descriptor and not name.startswith("/"))
        if not vague and call.errno != errno.EROFS:
            return name
        known_name = "" if vague else posixpath.normpath(posixpath.join(call.cwd, name))
        device = values.get(b"dev", b"").decode("ascii", "replace")
        return self._view.find(device, _number(values.get(b"inode", b"")), known_name) or name

    def _executed(self, call: _Call, name: str) -> str:
        """Return *name*. If it is a link that the program made, return the link's target, which a policy can list."""
        if not name or self._view.resolve is None or (call.by_descriptor and not name.startswith("/")):
            return name
        return self._view.resolve(posixpath.join(call.cwd, name)) or name

    def _root(self, call: _Call, name: str) -> str:
        """Return the mount point *name*, else the only mount point with the same base name, else ""."""
        path = posixpath.normpath(posixpath.join(call.cwd, name))
        if path in self._view.roots:
            return path
        found = [root for root in self._view.roots if posixpath.basename(root) == posixpath.basename(path)]
        return found[0] if len(found) == 1 else ""

    def _count_if_complete(self, serial: bytes, call: _Call) -> None:
        if call.items <= 0:
            self._count(self._pending.pop(serial))

    def _count(self, call: _Call) -> None:
        if call.by == "network" and not call.path:  # no address of the internet
            return
        self.count(call.refusal())

    def _name(self, number: bytes) -> str:
        return self._names.get(_number(number), f"system call {_number(number)}")


class ProgramPaths:
    """Paths as the program sees them, for reports of denials. The tables are built on first use, which is rare."""

    def __init__(self, trees: Mapping[int, Tree], mounts: Sequence[Mount], view: str) -> None:
        """Store the trees by number, the mounts of the session, and the program's root folder as the agent sees it."""
        self._trees = trees
        self._mounts = mounts
        self._view = view
        self._parents: dict[tuple[str, int], str] | None = None
        self._paths: dict[tuple[str, int], str] | None = None
        self._targets: dict[str, str] = {}

    def roots(self) -> list[str]:
        """Return the mount points."""
        return [_shown(mount.at) for mount in self._mounts]

    def path(self, device: str, inode: int, name: str = "") -> str:
        """Return the path of an inode. Return "" if the path is unknown, or if *name* already is in a read-only mount.

        device: "major:minor" in hexadecimal, as in audit records. name: a known path of the inode, or of a link to it.
        """
        if self._parents is None:
            self._parents = dict(self._parent_folders())
        if not name and (folder := self._parents.get((device, inode))):
            return folder
        in_tree = any(device == _device(tree.folder) for tree in self._trees.values())
        if not in_tree or (name and self._in_read_only_root(name)):
            return ""
        if self._paths is None:
            self._paths = dict(self._read_only_paths())
        return self._paths.get((device, inode), "")

    def link_target(self, path: str) -> str:
        """Return *path* with its links resolved if the program may have made them, else "". For reports only."""
        if path not in self._targets:
            if len(self._targets) >= DENIED_MAX:
                return ""
            self._targets[path] = self._resolve(path)
        return self._targets[path]

    def _resolve(self, path: str) -> str:
        writable = [*confine.IN_MEMORY, CWD, OUT]
        writable += [_shown(mount.at) for mount in self._mounts if mount.write]
        if all(_below(path.strip("/"), folder.strip("/")) is None for folder in writable):
            return ""
        at, is_link, names = "", False, path.split("/")[::-1]
        for _ in range(_STEPS_MAX):
            if not names:
                return _shown(at) if is_link else ""
            if len(names) > _STEPS_MAX:
                return ""
            name = names.pop()
            if name == "..":
                at = at.rpartition("/")[0]
            elif name not in {"", "."}:
                try:
                    target = os.readlink(f"{self._view}{at}/{name}")
                except OSError:  # not a link, or removed
                    at = f"{at}/{name}"
                    continue
                is_link = True
                names += target.split("/")[::-1]
                at = "" if target.startswith("/") else at
        return ""

    def _parent_folders(self) -> Iterator[tuple[tuple[str, int], str]]:
        for mount in self._mounts:
            folder = os.path.dirname(mount.at)
            with contextlib.suppress(OSError):  # it was moved
                yield (_device(self._view + folder), os.stat(self._view + folder).st_ino), _shown(folder)

    def _in_read_only_root(self, path: str) -> bool:
        path = path.strip("/")
        around = (mount for mount in self._mounts if _below(path, _shown(mount.at).strip("/")) is not None)
        inner = max(around, key=lambda mount: len(mount.at), default=None)
        return inner is not None and not inner.write

    def _read_only_paths(self) -> Iterator[tuple[tuple[str, int], str]]:
        for number, tree in self._trees.items():
            device = _device(tree.folder)
            mounts = [mount for mount in self._mounts if mount.tree == number]
            if all(mount.write for mount in mounts):
                continue
            mounts.sort(key=lambda mount: -len(mount.sub))
            for inode, name in tree.inodes():
                # The innermost mount decides: in a writable one, another file may have this inode by now.
                for mount in mounts:
                    if (rest := _below(name, mount.sub)) is not None:
                        if not mount.write:
                            yield (device, inode), _shown(posixpath.join(mount.at, rest).rstrip("/"))
                        break


class _Call:
    """A denied call whose records are being collected."""

    def __init__(self, by: str, name: str, number: int, *, items: int = 0) -> None:
        self.by = by
        self.name = name
        self.errno = number
        self.items = items
        self.write = False
        self.by_descriptor = False  # relative paths start at a descriptor, not at the working directory
        self.cwd = ""
        self.folders: list[str] = []
        self.names = 0  # entries in these folders
        self.folder = ""  # of a new entry, whose name the kernel does not record if it was denied
        self.path = ""

    def refusal(self) -> Refusal:
        """Return the denial. If the call creates a file or folder, the path is the parent folder and a slash."""
        if self.by == "network":
            return Refusal(self.by, self.name, self.errno, self.path, write=False)
        path = self.path or self.folder
        if path and not path.startswith("/"):
            path = posixpath.join("..." if self.by_descriptor else self.cwd, path)
        if path:
            # normpath keeps two leading slashes.
            path = ("/" * path.startswith("/") + posixpath.normpath(path).lstrip("/"))[:_PATH_MAX]
            if not self.path and path != "/":
                path += "/"
        return Refusal(self.by, self.name, self.errno, path, self.write)


def _device(path: str | bytes) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def _shown(path: str) -> str:
    """Decode a path in the same way as paths in audit records."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _below(name: str, sub: str) -> str | None:
    """Return *name* relative to the folder *sub*, or None if *name* is not below it."""
    if not sub or name == sub:
        return "" if name == sub else name
    return name[len(sub) + 1 :] if name.startswith(f"{sub}/") else None


def _rule(which: int, fields: tuple[tuple[int, int], ...], calls: Iterable[int]) -> bytes:
    """Return a struct audit_rule_data: record *calls* if all *fields*, pairs of field and value, match."""
    mask = [0] * 64
    for number in calls:
        mask[number // 32] |= 1 << number % 32
    padding = (0,) * (_FIELDS - len(fields))
    words = (which, _ALWAYS, len(fields), *mask, *(kind for kind, _ in fields), *padding)
    values = (*(value & 0xFFFFFFFF for _, value in fields), *padding)
    operators = (*(_EQUAL for _ in fields), *padding)
    return struct.pack(f"={len(words) + 2 * _FIELDS + 1}I", *words, *values, *operators, 0)


def _values(text: bytes) -> dict[bytes, bytes]:
    """Parse `name=value` words; a quoted value ends at its first space."""
    return dict(word.partition(b"=")[::2] for word in text.split(b" "))


def _address(record: bytes) -> str:
    """Return the address and port in a SOCKADDR record, or "" for another family."""
    try:
        data = bytes.fromhex(_values(record)[b"saddr"].decode("ascii"))
        family = int.from_bytes(data[:2], sys.byteorder)
        layout, text = _ADDRESSES[socket.AddressFamily(family)]
        port, address = layout.unpack_from(data)
    except (KeyError, ValueError, struct.error):
        return ""
    return text.format(socket.inet_ntop(family, address), port)


def _number(text: bytes, base: int = 10) -> int:
    try:
        return int(text, base)
    except ValueError:
        return 0


def _text(record: bytes, key: bytes) -> str:
    """Decode a string field, which is quoted, or in hexadecimal if it has special characters."""
    _, _, rest = record.partition(key)
    if rest.startswith(b'"'):
        return rest[1:].partition(b'"')[0].decode("utf-8", "backslashreplace")
    try:
        return bytes.fromhex(rest.partition(b" ")[0].decode("ascii")).decode("utf-8", "backslashreplace")
    except ValueError:
        return ""  # (null)
