"""Checks that what a client says at the start of a connection names the host that the connection was opened for.

Pure: bytes in, bytes to forward out. Three modes: ``tls`` needs a ClientHello with that name, ``http`` checks every
request, ``any`` checks both where it recognises them and passes everything else. The far end's bytes are not checked.

Known limits: what is inside TLS is invisible, which includes a ClientHello that answers a HelloRetryRequest; ``any``
is an effort against mistakes and plain fronting, since a protocol that nobody recognises can name what it likes.
"""

import re
from collections.abc import Callable
from typing import Final, Literal, NoReturn, Protocol

from x07_sandbox.errors import UsageError
from x07_sandbox.network.client_hello import ClientHello, HelloError, HelloReader
from x07_sandbox.network.http_requests import RequestError, RequestStream, escaped
from x07_sandbox.network.names import Host, parse_guest_host

_LINE_MAX: Final = 8 * 1024
_TLS_START: Final = b"\x16\x03"
# PostgreSQL clients may ask for encryption by GSS first, then by TLS, on one connection.
_POSTGRES: Final = (bytes.fromhex("00000008 04d2162f"), bytes.fromhex("00000008 04d21630"))
_POSTGRES_SIZE: Final = 8
# Wider than the grammar of HTTP, since servers forgive more: the request parser refuses what is not strict.
_LINE_FEED: Final = ord("\n")
_WORD: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SPACE: Final = rb"[\t\x0b\x0c ]"
_OPEN_LINE: Final = re.compile(rb"[\r\n\t\x0b\x0c ]*(?:%b(?:%b[\t\x0b\x0c\r\x20-\x7e\x80-\xff]*)?)?" % (_WORD, _SPACE))
_VERSION: Final = re.compile(rb"%bHTTP/[0-9][0-9.]*[\t\x0b\x0c\r ]*\Z" % _SPACE, re.IGNORECASE)
_TARGET: Final = re.compile(rb"[\r\n\t\x0b\x0c ]*%b%b+(?:[/*]|https?:)" % (_WORD, _SPACE), re.IGNORECASE)


class InspectionError(Exception):
    """A connection may not go on.

    rule: a stable id, such as ``tls:no-sni``. reason: a clause without full stop, the client's text in it escaped and
    cut. name: the name that the client gave, in normal form, or escaped where it has none; "" without a name.
    """

    def __init__(self, rule: str, reason: str, name: str = "") -> None:
        super().__init__(rule, reason, name)
        self.rule = rule
        self.reason = reason
        self.name = name


class Inspector(Protocol):
    """What watches the client's bytes of one connection.

    After `from_server` and after `client_eof`, ``from_client(b"")`` returns the bytes that these have released. Once an
    InspectionError is raised, every later call raises it again.
    """

    @property
    def held(self) -> int:
        """How many bytes are held back now: at most 64 KiB and one read."""

    @property
    def decided(self) -> bool:
        """Whether the first bytes have been judged, and passed."""

    @property
    def transparent(self) -> bool:
        """Whether nothing is held, and from now on bytes may bypass the inspector in both directions."""

    @property
    def watches_server(self) -> bool:
        """Whether `from_server` has to be given the far end's bytes, before they are passed on."""

    @property
    def tls_name(self) -> str:
        """The server name of a ClientHello in normal form; "" if none was seen."""

    @property
    def ech(self) -> bool:
        """Whether the ClientHello has an encrypted one inside, or pretends to."""

    def from_client(self, data: bytes) -> bytes:
        """Take bytes from the client; return those to forward now. Raises InspectionError."""

    def from_server(self, data: bytes) -> None:
        """Take bytes of the far end."""

    def client_eof(self) -> None:
        """Take the end of the client's bytes. Raises InspectionError where a message that is checked is incomplete."""

    def release(self) -> bytes:
        """Return what is held of a start that is not decided yet: its client may be waiting for an answer.

        It is judged all the same, with what follows. Nothing of a ClientHello is released, nor of what has to be TLS or
        HTTP.
        """


