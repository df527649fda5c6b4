"""Inspection of a client's bytes: the gate forwards what it has understood, and refuses everything else.

No I/O: the inspector takes bytes and returns the bytes to forward. The host in the client's bytes must be the host for
which the connection was opened. Mode ``tls`` requires a ClientHello with the connection's name. Mode ``http`` parses
every HTTP/1 request. Mode ``any`` accepts TLS, HTTP/1, HTTP/2 and the protocols of protocols.py. Mode ``opaque``
forwards all bytes.

After a ClientHello, or the first message of another protocol, further bytes are held until the server's answer proves
that the server speaks this protocol. Until then, a lax HTTP server could take them for a request to another host.

Known limit: the content of TLS is invisible, including a ClientHello after a HelloRetryRequest.
"""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final, Literal

from x07_sandbox.errors import UsageError
from x07_sandbox.network import protocols
from x07_sandbox.network.hosts import Host, parse_guest_host
from x07_sandbox.network.http_requests import PREFACE, WORD, FrameStream, RequestStream, escaped
from x07_sandbox.network.protocols import ClientHello, HelloReader, InspectionError, Opening, unknown

Mode = Literal["tls", "http", "any", "opaque"]
HELD_MAX: Final = 128 * 1024
"""Maximum bytes held until the server's answer. HTTP/2 clients may send 64 KiB of a body before it."""

_TLS_START: Final = b"\x16"
_TLS_ANSWER: Final = re.compile(rb"[\x15\x16]\x03")
_TLS_ANSWER_SIZE: Final = 2
_STARTS: Final = (protocols.SSH_START, PREFACE, *(row.start for row in protocols.CLIENT_FIRST))
# With one of these, a tolerant HTTP server takes a line of other bytes for a request: a version, or an absolute target.
_REQUEST: Final = re.compile(rb"(?i)[\t\x0b\x0c\x1c-\x20\x85\xa0]HTTP/[0-9]|(?:https?|ftp)://")
_METHOD: Final = re.compile(WORD)
_METHOD_MAX: Final = 64


class _NameCheck:
    """Checks the names that a client sends, and remembers the name in its ClientHello."""

    def __init__(self, host: Host, why_denied: Callable[[str], str | None]) -> None:
        self._host = host
        self._why_denied = why_denied
        self.tls_name = ""

    def check_host(self, host: Host) -> None:
        """Check the host of a request. Raises InspectionError if it is not allowed."""
        self._check("http:other-host", "the request", host)

    def check_hello(self, hello: ClientHello, *, need_name: bool) -> None:
        """Check the name in a ClientHello. Raises InspectionError if it is denied, or if it is needed but missing."""
        if hello.server_name is None:
            if need_name and isinstance(self._host, str):
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
        if host == self._host:
            return
        if isinstance(self._host, str) or not isinstance(host, str):
            why = f"{what} asks for {host}, but the connection was opened for {self._host}"
            raise InspectionError(rule, why, str(host))
        if (reason := self._why_denied(host)) is not None:
            raise InspectionError("name:denied", f"{what} asks for {host}: {reason}", host)


class Inspector:
    """Inspector of the client's bytes of one connection.

    host, port: the connection's destination; a name is in normal form. why_denied: returns why a name is denied, or
    None. It is called for the names that a client sends to a literal address.

    Bytes that `from_server` and `client_eof` release are returned by the next ``from_client(b"")``. Once an
    InspectionError was raised, every later call raises it again.
    """

    def __init__(self, mode: Mode, host: Host, port: int, why_denied: Callable[[str], str | None]) -> None:
        self._names = names = _NameCheck(host, why_denied)
        self._stage: _Raw | _Any | _Parser
        if mode == "tls":
            self._stage = _Tls(names, need_name=True)
        elif mode == "http":
            self._stage = RequestStream(names.check_host, port)
        elif mode == "any":
            self._stage = _Any(names, port)
        else:
            self._stage = _Raw()
        self._error: InspectionError | None = None

    @property
    def held(self) -> int:
        """Number of bytes held back: at most HELD_MAX plus one read."""
        return self._stage.held

    @property
    def decided(self) -> bool:
        """Whether the client's first message was accepted. Held bytes then wait for the server's answer."""
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
        with self._final():
            return self._stage.feed(data)

    def from_server(self, data: bytes) -> None:
        """Add bytes from the server. Raises InspectionError if they prove another protocol."""
        with self._final():
            self._stage.server(data)

    def client_eof(self) -> None:
        """Handle the end of the client's bytes. Raises InspectionError if an inspected message is incomplete."""
        with self._final():
            self._stage.eof()

    @contextlib.contextmanager
    def _final(self) -> Iterator[None]:
        """Remember an InspectionError, to raise it at the next call too, and limit the held bytes."""
        if self._error is not None:
            raise self._error
        try:
            yield
            self._check_held()
        except InspectionError as exc:
            self._error = exc
            raise

    def _check_held(self) -> None:
        if self._stage.held > HELD_MAX:
            raise InspectionError("first-bytes:too-large", "too much data precedes the server's answer")


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


