"""Inspection of a client's first bytes: the host in them must be the host for which the connection was opened.

No I/O: the inspector takes bytes and returns the bytes to forward. Mode ``tls`` requires a ClientHello with the
connection's name. Mode ``http`` checks every request. Mode ``any`` applies both checks where it recognises the
protocol, and passes everything else. The server's bytes are not inspected.

Known limits: the content of TLS is invisible, including a ClientHello after a HelloRetryRequest. ``any`` is best effort
against mistakes and plain fronting, since an unknown protocol can contain any host name.
"""

import re
from collections.abc import Callable
from typing import Final, Literal, Protocol

from x07_sandbox.errors import UsageError
from x07_sandbox.network.client_hello import ClientHello, HelloReader
from x07_sandbox.network.http_requests import WORD, RequestStream, escaped
from x07_sandbox.network.inspection_error import InspectionError
from x07_sandbox.network.names import Host, parse_guest_host

_LINE_MAX: Final = 8 * 1024
_TLS_START: Final = b"\x16\x03"
# PostgreSQL clients may request GSS encryption first and then TLS on one connection.
_POSTGRES: Final = (bytes.fromhex("00000008 04d2162f"), bytes.fromhex("00000008 04d21630"))
_POSTGRES_SIZE: Final = 8
# More tolerant than HTTP's grammar, as servers are; the request parser then rejects what is not strict.
_LINE_FEED: Final = ord("\n")
_SPACE: Final = rb"[\t\x0b\x0c ]"
_OPEN_LINE: Final = re.compile(rb"[\r\n\t\x0b\x0c ]*(?:%b(?:%b[\t\x0b\x0c\r\x20-\x7e\x80-\xff]*)?)?" % (WORD, _SPACE))
_VERSION: Final = re.compile(rb"%bHTTP/[0-9][0-9.]*[\t\x0b\x0c\r ]*\Z" % _SPACE, re.IGNORECASE)
_TARGET: Final = re.compile(rb"[\r\n\t\x0b\x0c ]*%b%b+(?:[/*]|https?:)" % (WORD, _SPACE), re.IGNORECASE)


class _Stage(Protocol):
    """A parser of one protocol."""

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


class _NameCheck:
    """Checks the names that a client sends, and remembers the name in its ClientHello."""

    def __init__(self, name: str | None, denied: Callable[[str], str | None]) -> None:
        self._name = name
        self._denied = denied
        self.tls_name = ""

    def check_host(self, host: Host) -> None:
        """Check the host of a request. Raises InspectionError if it is not allowed."""
        self._check("http:other-host", "the request", host)

    def check_hello(self, hello: ClientHello, *, need_name: bool) -> None:
        """Check the name in a ClientHello. Raises InspectionError if it is denied, or if it is needed but missing."""
        if hello.server_name is None:
            if need_name and self._name is not None:
                raise InspectionError("tls:no-sni", "the TLS ClientHello has no server name")
            return
        try:
            host: Host | None = parse_guest_host(hello.server_name)
        except UsageError:
            host = None
        if not isinstance(host, str):
            text = escaped(hello.server_name)
            why = f"the TLS ClientHello asks for {text}, which is not a valid name"
            raise InspectionError("tls:malformed", why, text)
        self.tls_name = host
        self._check("tls:other-name", "the TLS ClientHello", host)

    def _check(self, rule: str, what: str, host: Host) -> None:
        if self._name is not None:
            if host != self._name:
                why = f"{what} asks for {host}, but the connection was opened for {self._name}"
                raise InspectionError(rule, why, str(host))
        elif isinstance(host, str) and (reason := self._denied(host)) is not None:
            raise InspectionError("name:denied", f"{what} asks for {host}: {reason}", host)


