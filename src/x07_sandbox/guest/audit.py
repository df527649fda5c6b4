"""What the kernel refused the program, from the kernel's own audit (audit(8) by netlink, no daemon).

A rule for each errno records every listed system call of the program's user that ends with it; refusals of seccomp
filters are recorded anyway. It is set up before the program's first process: an older task has no room for it. The
kernel's rate limit bounds a flood; what it swallows is counted as lost. Records are reported, and decide nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from x07_sandbox.channel.frames import DENIED_MAX
from x07_sandbox.guest.confine import UID

_RATE: Final = 1200  # records a second; a refused call makes three or four
_BACKLOG: Final = 1024
_READS: Final = 64  # records that are taken in one turn of the agent
_LAST_S: Final = 0.2  # how long the last records may take to come
_PATH_MAX: Final = 1024
_OPEN: Final = 16  # calls whose records have begun and not ended

_NETLINK_AUDIT: Final = 9  # linux/audit.h, from here on
_GET, _SET, _ADD_RULE = 1000, 1001, 1011
_SYSCALL, _PATH, _CWD, _SECCOMP, _PROCTITLE, _EOE = 1300, 1302, 1307, 1326, 1327, 1320
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
# Calls with a path that is not written to: what a link leads to, and what gets one more name.
_TARGETS: Final = frozenset({"symlink", "symlinkat"})
_SOURCES: Final = frozenset({"link", "linkat"})
# Calls with paths that may be of another folder than the working directory: the arguments with its descriptor.
_FOLDERS: Final[dict[str, tuple[bytes, ...]]] = {
    **dict.fromkeys(("openat", "openat2", "mkdirat", "unlinkat", "mknodat", "fchmodat", "fchmodat2"), (b"a0",)),
    **dict.fromkeys(("fchownat", "utimensat", "execveat", "newfstatat", "statx", "readlinkat"), (b"a0",)),
    **dict.fromkeys(("renameat", "renameat2", "linkat"), (b"a0", b"a2")),
    "symlinkat": (b"a1",),
}
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

ERRNOS: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.EBUSY)
# What ends with EBUSY where a folder or file is mounted, as roots are. Of other calls it is not asked for.
_REPLACES: Final = frozenset({"rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"})
# How a call that opens says what for: the argument with its flags. Any other one that is not below changes something.
_FLAGS: Final = {"open": b"a1", "openat": b"a2"}
# What a process asks to raise: the argument that names the resource, and what of these a policy decides (getrlimit(2)).
_RAISES: Final = {"setrlimit": b"a0", "prlimit64": b"a1"}
_RESOURCES: Final = {0: "cpu", 4: "core", 7: "nofile"}
_READS_ONLY: Final = frozenset(
    {"openat2", "execve", "execveat", "chdir", "stat", "lstat", "newfstatat", "statx", "readlink", "readlinkat"}
)

Find = Callable[[str, int, str], str]
Follow = Callable[[str], str]


class Refusal(NamedTuple):
    """One kind of refused call. by: `kernel` or `seccomp`.

    path: empty where the call names none; a folder with a slash at its end where something new was to be made in it;
    of a call that raises a limit, `core`, `cpu` or `nofile`.
    """

    by: str
    call: str
    errno: int
    path: str
    write: bool


class Audit:
    """The audit of this machine. fd: becomes readable when there is something to `take`."""

    def __init__(self, audited: dict[str, int], refused: dict[str, int]) -> None:
        """Set it up. Numbers by name, of calls that are recorded and that filters refuse. Raises OSError."""
        self._refusals = Refusals(refused | audited)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_AUDIT)
        # Nothing waits for ever, should the kernel not answer.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 1, 0))
        self._socket.bind((0, 0))
        self.fd = self._socket.fileno()
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)
        self._sequence = 0
        replaces = [number for name, number in audited.items() if name in _REPLACES]
        for number in ERRNOS:
            calls = replaces if number == errno.EBUSY else audited.values()
            self._ask(_ADD_RULE, _rule(_EXIT_LIST, ((_FIELD_UID, UID), (_FIELD_EXIT, -number)), calls))
        for kind in (_PROCTITLE, _EOE):
            self._ask(_ADD_RULE, _rule(_EXCLUDE_LIST, ((_FIELD_TYPE, kind),), ()))
        mask = _ENABLED | _FAILURE | _PID | _RATE_LIMIT | _BACKLOG_LIMIT | _BACKLOG_WAIT
        # A full backlog drops records; it must not make the program wait.
        self._ask(_SET, _STATUS.pack(mask, 1, 0, os.getpid(), _RATE, _BACKLOG, 0, 0, 0, 0, 0))
        self._lost_before = 0

    def settle(self) -> None:
        """Forget all so far, and what is lost of it: before a machine is saved."""
        self.begin()
        self._lost_before = self._status()[_LOST]

    def begin(self, find: Find | None = None, roots: Sequence[str] = (), follow: Follow | None = None) -> None:
        """Forget all so far: what follows is the program's. find, roots, follow: as Refusals has them."""
        while self._next() is not None:
            pass
        self._refusals.forget(find, roots, follow)

    def take(self) -> None:
        """Take what has come, at most _READS records so that others get their turn."""
        for _ in range(_READS):
            if (record := self._next()) is None:
                return
            self._refusals.note(*record)

    def end(self) -> tuple[dict[Refusal, int], int]:
        """What was refused since `begin`, how often; and how many records, or kinds beyond `DENIED_MAX`, are lost."""
        deadline = time.monotonic() + _LAST_S
        # The kernel's thread that sends records has had its turn by now, or has it here. Where there is no record,
        # none is lost either, and asking the kernel for that would cost most programs milliseconds.
        self.take()
        if not self._refusals.heard:
            os.sched_yield()
            self.take()
            if not self._refusals.heard:
                return {}, 0
        while True:
            late = time.monotonic() > deadline
            status = self._status()  # before what it says is still to come, which is then read
            # All of it, even past the deadline: nobody is left who could make more.
            while (record := self._next()) is not None:
                self._refusals.note(*record)
            if late or not status[_QUEUED]:
                break
        self._refusals.finish()
        return self._refusals.found, max(0, status[_LOST] - self._lost_before) + self._refusals.uncounted

    # netlink

    def _next(self) -> tuple[int, bytes] | None:
        """The next record of the kernel's, if there is one: its type and its text."""
        # Polled first, by code that has run before: an error's would be new to a fresh clone, and slow.
        if not self._poll.poll(0):
            return None
        try:
            data = self._socket.recv(16384)
        except OSError:  # ENOBUFS: some were dropped, and are counted by the kernel
            return 0, b""
        if len(data) < _HEADER.size:
            return 0, b""
        return _HEADER.unpack_from(data)[1], data[_HEADER.size :].rstrip(b"\0")

    def _status(self) -> tuple[int, ...]:
        """The audit's own counters; zeros where it does not answer."""
        answer = b""
        with contextlib.suppress(OSError):
            answer = self._ask(_GET, b"")
        return _STATUS.unpack_from(answer.ljust(_STATUS.size, b"\0"))

    def _ask(self, kind: int, body: bytes) -> bytes:
        """Send a request; its answer, which for all but a question is nothing. Raises OSError."""
        self._sequence += 1
        # A question has no acknowledgement: that may come before the answer, which a thread of its own sends.
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
    """Stands for the audit where the kernel's is not ours: it hears nothing. fd: never becomes readable."""

    def __init__(self) -> None:
        self.fd, self._other_end = os.pipe2(os.O_CLOEXEC)

    def settle(self, *_names: object) -> None:
        """Nothing comes, so there is nothing to do."""

    begin = take = settle

    def end(self) -> tuple[dict[Refusal, int], int]:
        """Nothing was heard, and nothing is lost of it."""
        return {}, 0


