"""Files in a sandbox, for callers from Python."""

from __future__ import annotations

import contextlib
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
from x07_sandbox.errors import PeerError, UsageError
from x07_sandbox.library.file_info import FileInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.channel.files import Answer
    from x07_sandbox.files.unpack import Unpacker
    from x07_sandbox.runs.command import AnySandbox
    from x07_sandbox.sandboxes.files import FileServer

_T = TypeVar("_T")
_CHUNK: Final = 128 * 1024
READ_MAX: Final = 256 << 20
_PERMISSIONS: Final = 0o7777


class Files:
    """The files of a sandbox, as its programs' user sees them. A relative path is below the sandbox's own folder.

    All methods raise OSError, with errno and filename, if the sandbox's system refuses; and SandboxError if the sandbox
    has ended. Thread-safe; one request is served after the other.
    """

    def __init__(self, sandbox: AnySandbox) -> None:
        self._sandbox = sandbox
        self._server: FileServer | None = None
        self._busy: tuple[FileServer, threading.Event | None] | None = None
        self._caller = threading.local()
        self._lock = threading.Lock()

    def read(self, path: str, *, offset: int = 0, max_bytes: int = READ_MAX) -> bytes:
        """Return the content of a file from *offset* on, at most *max_bytes* of it."""
        size = min(_whole("max_bytes", max_bytes), READ_MAX)
        request = Request(calls.READ, path, offset=_whole("offset", offset), size=size)
        return self._ask(request, take=lambda server, answer: server.content(_bounded(answer, size)))

    def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        """Create or replace a file, and the folders above it. mode: permission bits; None for 0644 or unchanged."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise UsageError(f"cannot write {path}", f"data is {type(data).__name__}, not bytes", "Encode it first")
        content = bytes(data)
        self._write(path, len(content), lambda: _pieces(content), _mode(mode))

    def list(self, path: str = ".") -> list[FileInfo]:
        """Return what is in a folder, sorted by name."""
        return sorted(self._ask(Request(calls.LIST, path), take=_infos))

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """Return facts about a file, folder or other entry. follow: whether to follow a link at the end of the path."""
        return self._ask(Request(calls.STAT, path, whole=not follow), take=_one)

    def exists(self, path: str) -> bool:
        """Return whether there is a file, folder or other entry; False for a link that leads nowhere."""
        try:
            self.stat(path)
        except OSError as exc:
            if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return False
            raise
        return True

    def mkdir(self, path: str, *, parents: bool = True, mode: int | None = None) -> None:
        """Create a folder. parents: also create those above it, and accept an existing folder."""
        self._ask(Request(calls.MAKE, path, mode=_mode(mode), whole=parents))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link or an empty folder. recursive: also a folder with all that is in it."""
        self._ask(Request(calls.REMOVE, path, whole=recursive))

    def upload(self, local: str | os.PathLike[str], path: str) -> None:
        """See `Sandbox.upload`."""
        source = Path(local)
        with tempfile.TemporaryFile() as packed:
            if source.is_dir():
                from x07_sandbox.files.unpack import pack

                pack(source, packed)
                size = packed.tell()
                self._ask(Request(calls.PUT, path, size=size), lambda: _from_file(packed, size))
                return
            with source.open("rb") as file:
                info = os.fstat(file.fileno())
                size, content = info.st_size, cast("IO[bytes]", file)
                if not size:  # such as a pipe, or a file in /proc
                    shutil.copyfileobj(file, packed)
                    size, content = packed.tell(), packed
                self._write(path, size, lambda: _from_file(content, size), stat.S_IMODE(info.st_mode) & 0o777)

    def download(self, path: str, local: str | os.PathLike[str]) -> None:
        """See `Sandbox.download`."""
        from x07_sandbox.files.unpack import BYTES_MAX, Unpacker

        target = Path(local)
        found = self.stat(path)
        if found.kind == "folder":
            with Unpacker(target) as unpacker:
                self._ask(Request(calls.GET, path), take=lambda server, _answer: _unpack(server, unpacker))
            return
        size = min(found.size or READ_MAX, BYTES_MAX)  # a file of /proc says that it is empty
        with target.open("xb") as out:
            try:
                request = Request(calls.READ, path, size=size)
                self._ask(request, take=lambda server, answer: _store(server, _bounded(answer, size), out))
            except BaseException:
                target.unlink()
                raise
            os.fchmod(out.fileno(), found.mode & 0o777)

    @contextlib.contextmanager
    def called_by(self, given_up: threading.Event) -> Iterator[None]:
        """Let `abort` end the requests of this thread in the context."""
        self._caller.given_up = given_up
        try:
            yield
        finally:
            del self._caller.given_up

    def abort(self, given_up: threading.Event) -> None:
        """End the requests of a caller, which `called_by` names."""
        given_up.set()
        if (busy := self._busy) is not None and busy[1] is given_up:
            busy[0].kill()

    def _write(self, path: str, size: int, content: Callable[[], Iterable[bytes]], mode: int) -> None:
        request = Request(calls.WRITE, path, size=size, mode=mode)
        try:
            self._ask(request, content)
        except FileNotFoundError:
            self.mkdir(posixpath.dirname(path))
            self._ask(request, content)

    def _ask(
        self,
        request: Request,
        content: Callable[[], Iterable[bytes]] = tuple,
        take: Callable[[FileServer, Answer], _T] | None = None,
    ) -> _T:
        asked = request._replace(path=_checked(request.path))
        given_up: threading.Event | None = getattr(self._caller, "given_up", None)
        with self._lock:
            self._sandbox.require_open()
            if given_up is not None and given_up.is_set():
                raise TimeoutError("nobody waits for the request any more")
            # After an exception, an unknown part of the request is under way, so the next one needs a new server.
            server, self._server = self._server or self._sandbox.file_server(), None
            self._busy = server, given_up
            try:
                answer = server.ask(asked, content())
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


def _checked(path: str) -> str:
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
    if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= _PERMISSIONS:
        raise UsageError("cannot set the mode", f"it is {mode!r}", "Pass permission bits, such as 0o644")
    return mode


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise UsageError("cannot read the file", f"{name} is {value!r}, not a whole number from 0", "Pass a number")
    return value


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


def _store(server: FileServer, size: int, out: IO[bytes]) -> None:
    while size:
        piece = server.piece(min(size, _CHUNK))
        size -= len(piece)
        out.write(piece)


def _unpack(server: FileServer, unpacker: Unpacker) -> None:
    while not unpacker.ended:
        unpacker.write(server.piece(_CHUNK))