class Inspector:
    """Inspector of the client's bytes of one connection.

    name: the host name of the connection's destination, in normal form; None for a literal address. denied: returns why
    a name is denied, or None; called only for literal addresses.

    Bytes that `from_server` and `client_eof` release are returned by the next ``from_client(b"")``. Once an
    InspectionError was raised, every later call raises it again.
    """

    def __init__(
        self, mode: Literal["tls", "http", "any"], name: str | None, denied: Callable[[str], str | None]
    ) -> None:
        self._names = names = _NameCheck(name, denied)
        self._stage: _Stage
        if mode == "tls":
            self._stage = _Tls(names, need_name=True)
        elif mode == "http":
            self._stage = RequestStream(names.check_host)
        else:
            self._stage = _Any(names)
        self._error: InspectionError | None = None

    @property
    def held(self) -> int:
        """Number of bytes held back: at most 64 KiB plus one read."""
        return self._stage.held

    @property
    def decided(self) -> bool:
        """Whether the first bytes have passed the inspection."""
        return self._stage.decided

    @property
    def transparent(self) -> bool:
        """Whether no bytes are held, and further bytes may bypass the inspector in both directions."""
        return self._error is None and self._stage.transparent

    @property
    def watches_server(self) -> bool:
        """Whether `from_server` needs the server's bytes before they are forwarded."""
        return self._stage.watches_server

    @property
    def tls_name(self) -> str:
        """The server name of a ClientHello in normal form; "" if none was seen."""
        return self._names.tls_name

    def from_client(self, data: bytes) -> bytes:
        """Add bytes from the client, and return the bytes to forward now. Raises InspectionError."""
        self._raise_again()
        try:
            return self._stage.feed(data)
        except InspectionError as exc:
            self._error = exc
            raise

    def from_server(self, data: bytes) -> None:
        """Add bytes from the server."""
        self._raise_again()
        self._stage.server(data)

    def client_eof(self) -> None:
        """Handle the end of the client's bytes. Raises InspectionError if an inspected message is incomplete."""
        self._raise_again()
        try:
            self._stage.eof()
        except InspectionError as exc:
            self._error = exc
            raise

    def release(self) -> bytes:
        """Return the held first bytes while the protocol is still unknown: the client may be waiting for an answer.

        The released bytes are still inspected, together with those that follow. Bytes of a ClientHello stay held. If
        the rules require TLS or HTTP, all first bytes stay held.
        """
        return self._stage.release() if isinstance(self._stage, _Any) else b""

    def _raise_again(self) -> None:
        if self._error is not None:
            raise self._error


class _Tls:
    """Parser of a connection that must start with a ClientHello."""

    watches_server = False

    def __init__(self, names: _NameCheck, *, need_name: bool) -> None:
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
        self._names.check_hello(hello, need_name=self._need_name)
        self.decided = True
        whole, self._reader = bytes(self._reader.held), HelloReader()
        return whole

    def server(self, data: bytes) -> None:
        """Ignore the server's bytes."""

    def eof(self) -> None:
        if self.held:
            raise InspectionError("tls:malformed", "the connection ends inside the ClientHello")


class _Raw:
    """Parser of a connection that is not inspected: it releases all bytes."""

    held = 0
    decided = True
    transparent = True
    watches_server = False

    def feed(self, data: bytes) -> bytes:
        return data

    def server(self, data: bytes) -> None:
        """Ignore the server's bytes."""

    def eof(self) -> None:
        """Accept any end of the client's bytes."""


class _Any:
    """Parser of a connection of unknown protocol: it holds the first bytes until the protocol is known."""

    def __init__(self, names: _NameCheck) -> None:
        self._names = names
        self._start = bytearray()
        self._released = b""  # prefix of the output that was already forwarded
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
        """Return *out* without the first bytes that were already forwarded."""
        if not out or not self._released:
            return out
        if not out.startswith(self._released):
            raise InspectionError("http:malformed", "the request line is not in canonical form")
        out, self._released = out[len(self._released) :], b""
        return out

    def server(self, data: bytes) -> None:
        if self._stage is not None:
            self._stage.server(data)

    def eof(self) -> None:
        if self._stage is None:
            self._stage = self._choose(ended=True) or _Raw()
            if not self._stage.transparent:
                self._stage.feed(self._take_start())  # an incomplete message, which is not forwarded
        self._stage.eof()

    def _take_start(self) -> bytes:
        start, self._start = bytes(self._start), bytearray()
        return start

    def _choose(self, *, ended: bool) -> _Stage | None:
        """Return the parser for the held bytes, or None while the protocol is not known."""
        if self._start.startswith(_TLS_START):
            return _Tls(self._names, need_name=False)
        if any(start.startswith(self._start) for start in (_TLS_START, *_POSTGRES)):
            return None
        is_request = _is_request_line(self._start, ended=ended)
        if is_request is None:
            return None
        return RequestStream(self._names.check_host) if is_request else _Raw()


def _is_request_line(text: bytearray, *, ended: bool) -> bool | None:
    """Return whether a server could take *text* as an HTTP request, or None if unknown yet. ended: no bytes follow."""
    found = _OPEN_LINE.match(text, 0, _LINE_MAX)
    end = found.end() if found else 0
    if end == _LINE_MAX:  # too long for a normal request line, but not for some servers
        return _TARGET.match(text) is not None
    if end < len(text):
        return text[end] == _LINE_FEED and _VERSION.search(text, 0, end) is not None
    return _VERSION.search(text) is not None if ended else None
