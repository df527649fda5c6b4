"""Files in a sandbox, for callers from Python."""

from __future__ import annotations

import errno
import os
import posixpath
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Literal, TypeVar, cast

from x07_sandbox.channel import files as calls
from x07_sandbox.channel.files import Request
from x07_sandbox.channel.trees import Entry, FileEnd, Hole, Kind, Piece, Reader
from x07_sandbox.errors import ArgumentError, PeerError, UsageError, printable, whole_number
from x07_sandbox.host.settings import FILES_S
from x07_sandbox.library.arguments import checked_seconds
from x07_sandbox.library.awaited import Awaited, awaited
from x07_sandbox.sessions.command import FileInfo, bad_value, caller, given_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.channel.files import Answer
    from x07_sandbox.files.incoming import Unpacker
    from x07_sandbox.sessions.command import AnySandbox
    from x07_sandbox.sessions.files import FileServer

_T = TypeVar("_T")
_CHUNK: Final = 128 * 1024
READ_MAX: Final = 256 << 20
_PERMISSIONS: Final = 0o7777


class Files:
    """The files of a sandbox, as its programs' user sees them. A relative path is below the sandbox's own folder.

    All methods raise OSError, with errno and filename, if the sandbox's system refuses; and SandboxError if the sandbox
    has ended. Thread-safe; one request is served after the other.

    timeout_s: how long a request may take without progress; None for 60 seconds. Each 64 KiB of content are progress.
    After that time TimeoutError is raised, and an unknown part of the request has been carried out. A program can cause
    this, since it can stop the process that serves requests. The next request gets a new one.
    """

    def __init__(self, sandbox: AnySandbox, timeout_s: float = FILES_S) -> None:
        self._sandbox = sandbox
        self._timeout_s = timeout_s
        self._server: FileServer | None = None
        self._busy: tuple[FileServer, Callable[[], bool] | None] | None = None  # and whether its caller has given up
        self._lock = threading.Lock()

    def read(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        max_bytes: int = READ_MAX,
        timeout_s: float | None = None,
    ) -> bytes:
        """Return the content of a file from *offset* on, at most *max_bytes* of it."""
        size = min(_whole("max_bytes", max_bytes), READ_MAX)
        request = Request(calls.READ, os.fspath(path), offset=_whole("offset", offset), size=size)
        return self._ask(request, timeout_s, take=lambda server, answer: server.content(_bounded(answer, size)))

    def write(
        self, path: str | os.PathLike[str], data: bytes, *, mode: int | None = None, timeout_s: float | None = None
    ) -> None:
        """Create or replace a file, and the folders above it. mode: permission bits; None for 0644 or unchanged."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ArgumentError(f"cannot write {path}", f"data is {type(data).__name__}, not bytes", "Encode it first")
        content = bytes(data)
        request = Request(calls.WRITE, os.fspath(path), size=len(content), mode=_mode(mode))
        self._write(request, timeout_s, lambda: _pieces(content))

    def list(self, path: str | os.PathLike[str] = ".", *, timeout_s: float | None = None) -> list[FileInfo]:
        """Return what is in a folder, sorted by name."""
        return sorted(self._ask(Request(calls.LIST, os.fspath(path)), timeout_s, take=_infos))

    def stat(self, path: str | os.PathLike[str], *, follow: bool = True, timeout_s: float | None = None) -> FileInfo:
        """Return facts about a file, folder or other entry. follow: whether to follow a link at the end of the path."""
        return self._ask(Request(calls.STAT, os.fspath(path), whole=not follow), timeout_s, take=_one)

    def exists(self, path: str | os.PathLike[str], *, timeout_s: float | None = None) -> bool:
        """Return whether there is a file, folder or other entry; False for a link that leads nowhere."""
        try:
            self.stat(path, timeout_s=timeout_s)
        except OSError as exc:
            if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return False
            raise
        return True

    def mkdir(
        self,
        path: str | os.PathLike[str],
        *,
        parents: bool = True,
        mode: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Create a folder. parents: also create those above it, and accept an existing folder."""
        self._ask(Request(calls.MAKE, os.fspath(path), mode=_mode(mode), whole=parents), timeout_s)

    def remove(self, path: str | os.PathLike[str], *, recursive: bool = False, timeout_s: float | None = None) -> None:
        """Remove a file, a link or an empty folder. recursive: also a folder with all that is in it."""
        self._ask(Request(calls.REMOVE, os.fspath(path), whole=recursive), timeout_s)

    def upload(
        self, local: str | os.PathLike[str], path: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """See `Sandbox.upload`."""
        source = Path(local)
        with tempfile.TemporaryFile() as packed:
            if source.is_dir():
                from x07_sandbox.files.incoming import pack

                pack(source, packed)
                size = packed.tell()
                self._ask(Request(calls.PUT, os.fspath(path), size=size), timeout_s, lambda: _from_file(packed, size))
                return
            with source.open("rb") as file:
                info = os.fstat(file.fileno())
                size, content = info.st_size, cast("IO[bytes]", file)
                if not size:  # such as a pipe, or a file in /proc
                    shutil.copyfileobj(file, packed)
                    size, content = packed.tell(), packed
                request = Request(calls.WRITE, os.fspath(path), size=size, mode=stat.S_IMODE(info.st_mode) & 0o777)
                self._write(request, timeout_s, lambda: _from_file(content, size))

    def download(
        self, path: str | os.PathLike[str], local: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> None:
        """See `Sandbox.download`."""
        from x07_sandbox.files.incoming import BYTES_MAX, Unpacker

        target = Path(local)
        found = self.stat(path, timeout_s=timeout_s)
        if found.kind == "folder":
            with Unpacker(target) as unpacker:
                self._ask(
                    Request(calls.GET, os.fspath(path)),
                    timeout_s,
                    take=lambda server, _answer: _unpack(server, unpacker),
                )
                if names := unpacker.left_out:
                    count = len(names) + unpacker.more_left_out
                    why = f"{count} of its entries could not be copied, such as {printable(names[0])}"
                    fix = "Copy these one by one; all else was copied (see docs/reference/known-limits.md)"
                    raise UsageError(f"cannot download all of {os.fspath(path)}", why, fix, code="incomplete-download")
            return
        with target.open("xb") as out:
            try:
                request = Request(calls.READ, os.fspath(path), size=BYTES_MAX, whole=True)
                self._ask(
                    request,
                    timeout_s,
                    take=lambda server, answer: _store(server, _allowed(os.fspath(path), answer), out),
                )
            except BaseException:
                target.unlink()
                raise
            os.fchmod(out.fileno(), found.mode & 0o777)

    def wake(self) -> None:
        """End the request under way, if its caller no longer waits for it."""
        if (busy := self._busy) is not None and busy[1] is not None and busy[1]():
            busy[0].kill()

    def _write(self, request: Request, timeout_s: float | None, content: Callable[[], Iterable[bytes]]) -> None:
        try:
            self._ask(request, timeout_s, content)
        except FileNotFoundError:
            self.mkdir(posixpath.dirname(request.path), timeout_s=timeout_s)
            self._ask(request, timeout_s, content)

    def _ask(
        self,
        request: Request,
        timeout_s: float | None,
        content: Callable[[], Iterable[bytes]] = tuple,
        take: Callable[[FileServer, Answer], _T] | None = None,
    ) -> _T:
        asked = request._replace(path=_checked(request.path))
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        within_s = checked_seconds("timeout_s", limit_s, bad_value("timeout_s", limit_s, "a number of seconds above 0"))
        with self._lock:
            self._sandbox.require_open()
            if given_up():
                raise TimeoutError("nobody waits for the request any more")
            # After an exception, an unknown part of the request is under way, so the next one needs a new server.
            server, self._server = self._server, None
            if server is None or server.ended:  # since the sandbox was rolled back
                server = self._sandbox.file_server()
            self._busy = server, getattr(caller, "gone", None)
            try:
                answer = server.ask(asked, content(), within_s)
                found = take(server, answer) if take is not None and not answer.errno else None
            except BaseException:
                server.kill()
                self._sandbox.require_open()  # the better error, if that is the cause
                raise
            finally:
                self._busy = None
            self._server = server
        if answer.errno:
            raise OSError(answer.errno, os.strerror(answer.errno), os.fspath(request.path))
        return found  # type: ignore[return-value]  # of the type of `take`


class AsyncFiles(Awaited[Files]):
    """The files of a sandbox, for asyncio. Its methods are those of `Files`.

    If a task is cancelled, an unknown part of its request has been carried out.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    @property
    def _target(self) -> Files:
        return self._files

    read = awaited(Files.read)
    write = awaited(Files.write)
    list = awaited(Files.list)
    stat = awaited(Files.stat)
    exists = awaited(Files.exists)
    mkdir = awaited(Files.mkdir)
    remove = awaited(Files.remove)
    upload = awaited(Files.upload)
    download = awaited(Files.download)


def _checked(path: str | os.PathLike[str]) -> str:
    """Return a path that the kernel can accept. Raises OSError."""
    text = os.fspath(path)
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        pass
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), text)


def _infos(_server: FileServer, answer: Answer) -> list[FileInfo]:
    for entry in answer.entries:
        if "/" in entry.name or entry.name in {"", ".", ".."}:  # a caller may join it to a folder of the host
            raise PeerError("bad answer of the file server", f"an entry has the name {entry.name!a}")
    return [_info(entry) for entry in answer.entries]


def _bounded(answer: Answer, most: int) -> int:
    """Return the size of the content after an answer. Raises PeerError if there is more than was asked for."""
    if answer.size > most:
        raise PeerError("bad answer of the file server", f"it sends {answer.size} bytes instead of {most}")
    return answer.size


def _one(_server: FileServer, answer: Answer) -> FileInfo:
    if len(answer.entries) != 1:
        raise PeerError("bad answer of the file server", f"it has {len(answer.entries)} entries instead of one")
    return _info(answer.entries[0])


def _info(entry: calls.FileInfo) -> FileInfo:
    try:
        os.fsencode(entry.name + entry.target)
    except UnicodeEncodeError:
        why = f"an entry has a name that no bytes stand for: {entry.name!a}"
        raise PeerError("bad answer of the file server", why) from None
    kinds: dict[int, Literal["file", "folder", "link"]] = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "folder",
        stat.S_IFLNK: "link",
    }
    kind = kinds.get(stat.S_IFMT(entry.mode))
    return FileInfo(
        entry.name, kind or "other", entry.mode & _PERMISSIONS, entry.size, entry.mtime_ns / 1e9, entry.target
    )


def _mode(mode: int | None) -> int:
    if mode is None:
        return -1
    error = ArgumentError("cannot set the mode", f"it is {mode!r}", "Pass permission bits, such as 0o644")
    return whole_number(mode, error, 0, _PERMISSIONS)


def _whole(name: str, value: int) -> int:
    error = ArgumentError("cannot read the file", f"{name} is {value!r}, not a whole number from 0", "Pass a number")
    return whole_number(value, error, 0, (1 << 62) - 1)


def _pieces(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), _CHUNK):
        yield data[at : at + _CHUNK]


def _from_file(file: IO[bytes], size: int) -> Iterator[bytes]:
    file.seek(0)
    while size:
        data = file.read(min(_CHUNK, size))
        if not data:
            raise OSError(errno.EIO, "it became shorter while it was read", str(file.name))
        size -= len(data)
        yield data


def _allowed(path: str, answer: Answer) -> int:
    """Return the size of a file to download. Raises UsageError if it is over the limit."""
    from x07_sandbox.files.incoming import BYTES_MAX

    if answer.size > BYTES_MAX:
        why = f"it has {answer.size} bytes, and the limit is {BYTES_MAX} bytes ({BYTES_MAX >> 30} GiB), holes included"
        raise UsageError(f"cannot download {path}", why, "Split or compress it in the sandbox, or read parts of it")
    return answer.size


def _store(server: FileServer, size: int, out: IO[bytes]) -> None:
    """Write a file that comes in segments. Its holes stay holes."""
    reader = Reader()
    data = Entry(Kind.FILE, b"file", size=size).encoded()
    while True:
        for event in reader.feed(data):
            if isinstance(event, Piece):
                out.write(event.data)
            elif isinstance(event, Hole):
                out.seek(event.size, os.SEEK_CUR)
            elif isinstance(event, FileEnd):
                out.truncate(size)  # it may end in a hole
                return
        data = server.piece(_CHUNK)


def _unpack(server: FileServer, unpacker: Unpacker) -> None:
    while not unpacker.ended:
        unpacker.write(server.piece(_CHUNK))