class _Proved(ABC):
    """Base of the parsers that hold what follows the client's first message until the server has proved itself."""

    def __init__(self) -> None:
        self._held = bytearray()  # all bytes that are not released yet
        self._answer = b""
        self.decided = False
        self.watches_server = True

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def transparent(self) -> bool:
        return not self.watches_server and not self._held

    def feed(self, data: bytes) -> bytes:
        self._held += data
        size = len(self._held)
        if self.watches_server:
            size = 0 if self.decided else self._first_message()
            if _REQUEST.search(self._held, 0, size):
                raise unknown("the first message contains an HTTP request")
            self.decided |= size > 0
        out = bytes(self._held[:size])
        del self._held[:size]
        return out

    def server(self, data: bytes) -> None:
        if self.decided and self.watches_server:
            self._answer += data[: protocols.ANSWER_MAX - len(self._answer)]
            self.watches_server = not self._is_proof(self._answer)

    def eof(self) -> None:
        if self._held and not self.decided:
            raise InspectionError("first-bytes:incomplete", "the connection ends inside its first message")

    @abstractmethod
    def _first_message(self) -> int:
        """Return the size of the first message in the held bytes, or 0 if it is incomplete. Raises InspectionError."""

    @abstractmethod
    def _is_proof(self, answer: bytes) -> bool:
        """Return whether the server's first bytes prove the protocol. Raises InspectionError if they cannot."""


class _Tls(_Proved):
    """Parser of a connection that must start with a ClientHello."""

    def __init__(self, names: _NameCheck, *, need_name: bool) -> None:
        super().__init__()
        self._names = names
        self._need_name = need_name
        self._reader = HelloReader()

    def _first_message(self) -> int:
        hello = self._reader.feed(bytes(self._held[len(self._reader.held) :]))
        if hello is None:
            return 0
        self._names.check_hello(hello, need_name=self._need_name)
        return self._reader.size

    def _is_proof(self, answer: bytes) -> bool:
        if len(answer) < _TLS_ANSWER_SIZE:
            return False
        if not _TLS_ANSWER.match(answer):
            raise InspectionError("tls:not-tls", "the server did not answer the ClientHello with TLS")
        return True


class _Opened(_Proved):
    """Parser of a protocol whose client speaks first. following: what must follow the server's answer."""

    def __init__(self, opening: Opening) -> None:
        super().__init__()
        self._opening = opening
        self.following: Literal["tls", "any"] | None = None

    def take_held(self) -> bytes:
        """Remove and return the held bytes."""
        held = bytes(self._held)
        self._held.clear()
        return held

    def _first_message(self) -> int:
        return self._opening.first_message(bytes(self._held))

    def _is_proof(self, answer: bytes) -> bool:
        if self._opening.proof.match(answer):
            self.following = self._opening.after.get(answer[: self._opening.proof_max])
            return True
        if len(answer) >= self._opening.proof_max:
            raise unknown(f"the server's answer is not {self._opening.name}")
        return False


_Parser = _Proved | RequestStream | FrameStream


class _Any:
    """Parser of a connection whose protocol the first bytes of client and server show."""

    def __init__(self, names: _NameCheck, port: int) -> None:
        self._names = names
        self._port = port
        self._start = bytearray()
        self._greeting = b""
        self._stage: _Raw | _Parser | None = None

    @property
    def held(self) -> int:
        return len(self._start) + (self._stage.held if self._stage else 0)

    @property
    def decided(self) -> bool:
        waits = self._start.startswith(protocols.SSH_START) and b"\n" in self._start
        return waits if self._stage is None else self._stage.decided

    @property
    def transparent(self) -> bool:
        return self._stage is not None and self._stage.transparent

    @property
    def watches_server(self) -> bool:
        return self._stage is None or self._stage.watches_server

    def feed(self, data: bytes) -> bytes:
        self._start += data
        if self._stage is None and self._start:
            self._stage = self._choose()
        if self._stage is None:
            return b""
        start = bytes(self._start)
        self._start.clear()
        return self._stage.feed(start)

    def server(self, data: bytes) -> None:
        if self._stage is None:
            self._greeting += data[: protocols.ANSWER_MAX - len(self._greeting)]
            return
        self._stage.server(data)
        if isinstance(self._stage, _Opened) and self._stage.following:
            self._start += self._stage.take_held()
            self._stage = _Tls(self._names, need_name=False) if self._stage.following == "tls" else None

    def eof(self) -> None:
        if self._stage is not None:
            self._stage.eof()
        elif self._start:
            raise InspectionError("first-bytes:incomplete", "the connection ends inside its first message")

    def _choose(self) -> _Raw | _Parser | None:
        """Return the parser for the held bytes, or None while the protocol is not known. Raises InspectionError."""
        start = bytes(self._start)
        for row in protocols.SERVER_FIRST:
            if row.greeting.match(self._greeting):
                if row.client.match(start):
                    return _Raw()
                if len(start) >= row.client_max:
                    raise unknown(f"the server's first bytes are {row.name}, but the client's are not")
                return None
        if any(len(start) < len(known) and known.startswith(start) for known in _STARTS):
            return None
        if start.startswith(protocols.SSH_START):
            if len(start) > protocols.ANSWER_MAX or self._greeting:
                raise unknown("only the client's first bytes are SSH")
            return None
        return self._parser(start)

    def _parser(self, start: bytes) -> _Parser | None:
        """Return the parser for first bytes that need no greeting, or None if they may become HTTP/1."""
        if start.startswith(_TLS_START):
            return _Tls(self._names, need_name=False)
        for opening in protocols.CLIENT_FIRST:
            if start.startswith(opening.start):
                return _Opened(opening)
        if start.startswith(PREFACE):
            return FrameStream(self._names.check_host, self._port, self._greeting)
        method = _METHOD.match(start)
        if method is None or method.end() > _METHOD_MAX or start[method.end() :][:1] not in {b"", b" "}:
            raise unknown(f"the first bytes are not TLS, HTTP, {protocols.NAMES}")
        return RequestStream(self._names.check_host, self._port) if method.end() < len(start) else None
