"""The servers of the laboratory's internet, one process per network namespace; each contact is one line of the log.

Run by tests/lab/laboratory.py with one argument, a JSON object (see `main`). Prints "ready" once all servers listen.
Answers each line on standard input with "synced" once everything received before it is in the log. Ends at the end of
standard input, so also when its parent dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import resource
import socket
import ssl
import struct
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

DATA_MAX_CHARS: Final = 200
READS_LOGGED: Final = 20
"""Reads of one connection that are logged one by one; what comes later is summed up in one line."""
READ_BYTES: Final = 65_536
HEAD_MAX_BYTES: Final = 4_194_304
BODY_MAX_BYTES: Final = 67_108_864
HTTP_PORTS: Final = (80, 8000, 8080)
TLS_PORTS: Final = (443, 8443, 9443)
UDP_ECHO_PORTS: Final = (53, 123, 443, 9000)
DNS_ADDRESS: Final = "45.45.45.53"
SECRET_PORT: Final = 8600


def escaped(data: bytes) -> str:
    """Return the first bytes of *data* in printable ASCII."""
    return data[:DATA_MAX_CHARS].decode("latin-1").encode("unicode_escape").decode("ascii")[:DATA_MAX_CHARS]


def place(address: tuple[Any, ...]) -> str:
    """Return address and port as one string, an IPv6 address in brackets."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Log:
    """The log of contacts, to which several processes append."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, where: str, proto: str, event: str, data: bytes = b"", name: str = "", size: int = -1) -> None:
        """Append one line by one call, so that lines of two processes never mix. size: of *data* unless given."""
        line = {
            "at": time.monotonic(),
            "where": where,
            "proto": proto,
            "event": event,
            "data": escaped(data),
            "name": name.encode("unicode_escape").decode("ascii")[:300],
            "size": len(data) if size < 0 else size,
        }
        os.write(self._fd, json.dumps(line).encode() + b"\n")


# ------------------------------------------------------------------------------------------------------------ streams


class Connection:
    """One TCP connection; plain until `secure` is called, TLS afterwards."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: Log) -> None:
        self.log = log
        self.where = place(writer.get_extra_info("sockname"))
        self.transport = writer.transport
        self._reader, self._writer = reader, writer
        self._reads = 0
        self._unlogged: dict[str, int] = defaultdict(int)
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    async def receive(self) -> bytes:
        """Return received bytes, at least one; b"" means the peer has finished."""
        if self._tls is None:
            return await self._reader.read(READ_BYTES)
        while True:
            try:
                return self._tls.read(READ_BYTES)
            except ssl.SSLWantReadError:
                await self._exchange()
            except ssl.SSLZeroReturnError:
                return b""

    async def send(self, data: bytes) -> None:
        """Send all of *data*; wait while the peer does not read."""
        if self._tls is not None:
            self._tls.write(data)
            data = self._outgoing.read()
        self._writer.write(data)
        await self._writer.drain()
        await asyncio.sleep(0)  # a peer that reads fast never makes drain() wait, and other tasks need their turn

    async def secure(self, certificate: str) -> bool:
        """Log the name (SNI) in a ClientHello and do the handshake; log other bytes as bytes and return False."""
        names: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.set_alpn_protocols(["http/1.1"])
        context.sni_callback = lambda _tls, name, _context: names.append(name or "")
        tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        raw = b""
        try:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    raw += await self._exchange()
        except (ssl.SSLError, EOFError):
            if not names:
                self.note(raw, "tls")
            self._writer.write(self._outgoing.read())  # the alert
            return False
        finally:
            if names:
                self.log.write(self.where, "tls", "connect", name=names[0])
        self._tls = tls
        await self.send(b"")
        return True

    async def _exchange(self) -> bytes:
        self._writer.write(self._outgoing.read())
        await self._writer.drain()
        data = await self._reader.read(READ_BYTES)
        if data:
            self._incoming.write(data)
        elif self._incoming.eof:
            raise EOFError
        else:
            self._incoming.write_eof()
        return data

    def note(self, data: bytes, proto: str = "tcp") -> None:
        """Log received bytes: the first reads one by one, later ones as a sum."""
        if not data:
            return
        self._reads += 1
        if self._reads <= READS_LOGGED:
            self.log.write(self.where, proto, "bytes", data)
        else:
            self._unlogged[proto] += len(data)

    def close(self) -> None:
        """Send what is queued, then close the connection."""
        for proto, size in self._unlogged.items():
            self.log.write(self.where, proto, "bytes", size=size)
        if self._tls is not None and not self.transport.is_closing():
            with contextlib.suppress(ssl.SSLError):  # the peer's own close_notify is not waited for
                self._tls.unwrap()
            self._writer.write(self._outgoing.read())
        self._writer.close()