class Refusals:
    """What records say, put together. found: how often each. uncounted: those beyond `DENIED_MAX` different ones."""

    def __init__(
        self,
        calls: dict[str, int],
        find: Find | None = None,
        roots: Sequence[str] = (),
        follow: Follow | None = None,
    ) -> None:
        """calls: numbers of system calls by name. roots: paths of what is mounted of the host's.

        find: the path of what has this device, as the kernel writes it, and this inode, given the call's own name for
            it, which may be that of a link, or be relative to a descriptor; empty if unknown, or no better than that.
        follow: what a path of a program leads to, where the program itself may have made a link on its way.
        """
        self._names = {number: name for name, number in calls.items()}
        self._begun: dict[bytes, _Call] = {}
        self.found: dict[Refusal, int] = {}
        self.forget(find, roots, follow)

    def forget(self, find: Find | None = None, roots: Sequence[str] = (), follow: Follow | None = None) -> None:
        """Begin anew."""
        self._find = find
        self._roots = roots
        self._follow = follow
        self._begun.clear()
        self.found.clear()
        self.uncounted = 0
        self.heard = False  # of anything, also what is no refusal: where records are, some may be lost

    def finish(self) -> None:
        """No more comes: count what is known of calls whose records are not whole."""
        for call in self._begun.values():
            self._count(call)
        self._begun.clear()

    def note(self, kind: int, text: bytes) -> None:
        """Take a record: its type, and its text from "audit(" on."""
        self.heard = True
        serial, _, rest = text.partition(b": ")
        if kind == _SECCOMP:
            values = _values(rest)
            self._count(_Call("seccomp", self._name(values.get(b"syscall", b"")), errno.EPERM))
        elif kind == _SYSCALL:
            self._note_call(serial, _values(rest))
        elif serial in self._begun:
            call = self._begun[serial]
            if kind == _CWD:
                call.cwd = _text(rest, b"cwd=")
            elif kind == _PATH:
                call.items -= 1
                self._note_path(call, rest)
                self._ended(serial, call)

    def _note_call(self, serial: bytes, values: dict[bytes, bytes]) -> None:
        name, error = self._name(values.get(b"syscall", b"")), -_number(values.get(b"exit", b""))
        # A call that the kernel tells of for another reason (a new login uid, say) is recorded though it went well.
        if error not in ERRNOS:
            return
        # Of another process's limits none is ours to raise, and where there is no new one they are only read.
        if name == "prlimit64" and not (values.get(b"a0") == b"0" and values.get(b"a2") != b"0"):
            return
        argument = _FLAGS.get(name)
        call = _Call("kernel", name, error, items=_number(values.get(b"items", b"")))
        call.write = bool(_number(values.get(argument, b""), 16) & _WRITES) if argument else name not in _READS_ONLY
        call.write |= call.errno == errno.EROFS  # flags of openat2 lie in memory
        if name in _RAISES:
            call.path = _RESOURCES.get(_number(values.get(_RAISES[name], b""), 16) & 0xFFFFFFFF, "")
        folders = (_number(values.get(word, b""), 16) & 0xFFFFFFFF for word in _FOLDERS.get(name, ()))
        call.elsewhere = any(folder != _AT_FDCWD for folder in folders)
        if len(self._begun) >= _OPEN:
            self._count(self._begun.pop(next(iter(self._begun))))
        self._begun[serial] = call
        self._ended(serial, call)

    def _note_path(self, call: _Call, record: bytes) -> None:
        values, name = _values(record), _text(record, b"name=")
        kind = values.get(b"nametype")
        beside = call.name in _TARGETS and kind != b"CREATE"
        beside |= call.name in _SOURCES and call.errno == errno.EROFS
        if kind == b"PARENT":
            # Of a name without a slash no part is its folder's: the kernel then says the working directory, which is
            # that folder only where no descriptor was given.
            name = "." if call.elsewhere and name == call.cwd else name
            call.folders.append(self._path(call, name, values))
            call.folder = call.folder or call.folders[0]
        elif call.name in _EXECUTES:
            # A script, then its interpreter: the last is what was not executed.
            call.path = self._executed(call, name) or call.path
        elif call.name in _REPLACES:
            self._note_replaced(call, name, values)
        elif not beside:
            call.path = call.path or self._path(call, name, values)

    def _note_replaced(self, call: _Call, name: str, values: dict[bytes, bytes]) -> None:
        if call.elsewhere and not name.startswith("/"):
            # The folders come first, as many as names, and in the same order.
            folder = call.folders[min(call.names, len(call.folders) - 1)] if call.folders else ""
            name = posixpath.join(folder, posixpath.basename(name)) if folder.startswith("/") else name
        call.names += 1
        if call.errno == errno.EBUSY:
            # Of two names either may be what is mounted. What is told of it is what lies under the mount.
            call.path = self._root(call, name) or call.path or name
        else:
            call.path = call.path or self._path(call, name, values)

    def _path(self, call: _Call, name: str, values: dict[bytes, bytes]) -> str:
        """The name of a record, or the path of what the record is about, where that is known and says more."""
        if self._find is None:
            return name
        vague = not name or (call.elsewhere and not name.startswith("/"))
        if not vague and call.errno != errno.EROFS:
            return name
        given = "" if vague else posixpath.normpath(posixpath.join(call.cwd, name))
        device = values.get(b"dev", b"").decode("ascii", "replace")
        return self._find(device, _number(values.get(b"inode", b"")), given) or name

    def _executed(self, call: _Call, name: str) -> str:
        """The name of a program; of a link that the program made what that leads to, for which a list counts."""
        if not name or self._follow is None or (call.elsewhere and not name.startswith("/")):
            return name
        return self._follow(posixpath.join(call.cwd, name)) or name

    def _root(self, call: _Call, name: str) -> str:
        """The root that a name means: that path, or the only one with that name at its end; else empty."""
        path = posixpath.normpath(posixpath.join(call.cwd, name))
        if path in self._roots:
            return path
        found = [root for root in self._roots if posixpath.basename(root) == posixpath.basename(path)]
        return found[0] if len(found) == 1 else ""

    def _ended(self, serial: bytes, call: _Call) -> None:
        if call.items <= 0:
            self._count(self._begun.pop(serial))

    def _count(self, call: _Call) -> None:
        refusal = call.refusal()
        if refusal in self.found or len(self.found) < DENIED_MAX:
            self.found[refusal] = self.found.get(refusal, 0) + 1
        else:
            self.uncounted += 1

    def _name(self, number: bytes) -> str:
        return self._names.get(_number(number), f"system call {_number(number)}")