def inspector(mode: Literal["tls", "http", "any"], name: str | None, denied: Callable[[str], str | None]) -> Inspector:
    """Return the inspector of a new connection.

    name: what it was opened for, in normal form; None for a literal address. denied: why a name is denied, if it is;
    asked only on connections to literal addresses.
    """
    return _Inspection(mode, _Names(name, denied))


class _Stage(Protocol):
    """One way to read a connection."""

    @property
    def held(self) -> int: ...
    @property
    def decided(self) -> bool: ...
    @property
    def transparent(self) -> bool: ...
    @property
    def watches_server(self) -> bool: ...
    def feed(self, data: bytes) -> bytes: ...
    def server(self, data: bytes) -> None: ...
    def eof(self) -> None: ...


class _Names:
    """Judges the names that a client gives, and remembers that of its ClientHello."""

    def __init__(self, name: str | None, denied: Callable[[str], str | None]) -> None:
        self._name = name
        self._denied = denied
        self.tls_name = ""
        self.ech = False

    def judge_host(self, host: Host) -> None:
        """Check the host of a request. Raises InspectionError."""
        self._judge("http:other-host", "the request", host)

    def judge_hello(self, hello: ClientHello, *, need_name: bool) -> None:
        """Check the server name of a hello. Raises InspectionError."""
        self.ech = hello.ech
        if hello.server_name is None:
            if need_name and self._name is not None:
                raise InspectionError("tls:no-sni", "the TLS ClientHello names no server")
            return
        try:
            host: Host | None = parse_guest_host(hello.server_name)
        except UsageError:
            host = None
        if not isinstance(host, str):
            text = escaped(hello.server_name)
            raise InspectionError("tls:malformed", f"the TLS ClientHello names {text}, which is not a name", text)
        self.tls_name = host
        self._judge("tls:other-name", "the TLS ClientHello", host)

    def _judge(self, rule: str, what: str, host: Host) -> None:
        if self._name is not None:
            if host != self._name:
                why = f"{what} names {host}, but the connection was opened for {self._name}"
                raise InspectionError(rule, why, str(host))
        elif isinstance(host, str) and (reason := self._denied(host)) is not None:
            raise InspectionError("name:denied", f"{what} names {host}: {reason}", host)


class _Inspection:
    """An Inspector, see there: a stage, and the first error that it raised."""

    def __init__(self, mode: Literal["tls", "http", "any"], names: _Names) -> None:
        self._names = names
        self._stage: _Stage
        if mode == "tls":
            self._stage = _Tls(names, need_name=True)
        elif mode == "http":
            self._stage = RequestStream(names.judge_host)
        else:
            self._stage = _Any(names)
        self._error: InspectionError | None = None

    @property
    def held(self) -> int:
        return self._stage.held

    @property
    def decided(self) -> bool:
        return self._stage.decided

    @property
    def transparent(self) -> bool:
        return self._error is None and self._stage.transparent

    @property
    def watches_server(self) -> bool:
        return self._stage.watches_server

    @property
    def tls_name(self) -> str:
        return self._names.tls_name

    @property
    def ech(self) -> bool:
        return self._names.ech

    def from_client(self, data: bytes) -> bytes:
        self._again()
        try:
            return self._stage.feed(data)
        except (HelloError, RequestError, InspectionError) as exc:
            self._fail(exc)

    def from_server(self, data: bytes) -> None:
        self._again()
        self._stage.server(data)

    def client_eof(self) -> None:
        self._again()
        try:
            self._stage.eof()
        except (HelloError, RequestError, InspectionError) as exc:
            self._fail(exc)

    def release(self) -> bytes:
        return self._stage.release() if isinstance(self._stage, _Any) else b""

    def _again(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, exc: HelloError | RequestError | InspectionError) -> NoReturn:
        name = "" if isinstance(exc, HelloError) else exc.name
        self._error = exc if isinstance(exc, InspectionError) else InspectionError(exc.rule, exc.reason, name)
        raise self._error from None