Handler = Callable[[Connection], Awaitable[None]]


# --------------------------------------------------------------------------------------------------------------- HTTP


class Http:
    """HTTP/1.1 on one connection. Lenient on purpose: the log shows ambiguous requests that a gate lets through."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._buffer = bytearray()

    async def serve(self) -> None:
        """Answer requests until the peer ends; log bytes that are no request."""
        try:
            while await self._request():
                pass
        finally:
            self._connection.note(bytes(self._buffer), "http")

    async def _more(self) -> bool:
        data = await self._connection.receive()
        self._buffer += data
        return bool(data)

    async def _until(self, pattern: bytes) -> bytes | None:
        """Return the bytes before *pattern* and drop the pattern; None, consuming nothing, if it does not arrive."""
        start = 0
        while (found := re.search(pattern, self._buffer[start:])) is None:
            start = max(0, len(self._buffer) - 4)
            if len(self._buffer) > HEAD_MAX_BYTES or not await self._more():
                return None
        taken = bytes(self._buffer[: start + found.start()])
        del self._buffer[: start + found.end()]
        return taken

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not await self._more():
                raise EOFError
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def _request(self) -> bool:
        """Read and answer one request; return whether another may follow."""
        while self._buffer.startswith((b"\r", b"\n")):
            del self._buffer[:1]
        head = await self._until(rb"\r?\n\r?\n")
        if head is None:
            return False
        line, *fields = re.split(rb"\r?\n", head)
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (field.partition(b":") for field in reversed(fields))
        }
        host = headers.get(b"host", b"").decode("latin-1")
        self._connection.log.write(self._connection.where, "http", "request", line, name=host)
        words = line.split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            await self._answer(b"400 Bad Request")
            return False
        length = headers.get(b"content-length", b"0")
        self._connection.note(await self._take(min(int(length), BODY_MAX_BYTES) if length.isdigit() else 0), "http")
        path = re.sub(rb"^[a-z]+://[^/]*", b"", words[1]) or b"/"
        if path == b"/upgrade" and headers.get(b"upgrade", b"").lower() == b"websocket":
            await self._upgraded()
            return False
        await (self._answer(b"200 OK", b"hello") if path == b"/" else self._answer(b"404 Not Found"))
        return headers.get(b"connection", b"").lower() != b"close" and words[2] != b"HTTP/1.0"

    async def _answer(self, status: bytes, body: bytes = b"") -> None:
        await self._connection.send(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    async def _upgraded(self) -> None:
        head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        await self._connection.send(head)
        data = bytes(self._buffer)
        self._buffer.clear()
        while data or (data := await self._connection.receive()):
            self._connection.note(data, "http")
            await self._connection.send(data)
            data = b""


# ---------------------------------------------------------------------------------------------------- other TCP servers


async def http(connection: Connection) -> None:
    """Serve HTTP/1.1."""
    await Http(connection).serve()


def https(certificate: str) -> Handler:
    """Serve HTTP/1.1 in TLS."""

    async def handle(connection: Connection) -> None:
        if await connection.secure(certificate):
            await Http(connection).serve()

    return handle


async def echo(connection: Connection) -> None:
    """Send back all input until the peer ends."""
    while data := await connection.receive():
        connection.note(data)
        await connection.send(data)


async def discard(connection: Connection) -> None:
    """Read all, answer nothing."""
    while data := await connection.receive():
        connection.note(data)


async def chargen(connection: Connection) -> None:
    """Send without end; leave the peer's bytes unread."""
    block = bytes(range(32, 127)) * 512
    while True:
        await connection.send(block)


def banner(text: bytes) -> Handler:
    """Send first, then read."""

    async def handle(connection: Connection) -> None:
        await connection.send(text)
        await discard(connection)

    return handle