class _Call:
    """A refused call while its records come."""

    def __init__(self, by: str, name: str, number: int, *, items: int = 0) -> None:
        self.by = by
        self.name = name
        self.errno = number
        self.items = items
        self.write = False
        self.elsewhere = False  # a relative path is not from the working directory
        self.cwd = ""
        self.folders: list[str] = []  # in which it was to be done
        self.names = 0  # of what is in them
        self.folder = ""  # of something new: the kernel does not note the new name where it may not be made
        self.path = ""

    def refusal(self) -> Refusal:
        """As it is counted; the path of something new is its folder's, with a slash at its end."""
        path = self.path or self.folder
        if path and not path.startswith("/"):
            path = posixpath.join("..." if self.elsewhere else self.cwd, path)
        if path:
            # Two slashes at the beginning would stay two.
            path = ("/" * path.startswith("/") + posixpath.normpath(path).lstrip("/"))[:_PATH_MAX]
            if not self.path and path != "/":
                path += "/"
        return Refusal(self.by, self.name, self.errno, path, self.write)


def _rule(which: int, fields: tuple[tuple[int, int], ...], calls: Any) -> bytes:  # noqa: ANN401 - any numbers
    """Struct audit_rule_data: always record what all *fields* equal, of these calls."""
    mask = [0] * 64
    for number in calls:
        mask[number // 32] |= 1 << number % 32
    padding = (0,) * (_FIELDS - len(fields))
    words = (which, _ALWAYS, len(fields), *mask, *(kind for kind, _ in fields), *padding)
    values = (*(value & 0xFFFFFFFF for _, value in fields), *padding)
    operators = (*(_EQUAL for _ in fields), *padding)
    return struct.pack(f"={len(words) + 2 * _FIELDS + 1}I", *words, *values, *operators, 0)


def _values(text: bytes) -> dict[bytes, bytes]:
    """Words `name=value`; quoted values, which may hold blanks, are not looked at."""
    return dict(word.partition(b"=")[::2] for word in text.split(b" "))


def _number(text: bytes, base: int = 10) -> int:
    try:
        return int(text, base)
    except ValueError:
        return 0


def _text(record: bytes, key: bytes) -> str:
    """A text of the program's: in quotes, or where it holds other characters in hexadecimal."""
    _, _, rest = record.partition(key)
    if rest.startswith(b'"'):
        return rest[1:].partition(b'"')[0].decode("utf-8", "backslashreplace")
    try:
        return bytes.fromhex(rest.partition(b" ")[0].decode("ascii")).decode("utf-8", "backslashreplace")
    except ValueError:
        return ""  # (null)
