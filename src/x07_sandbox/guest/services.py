"""Services of the agent that run like a command: confined by init, as the program's user, on standard streams.

Everything that they need is imported before the fork, since the agent's code may be missing in the program's
namespaces. The file server reads and changes files; the kernel decides what a request may reach.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from x07_sandbox.channel import files
from x07_sandbox.channel.contents import next_data
from x07_sandbox.channel.files import Answer, Buffer, FileInfo, Request
from x07_sandbox.channel.messages import COUNT_MAX, FILES
from x07_sandbox.channel.trees import FOLDER_FLAGS, Entry, Kind, Unpacker, can_hold_names, entry_of, segment, walk
from x07_sandbox.errors import PeerError
from x07_sandbox.guest.system import write_all
from x07_sandbox.guest.trees import content

_READ: Final = 128 * 1024
_AGAIN_S: Final = 0.05
_ERRORS: Final = 2
_UNSIZED_MAX: Final = 64 << 20
_PERMISSIONS: Final = 0o7777


def run(service: str, argv: list[str]) -> NoReturn:
    """Run a service until its streams end."""
    status = 1
    try:
        if service == FILES:
            FileServer(0, 1).serve()
        elif len(argv) > 1:
            _await(int(argv[0]), float(argv[1]))
        else:
            _connect(int(argv[0]))
        status = 0
    finally:
        os._exit(status)


def _await(port: int, timeout_s: float) -> None:
    """Return once a server accepts connections at a port of this sandbox. Raises OSError after *timeout_s*."""
    until = time.monotonic() + timeout_s
    while True:
        with socket.socket() as sock:
            sock.settimeout(max(0.1, until - time.monotonic()))
            try:
                sock.connect(("127.0.0.1", port))
            except OSError:
                if time.monotonic() > until:
                    raise
            else:
                return
        time.sleep(_AGAIN_S)


def _connect(port: int) -> None:
    """Connect the standard streams to a port of this sandbox, until the server ends its direction of the connection.

    Raises OSError.
    """
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))  # create_connection would import a module of the program's Python
        there, back = _Way(0, sock.fileno()), _Way(sock.fileno(), 1)
        while not back.ended:
            ways = [way for way in (there, back) if not way.ended]
            reading = [way.in_fd for way in ways if not way.held]
            writing = [way.out_fd for way in ways if way.held]
            readable, writable, _ = select.select(reading, writing, [])
            for way in ways:
                if (way.out_fd in writable) if way.held else (way.in_fd in readable):
                    try:
                        way.move()
                    except OSError:
                        if way is back:
                            raise
                        way.give_up()  # the server reads no more, and may still have sent something
            if there.ended and not there.shut:
                there.shut = True
                sock.shutdown(socket.SHUT_WR)


class _Way:
    """One direction, which never blocks. held: bytes that were read and not yet written."""

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self.in_fd = in_fd
        self.out_fd = out_fd
        self.held = b""
        self.ended = self.shut = False
        os.set_blocking(out_fd, False)

    def give_up(self) -> None:
        """Move nothing more in this direction."""
        self.held, self.ended = b"", True

    def move(self) -> None:
        """Read once, or write once. Raises OSError."""
        if self.held:
            self.held = self.held[os.write(self.out_fd, self.held) :]
        elif not (data := os.read(self.in_fd, _READ)):
            self.ended = True
        else:
            self.held = data


class FileServer:
    """Serves requests from *in_fd* and answers to *out_fd*, both blocking, until the input ends."""

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._buffer = Buffer()
        self._left = 0  # of the content that follows the request
        self._calls: dict[str, Callable[[Request], Iterator[Answer | bytes]]] = {
            files.READ: self._read,
            files.WRITE: self._write,
            files.STAT: self._stat,
            files.LIST: self._list,
            files.MAKE: self._make,
            files.REMOVE: self._remove,
            files.PUT: self._put,
            files.GET: self._get,
        }

    def serve(self) -> None:
        """Serve requests. Raises OSError if the agent is gone."""
        while (values := self._next()) is not None:
            request = Request(*values)
            answered, self._left = False, request.size if request.kind in {files.WRITE, files.PUT} else 0
            try:
                for part in self._calls[request.kind](request):
                    write_all(self._out_fd, part if isinstance(part, bytes) else files.encode(part))
                    answered = True
            except (OSError, ValueError, OverflowError, PeerError) as exc:
                if answered:  # the host learns from the end of the output that the content is incomplete
                    raise
                for _ in self._content():
                    pass  # all of it is read, or the next request could not be found
                write_all(self._out_fd, files.encode(Answer(_number_of(exc))))

    def _next(self) -> list[Any] | None:
        while (values := self._buffer.take()) is None:
            if not self._fill():
                return None
        return values

    def _fill(self) -> bool:
        data = os.read(self._in_fd, _READ)
        self._buffer.data += data
        return bool(data)

    def _content(self) -> Iterator[bytes]:
        """Yield the content that follows the request, from where it was read to."""
        while self._left and (self._buffer.data or self._fill()):
            piece = self._buffer.piece(min(self._left, _READ))
            self._left -= len(piece)
            yield piece

    # requests: each yields its answer, and the content after it

    def _read(self, request: Request) -> Iterator[Answer | bytes]:
        fd = self._opened(request.path, os.O_RDONLY)
        try:
            info = os.fstat(fd)
            if stat.S_ISDIR(info.st_mode):
                raise IsADirectoryError(errno.EISDIR, "")
            if not stat.S_ISREG(info.st_mode):
                first = os.read(fd, min(request.size, _READ))
                size = len(first)
            elif info.st_size:
                size = max(0, info.st_size - request.offset)
                size = size if request.whole else min(request.size, size)
                first = os.pread(fd, min(size, _READ), request.offset)
                if len(first) < _READ:  # the size of a file in /sys is wrong
                    size = len(first)
            else:  # such as a file in /proc
                first = _whole(fd, request.offset, request.size)
                size = len(first)
            yield Answer(0, size)
            if not request.whole:
                yield first
                yield from self._range(fd, request.offset + len(first), request.offset + size)
            elif len(first) == size:
                yield segment(size) + first if size else b""
            else:
                yield from self._segments(fd, request.offset, request.offset + size)
        finally:
            os.close(fd)

    def _opened(self, path: str, flags: int) -> int:
        """Open a file. Raises OSError, also for a link to a stream of this process, such as /proc/self/fd/1."""
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if any(os.path.sameopenfile(fd, own) for own in (self._in_fd, self._out_fd, _ERRORS)):
            os.close(fd)
            raise PermissionError(errno.EACCES, "")
        return fd

    def _segments(self, fd: int, at: int, end: int) -> Iterator[bytes]:
        """Yield the content from *at* to *end* as segments (channel/trees). Holes have no bytes."""
        while at < end:
            start, stop = next_data(fd, at, end)
            if start > at:
                yield segment(start - at, hole=True)
            if stop > start:
                yield segment(stop - start)
                yield from self._range(fd, start, stop)
            at = stop

    def _range(self, fd: int, at: int, end: int) -> Iterator[bytes]:
        """Send the content from *at* to *end* without copying it to this process. Yield what cannot be sent so."""
        with contextlib.suppress(OSError):  # it is read below, or that raises the error
            while at < end and (count := os.sendfile(self._out_fd, fd, at, end - at)):
                at += count
        while at < end:
            if not (piece := os.pread(fd, min(_READ, end - at), at)):
                raise OSError(errno.EIO, "it has become shorter")
            at += len(piece)
            yield piece

    def _write(self, request: Request) -> Iterator[Answer | bytes]:
        fd = self._opened(request.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with os.fdopen(fd, "wb", buffering=0):
            if request.mode >= 0:
                os.fchmod(fd, request.mode)
            while self._left and self._buffer.data:  # it came with the request
                write_all(fd, next(self._content()))
            with contextlib.suppress(OSError):  # it is written below, or that raises the error
                while self._left and (
                    count := os.splice(self._in_fd, fd, self._left)
                ):  # without a copy in this process
                    self._left -= count
            for piece in self._content():
                write_all(fd, piece)
        yield Answer(0)

    def _stat(self, request: Request) -> Iterator[Answer | bytes]:
        info = os.stat(request.path, follow_symlinks=not request.whole)
        yield Answer(0, 0, (_info(os.path.basename(request.path), request.path, info),))

    def _list(self, request: Request) -> Iterator[Answer | bytes]:
        found: list[FileInfo] = []
        with os.scandir(request.path) as entries:
            for entry in entries:
                if len(found) >= files.ENTRIES_MAX:
                    raise OSError(errno.E2BIG, "")
                with contextlib.suppress(FileNotFoundError):
                    found.append(_info(entry.name, entry.path, entry.stat(follow_symlinks=False)))
        answer = files.encode(Answer(0, 0, tuple(found)))
        if len(answer) > files.MESSAGE_MAX:
            raise OSError(errno.E2BIG, "")
        yield answer

    def _make(self, request: Request) -> Iterator[Answer | bytes]:
        mode = request.mode if request.mode >= 0 else 0o777
        if request.whole:
            os.makedirs(request.path, mode, exist_ok=True)
        else:
            os.mkdir(request.path, mode)
        yield Answer(0)

    def _remove(self, request: Request) -> Iterator[Answer | bytes]:
        is_folder = stat.S_ISDIR(os.lstat(request.path).st_mode)
        if is_folder and request.whole:
            for folder, folders, names in os.walk(request.path, topdown=False):
                for name in names:
                    os.unlink(f"{folder}/{name}")
                for name in folders:
                    path = f"{folder}/{name}"
                    (os.unlink if os.path.islink(path) else os.rmdir)(path)
        (os.rmdir if is_folder else os.unlink)(request.path)
        yield Answer(0)

    def _put(self, request: Request) -> Iterator[Answer | bytes]:
        """Create a tree at a new path."""
        os.mkdir(request.path)
        with contextlib.closing(Unpacker(os.open(request.path, FOLDER_FLAGS), _PERMISSIONS)) as tree:
            for piece in self._content():
                tree.write(piece)
            if not tree.ended:
                raise ValueError("the tree has no end")
            tree.finish()
        yield Answer(0)

    def _get(self, request: Request) -> Iterator[Answer | bytes]:
        fd = os.open(request.path, FOLDER_FLAGS | os.O_NOFOLLOW)
        try:
            yield Answer(0)
            for found in walk(fd):
                complete = can_hold_names(found.name)
                if found.fd >= 0:
                    yield entry_of(found.name, found.info, _PERMISSIONS).encoded()
                else:
                    complete = yield from content(found.path, found.name, found.info)
                if not complete:
                    yield Entry(Kind.UNSUPPORTED, found.name, mode=found.info.st_mode).encoded()
            yield Entry(Kind.END, b"").encoded()
        finally:
            os.close(fd)


def _whole(fd: int, offset: int, most: int) -> bytes:
    """Return the content of a file whose size is unknown, from *offset* on. Raises OSError if it is very large."""
    data = bytearray()
    while len(data) < most and (piece := os.pread(fd, min(_READ, most - len(data)), offset + len(data))):
        data += piece
        if len(data) > _UNSIZED_MAX:
            raise OSError(errno.EFBIG, "")
    return bytes(data)


def _number_of(exc: Exception) -> int:
    """Return the errno of a failure. Other errors are about a malformed tree, or a path with a NUL."""
    return (exc.errno or errno.EIO) if isinstance(exc, OSError) else errno.EINVAL


def _info(name: str, path: str, info: os.stat_result) -> FileInfo:
    target = os.readlink(path) if stat.S_ISLNK(info.st_mode) else ""
    mtime_ns = max(-COUNT_MAX, min(info.st_mtime_ns, COUNT_MAX))
    return FileInfo(name, info.st_mode, info.st_size, mtime_ns, target)