async def serve_tcp(log: Log, addresses: list[str], port: int, handler: Handler) -> None:
    """Listen on *port* of all *addresses*."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, log)
        log.write(connection.where, "tcp", "connect")
        try:
            await handler(connection)
        except (OSError, EOFError):
            pass  # the peer left, or broke its protocol (ssl.SSLError is an OSError)
        except Exception:  # noqa: BLE001 - whatever a hostile peer sends, the others are served
            traceback.print_exc()
        finally:
            connection.close()

    await asyncio.start_server(serve, addresses, port, backlog=1024)


# ---------------------------------------------------------------------------------------------------------------- UDP


class Udp(asyncio.DatagramProtocol):
    """Echo on one address and port."""

    def __init__(self, log: Log, where: str) -> None:
        self._log, self._where = log, where

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override] # it is one
        """Keep the transport for answers."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        """Log and send back."""
        self._log.write(self._where, "udp", "bytes", data)
        self._transport.sendto(data, addr)


async def serve_udp(log: Log, address: str, port: int) -> None:
    """Echo on one port."""
    where = place((address, port))
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: Udp(log, where), (address, port))


# ---------------------------------------------------------------------------------------------------------------- DNS


class Zone:
    """All names of the internet, in a file that a test may replace at any time; see Laboratory.names."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._read: tuple[int, int] = (0, 0)
        self._entries: dict[str, dict[str, Any]] = {}
        self._asked: dict[tuple[int, str], int] = defaultdict(int)

    def answer(self, name: str, kind: str) -> dict[str, Any] | None:
        """Return the script's next answer to a question of this kind; the last one repeats. None: no such name."""
        status = self._path.stat()
        if (status.st_ino, status.st_mtime_ns) != self._read:
            self._read = (status.st_ino, status.st_mtime_ns)
            self._entries = json.loads(self._path.read_bytes())
        entry = self._entries.get(name)
        while entry is None and "." in name:
            name = name.partition(".")[2]
            entry = self._entries.get(f"*.{name}")
        if entry is None:
            return None
        key = (entry["serial"], kind)
        answers: list[dict[str, Any]] = entry["answers"]
        at = min(self._asked[key], len(answers) - 1)
        self._asked[key] += 1
        return answers[at]