class _Tls:
    """A connection that has to start with a ClientHello."""

    watches_server = False

    def __init__(self, names: _Names, *, need_name: bool) -> None:
        self._names = names
        self._need_name = need_name
        self._reader = HelloReader()
        self.decided = False

    @property
    def held(self) -> int:
        return 0 if self.decided else len(self._reader.held)

    @property
    def transparent(self) -> bool:
        return self.decided

    def feed(self, data: bytes) -> bytes:
        if self.decided:
            return data
        hello = self._reader.feed(data)
        if hello is None:
            return b""
        self._names.judge_hello(hello, need_name=self._need_name)
        self.decided = True
        whole, self._reader = bytes(self._reader.held), HelloReader()
        return whole

    def server(self, data: bytes) -> None:
        """Nothing that the far end says matters."""

    def eof(self) -> None:
        if self.held:
            raise HelloError("tls:malformed", "the connection ends inside the ClientHello")


class _Raw:
    """A connection of which nothing is checked."""

    held = 0
    decided = True
    transparent = True
    watches_server = False

    def feed(self, data: bytes) -> bytes:
        return data

    def server(self, data: bytes) -> None:
        """Nothing that the far end says matters."""

    def eof(self) -> None:
        """Every end is fine."""


class _Any:
    """A connection of unknown protocol: holds the first bytes until they can only be one, then reads them as that."""

    def __init__(self, names: _Names) -> None:
        self._names = names
        self._start = bytearray()
        self._released = b""  # the beginning of what will be forwarded, which has been
        self._stage: _Stage | None = None

    @property
    def held(self) -> int:
        return len(self._start) - len(self._released) if self._stage is None else len(self._start) + self._stage.held

    @property
    def decided(self) -> bool:
        return self._stage is not None and self._stage.decided

    @property
    def transparent(self) -> bool:
        return self._stage is not None and self._stage.transparent and not self._start

    @property
    def watches_server(self) -> bool:
        return self._stage is not None and self._stage.watches_server

    def feed(self, data: bytes) -> bytes:
        if self._stage is not None and not self._start:
            return self._rest(self._stage.feed(data))
        self._start += data
        out = b""
        while self._stage is None and self._start[:_POSTGRES_SIZE] in _POSTGRES:
            out += self._rest(bytes(self._start[:_POSTGRES_SIZE]))
            del self._start[:_POSTGRES_SIZE]
        self._stage = self._stage or self._choose(ended=False)
        return out if self._stage is None else out + self._rest(self._stage.feed(self._take_start()))

    def release(self) -> bytes:
        if self._stage is not None:
            return b""
        released = bytes(self._start[len(self._released) :])
        self._released += released
        return released

    def _rest(self, out: bytes) -> bytes:
        """What is to be forwarded, without what has been."""
        if not out or not self._released:
            return out
        if not out.startswith(self._released):
            raise RequestError("http:malformed", "the request line is not in its usual form")
        out, self._released = out[len(self._released) :], b""
        return out

    def server(self, data: bytes) -> None:
        if self._stage is not None:
            self._stage.server(data)

    def eof(self) -> None:
        if self._stage is None:
            self._stage = self._choose(ended=True) or _Raw()
            if not self._stage.transparent:
                self._stage.feed(self._take_start())  # an unfinished message, of which nothing passes
        self._stage.eof()

    def _take_start(self) -> bytes:
        start, self._start = bytes(self._start), bytearray()
        return start

    def _choose(self, *, ended: bool) -> _Stage | None:
        """How to read what is held; None while that is open."""
        if self._start.startswith(_TLS_START):
            return _Tls(self._names, need_name=False)
        if any(start.startswith(self._start) for start in (_TLS_START, *_POSTGRES)):
            return None
        is_request = _is_request_line(self._start, ended=ended)
        if is_request is None:
            return None
        return RequestStream(self._names.judge_host) if is_request else _Raw()


def _is_request_line(text: bytearray, *, ended: bool) -> bool | None:
    """Whether some server could take *text* for an HTTP request; None while its first line is open.

    ended: nothing comes any more.
    """
    found = _OPEN_LINE.match(text, 0, _LINE_MAX)
    end = found.end() if found else 0
    if end == _LINE_MAX:  # too long for an honest request line; not for some servers
        return _TARGET.match(text) is not None
    if end < len(text):
        return text[end] == _LINE_FEED and _VERSION.search(text, 0, end) is not None
    return _VERSION.search(text) is not None if ended else None