class Dns(asyncio.DatagramProtocol):
    """The one DNS server: logs every question, then answers from the zone; an unknown name is NXDOMAIN."""

    def __init__(self, log: Log, zone: Zone) -> None:
        self._log, self._zone = log, zone

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override] # it is one
        """Keep the transport for answers."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        """Answer, unless the script is silent."""
        response = self.reply(data)
        if response is not None:
            self._transport.sendto(response, addr)

    def reply(self, wire: bytes) -> bytes | None:
        """Return the answer to a query; None for bytes that are no query, or if the script is silent."""
        try:
            query = dns.message.from_wire(wire)
            question = query.question[0]
            response = dns.message.make_response(query)
        except (dns.exception.DNSException, IndexError, ValueError, struct.error):
            self._log.write(f"{DNS_ADDRESS}:53", "dns", "bytes", wire)
            return None
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        self._log.write(f"{DNS_ADDRESS}:53", "dns", "query", kind.encode(), name=name)
        rcode = self._fill(response, question.name, kind)
        if rcode == "SILENT":
            return None
        response.set_rcode(dns.rcode.from_text(rcode))
        response.flags |= dns.flags.RA  # glibc takes an empty answer without it for one of a lame server
        return response.to_wire()

    def _fill(self, response: dns.message.Message, name: dns.name.Name, kind: str) -> str:
        """Add the answers, following CNAMEs; return the response code."""
        for _ in range(16):
            answer = self._zone.answer(name.to_text(omit_final_dot=True).lower(), kind)
            if answer is None:
                return "NXDOMAIN"
            if answer["rcode"] != "NOERROR":
                return str(answer["rcode"])
            if answer["cname"] is None:
                wanted = [a for a in answer["addresses"] if kind == ("AAAA" if ":" in a else "A")]
                if wanted:
                    response.answer.append(dns.rrset.from_text_list(name, answer["ttl"], "IN", kind, wanted))
                return "NOERROR"
            response.answer.append(dns.rrset.from_text(name, answer["ttl"], "IN", "CNAME", answer["cname"] + "."))
            name = dns.name.from_text(answer["cname"])
        return "NOERROR"


# ------------------------------------------------------------------------------------------------------------- packets

_DROP, _ACCEPT = 18, 19
# Classic BPF (linux/filter.h): what came in by IPv4 or IPv6, of TCP only SYN without ACK. Offset 0 is the IP header.
_FILTER: Final = (
    (0x30, 0, 0, 0xFFFFF004),  # 0: A = type of packet (SKF_AD_PKTTYPE)
    (0x15, _DROP - 2, 0, 4),  # 1: PACKET_OUTGOING
    (0x30, 0, 0, 0),  # 2: A = first byte
    (0x74, 0, 0, 4),  # 3: A >>= 4
    (0x15, 0, 6, 4),  # 4: IPv4, else 11
    (0x30, 0, 0, 9),  # 5: A = protocol
    (0x15, 0, _ACCEPT - 7, 6),  # 6: TCP
    (0xB1, 0, 0, 0),  # 7: X = length of the header
    (0x50, 0, 0, 13),  # 8: A = flags
    (0x54, 0, 0, 0x12),  # 9: A &= SYN | ACK
    (0x15, _ACCEPT - 11, _DROP - 11, 2),  # 10: SYN alone
    (0x15, 0, _DROP - 12, 6),  # 11: IPv6
    (0x30, 0, 0, 6),  # 12: A = next header
    (0x15, 0, _ACCEPT - 14, 6),  # 13: TCP
    (0x30, 0, 0, 53),  # 14: A = flags
    (0x54, 0, 0, 0x12),  # 15
    (0x15, _ACCEPT - 17, _DROP - 17, 2),  # 16
    (0x06, 0, 0, 0),  # 17: never reached
    (0x06, 0, 0, 0),  # 18: drop
    (0x06, 0, 0, 512),  # 19: take its first 512 bytes
)
_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}


def watch_packets(log: Log, device: str) -> None:
    """Log each packet for any address, even if no server listens there."""
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
    code = b"".join(struct.pack("=HBBI", *row) for row in _FILTER)
    buffer = ctypes.create_string_buffer(code, len(code))
    sniffer.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", len(_FILTER), ctypes.addressof(buffer)))
    sniffer.setsockopt(socket.SOL_SOCKET, 33, 8_388_608)  # SO_RCVBUFFORCE
    sniffer.bind((device, 3))  # ETH_P_ALL
    asyncio.get_running_loop().add_reader(sniffer, _log_packets, log, sniffer)


def _log_packets(log: Log, sniffer: socket.socket) -> None:
    for _ in range(64):  # then other tasks have their turn
        try:
            packet = sniffer.recv(512)
        except BlockingIOError:
            return
        version = packet[0] >> 4
        header = (packet[0] & 15) * 4 if version == 4 else 40
        number = packet[9] if version == 4 else packet[6]
        target = socket.inet_ntop(socket.AF_INET, packet[16:20]) if version == 4 else ""
        target = target or socket.inet_ntop(socket.AF_INET6, packet[24:40])
        payload = packet[header:]
        # The kernels of both namespaces find each other by these: neighbours, routers and groups.
        if number in {0, 2} or (
            number == 58 and payload[:1] and payload[0] in {130, 131, 132, 133, 134, 135, 136, 143}
        ):
            continue
        proto = _PROTOCOLS.get(number, f"ip-{number}")
        port = int.from_bytes(payload[2:4]) if number in {6, 17} else 0
        log.write(place((target, port)), proto, "packet", payload[8:] if number == 17 else b"")


# --------------------------------------------------------------------------------------------------------------- main


async def internet(log: Log, setting: dict[str, Any]) -> None:
    """Start all servers of the outside."""
    addresses: list[str] = setting["addresses"]
    server = Dns(log, Zone(setting["zone"]))
    handlers: dict[int, Handler] = {
        **dict.fromkeys(HTTP_PORTS, http),
        **dict.fromkeys(TLS_PORTS, https(setting["certificate"])),
        **dict.fromkeys((22, 2222), banner(b"SSH-2.0-lab\r\n")),
        7: echo,
        9: discard,
        19: chargen,
    }
    for port, handler in handlers.items():
        await serve_tcp(log, addresses, port, handler)
    await serve_tcp(log, [DNS_ADDRESS], 53, discard)
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, (DNS_ADDRESS, 53))
    for address in addresses:
        for port in UDP_ECHO_PORTS:
            if (address, port) != (DNS_ADDRESS, 53):
                await serve_udp(log, address, port)
    watch_packets(log, setting["device"])


async def host_secrets(log: Log, setting: dict[str, Any]) -> None:
    """Start the servers that only the host may reach: on its loopback and its own public address."""
    addresses: list[str] = setting["addresses"]
    await serve_tcp(log, addresses, SECRET_PORT, banner(b"host secret\r\n"))
    for address in addresses:
        await serve_udp(log, address, SECRET_PORT)


async def run(setting: dict[str, Any]) -> None:
    """Serve until the end of standard input."""
    log = Log(setting["log"])
    await (internet if setting["role"] == "internet" else host_secrets)(log, setting)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    wanted: asyncio.Queue[None] = asyncio.Queue()

    def read() -> None:
        lines = os.read(0, 4096)
        if not lines:
            ended.set()
        for _ in range(lines.count(b"\n")):
            wanted.put_nowait(None)

    async def sync() -> None:
        while True:
            await wanted.get()
            for _ in range(20):  # each is one pass over all sockets: accepted, read, and read again
                await asyncio.sleep(0)
            os.write(1, b"synced\n")

    task = asyncio.create_task(sync())
    loop.add_reader(0, read)
    os.write(1, b"ready\n")
    await ended.wait()
    task.cancel()


def main() -> None:
    """Start the servers of a role (internet or host). Both: log, addresses; internet: zone, certificate, device."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536) if most > 0 else 65_536, most))
    # Open connections do not matter any more: no waiting for their tasks.
    loop = asyncio.new_event_loop()
    loop.run_until_complete(run(json.loads(sys.argv[1])))
    os._exit(0)


if __name__ == "__main__":
    main()
