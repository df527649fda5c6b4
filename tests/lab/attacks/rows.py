"""The table of attacks: what each one tries, and exactly which contacts it may cause.

A row's id starts with the number of a regression attack (facts 7.5), or with "p" and the number of a known bypass
(peers E); other ids are attacks of our own. Expected contacts are texts in the form that `described` gives.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from tests.lab.laboratory import GATE_ADDRESS, GATE_ADDRESS_6, LAN, METADATA, OTHER_SITE, SITE, SITE_6, Answer

if TYPE_CHECKING:
    from tests.lab.laboratory import Contact, Script

POLICY: Final = {"code": 5}
"""The gate refused the request by its rules."""
RESET_BY_POLICY: Final = {"code": 0, "reset": 5}
"""The gate connected, then refused the first bytes."""
OPENED: Final = {"code": 0}
CLOSED: Final = {"closed": True}
OUTSIDE: Final = [[SITE, 80], [OTHER_SITE, 443], [METADATA, 80], [LAN, 80], [GATE_ADDRESS, 8600], ["45.45.45.53", 53]]
"""Targets outside that no test policy allows for these attacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One attack.

    id: test id. tried: the attack in one sentence. do, words: the command for the guest. expected: the contacts it may
    cause. answer: what the guest must report, which shows that it carried the attack out. lists: hosts and ports for
    the policy. names: names for the laboratory's DNS. extra_packets: packets allowed beyond those of the contacts.
    """

    id: str
    tried: str
    do: str
    words: dict[str, Any]
    expected: tuple[str, ...] = ()
    answer: dict[str, Any] = field(default_factory=dict)
    lists: Mapping[str, Sequence[int]] = field(default_factory=dict)
    names: Mapping[str, Script] = field(default_factory=dict)
    extra_packets: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------- what is expected


def described(contacts: Sequence[Contact]) -> list[str]:
    """Return contacts as texts; consecutive bytes for one place are joined."""
    found: list[str] = []
    for contact in contacts:
        if contact.event == "query":
            found.append(f"dns {contact.name} {contact.data}")
        elif contact.event == "connect":
            found.append(f"{contact.proto} {contact.where} {contact.name}".rstrip())
        elif contact.event == "request":
            found.append(f"http {contact.where} {contact.name} {contact.data}")
        else:
            start = f"{contact.proto} {contact.where} bytes "
            if found and found[-1].startswith(start):
                found[-1] += contact.data
            else:
                found.append(start + contact.data)
    return sorted(found)


def packets_of(expected: Sequence[str]) -> Counter[str]:
    """Return the packets that these contacts consist of."""
    packets: Counter[str] = Counter()
    for one in expected:
        proto, where = one.split()[:2]
        if proto == "dns":
            packets["udp 45.45.45.53:53"] += 1
        elif proto == "tcp" and " bytes " not in one:
            packets[f"tcp {where}"] += 1
        elif proto == "udp":
            packets[f"udp {where}"] += 1
    return packets


def looked_up(name: str) -> tuple[str, ...]:
    """Return the contacts of one look-up."""
    return (f"dns {name} A", f"dns {name} AAAA")


def reached(name: str, port: int, *more: str, site: str = SITE) -> tuple[str, ...]:
    """Return the contacts of a look-up, a connection, and *more*."""
    return (*looked_up(name), f"tcp {site}:{port}", *more)


def got(
    name: str, port: int = 80, *, site: str = SITE, line: str = "GET / HTTP/1.1", host: str = ""
) -> tuple[str, ...]:
    """Return the contacts of one allowed HTTP request."""
    return reached(name, port, f"http {site}:{port} {host or name} {line}", site=site)


# ------------------------------------------------------------------------------------------------------- what is said


REDIS_PING: Final = b"*1\r\n$4\r\nPING\r\n"
PING_SEEN: Final = r"*1\r\n$4\r\nPING\r\n"


def request(host: str, line: str = "GET / HTTP/1.1", *fields: str, body: bytes = b"") -> bytes:
    """Return an HTTP/1 request."""
    return "\r\n".join([line, f"Host: {host}", *fields, "", ""]).encode("latin-1") + body


def block(size: int, data: bytes) -> bytes:
    """Return *data* with its length before it."""
    return len(data).to_bytes(size) + data


def server_names(*names: str | bytes) -> bytes:
    """Return a server_name extension."""
    entries = b"".join(b"\0" + block(2, name.encode() if isinstance(name, str) else name) for name in names)
    return struct.pack(">H", 0) + block(2, block(2, entries))


def hello(*extensions: bytes) -> bytes:
    """Return a ClientHello message with these extensions."""
    groups = struct.pack(">H", 10) + block(2, block(2, b"\0\x1d\0\x17"))
    points = struct.pack(">H", 11) + block(2, block(1, b"\0"))
    signatures = struct.pack(">H", 13) + block(2, block(2, b"\x04\x03\x08\x04\x04\x01"))
    ciphers = block(2, b"\xc0\x2b\xc0\x2f\xc0\x30")
    body = b"\x03\x03" + bytes(range(32)) + block(1, b"") + ciphers + block(1, b"\0")
    body += block(2, b"".join([*extensions, groups, points, signatures]))
    return b"\x01" + block(3, body)


def records(message: bytes, size: int = 1 << 14) -> list[bytes]:
    """Split a message into TLS records of at most *size* bytes."""
    return [b"\x16\x03\x01" + block(2, message[at : at + size]) for at in range(0, len(message), size)]


def tls(*names: str | bytes) -> bytes:
    """Return a ClientHello with one server_name extension for each name."""
    return b"".join(records(hello(*[server_names(name) for name in names])))


GREASE_ECH: Final = struct.pack(">H", 0xFE0D) + block(
    2, b"\0\0\x01\0\x01\x42" + block(2, bytes(range(32))) + block(2, bytes(144))
)


def dns_query(name: bytes, kind: int, *, questions: int = 1, of_class: int = 1) -> bytes:
    """Return a DNS query in wire format. name: labels in wire format, without the final zero."""
    question = name + b"\0" + struct.pack(">HH", kind, of_class)
    return struct.pack(">HHHHHH", 0x2A2A, 0x0100, questions, 0, 0, 0) + question * questions


def labels(name: str) -> bytes:
    """Return a name in DNS wire format, without the final zero."""
    return b"".join(block(1, label.encode("latin-1")) for label in name.split("."))


# ------------------------------------------------------------------------------------------------- rows by frames


def ask(  # noqa: PLR0913 - a row in one call
    number: str,
    tried: str,
    host: str | bytes,
    port: int = 80,
    *say: bytes | float,
    expected: tuple[str, ...] = (),
    answer: dict[str, Any] | None = None,
    lists: Mapping[str, Sequence[int]] | None = None,
    names: Mapping[str, Script] | None = None,
    extra_packets: tuple[str, ...] = (),
    **words: Any,  # noqa: ANN401 - an order's
) -> Row:
    """Return a row that asks the gate for a host; by default nothing is reached and the gate refuses."""
    data = host.encode() if isinstance(host, str) else host
    said = [one.hex() if isinstance(one, bytes) else one for one in say]
    return Row(
        id=number,
        tried=tried,
        do="exchange",
        words={"host": data.hex(), "port": port, "say": said, **words},
        expected=expected,
        answer=answer if answer is not None else POLICY if not expected else OPENED,
        lists=lists or {},
        names=names or {},
        extra_packets=extra_packets,
    )


def listed(
    number: str,
    tried: str,
    port: int,
    *say: bytes | float,
    allowed: tuple[str, ...] = (),
    host: str = "",
    **words: Any,  # noqa: ANN401 - an order's
) -> Row:
    """Return a row that asks for a listed name of its own, then sends what it may not send.

    "{N}" in *say* and *allowed* stands for that name. allowed: contacts beyond the connection; without any, the gate
    must reset the connection.
    """
    name = own_name(number)
    said = [one.replace(b"{N}", name.encode()) if isinstance(one, bytes) else one for one in say]
    answer = words.pop("answer", OPENED if allowed else RESET_BY_POLICY)
    words.setdefault("wait_s", 5.0 if "reset" in answer else 0.1)
    more = tuple(one.replace("{N}", name) for one in allowed)
    return ask(
        number,
        tried,
        host or name,
        port,
        *said,
        expected=reached(name, port, *more),
        answer=answer,
        lists={name: [port]},
        names={name: [SITE]},
        **words,
    )


def own_name(number: str) -> str:
    """Return a name that only one row uses."""
    return f"a{number.replace('.', '-')}.lab.example".lower()


def passing(number: str, tried: str, *say: bytes | float, line: str = "GET / HTTP/1.1", more: str = "") -> Row:
    """Return a row whose requests to a listed name pass, as one request with this line. more: a further contact."""
    allowed = (f"http {SITE}:80 {{N}} {line}", *([more] if more else ()))
    return listed(number, tried, 80, *say, 1.0, allowed=allowed)


def cut_off(number: str, tried: str, *say: bytes | float, line: str = "GET / HTTP/1.1") -> Row:
    """Return a row whose first request to a listed name passes, and whose further bytes reset the connection."""
    return listed(number, tried, 80, *say, allowed=(f"http {SITE}:80 {{N}} {line}",), answer=RESET_BY_POLICY)


def permitted(number: str, tried: str, name: str, script: Script, *, dribble: bool = False) -> Row:
    """Return a row that requests a page of a listed name, which is reached."""
    return ask(
        number,
        tried,
        name,
        80,
        request(name),
        1.0,
        expected=got(name),
        lists={name: [80]},
        names={name: script},
        dribble=dribble,
    )


def resolving(number: str, tried: str, *addresses: str, expected: tuple[str, ...] = (), port: int = 8600) -> Row:
    """Return a row for a listed name with bad addresses: it is looked up, never dialled."""
    name = own_name(number)
    return ask(
        number,
        tried,
        name,
        port,
        expected=(*looked_up(name), *expected),
        answer=POLICY,
        lists={name: [port]},
        names={name: list(addresses)},
    )


EVIL: Final = "evil.lab.example"
EVIL_NAMES: Final[Mapping[str, Script]] = {EVIL: [OTHER_SITE], "evil.test": [OTHER_SITE], "*.evil.test": [OTHER_SITE]}
HTTP_EVIL: Final = request(EVIL)


def literals(number: str, tried: str, hosts: Sequence[str], port: int = 8600) -> list[Row]:
    """Return a row for each of these addresses, which must all be refused."""
    return [ask(f"{number}-{host.replace(':', '_')}", tried, host, port) for host in hosts]


NAME_ROWS: Final = [
    ask("8", "A name that nothing lists is asked for.", EVIL, names=EVIL_NAMES),
    ask("10-longest", "A host has the 255 bytes that fit, and is no name.", b"a" * 255),
    *[
        ask(f"11-{word}", f"The host has {what} in it.", b"a11.lab.example" + bad, lists={"a11.lab.example": [80]})
        for word, what, bad in (
            ("nul", "a NUL byte", b"\0.evil.test"),
            ("crlf", "a line break", b"\r\nevil.test"),
            ("at", "a user's part", b"@evil.test"),
            ("colon", "a port", b":80"),
            ("two-dots", "two final dots", b".."),
        )
    ],
    ask("12", "The host is no text.", b"a12\xff\xfe.lab.example"),
    ask("13-port", "The port is 0.", "a13.lab.example", 0, lists={"a13.lab.example": [80]}),
    permitted("21", "A frame is sent byte by byte.", "a21.lab.example", [SITE], dribble=True),
    listed(
        "24",
        "A listed name is requested in capitals and with a final dot.",
        80,
        request("A24.LAB.EXAMPLE."),
        1.0,
        allowed=(f"http {SITE}:80 A24.LAB.EXAMPLE. GET / HTTP/1.1",),
        host="A24.LAB.EXAMPLE.",
    ),
    ask("25-suffix", "The listed name is the start of another one.", "a25.lab.example.evil.test", names=EVIL_NAMES),
    ask("25-prefix", "The listed name is the end of another one.", "xa25.lab.example", lists={"a25.lab.example": [80]}),
    ask("26", "The name that a wildcard is below.", "wild.lab.example", lists={"*.wild.lab.example": [80, 443]}),
    ask("27", "The wildcard itself, as a name.", "*.wild.lab.example"),
    *[
        ask(f"28-{host}", "A number that some programs read as the loopback address.", host, 8600)
        for host in ("127.1", "0x7f.1", "2130706433", "017700000001", "0", "0177.0.0.1", "127.0.0.1.", "0x7f000001")
    ],
    *[
        ask(f"29-{word}", f"The host is written in {what}.", host.encode() if isinstance(host, str) else host, 8600)
        for word, what, host in (
            ("full-width", "full-width digits", "\uff11\uff12\uff17.0.0.1"),
            ("circled", "circled digits", "\u2460\u2461\u2466.0.0.1"),
            ("ideographic-stop", "another kind of dots", "a24\u3002lab\u3002example"),
            ("homograph", "a Cyrillic letter", "\u0430pi.lab.example"),
        )
    ],
    resolving("30-loopback", "A listed name resolves to the host's loopback.", "127.0.0.1"),
    resolving("30-private", "A listed name resolves to a private network.", "10.7.7.7", port=80),
    resolving("30-metadata", "A listed name resolves to the cloud's metadata service.", METADATA, port=80),
    resolving("31-mapped", "A listed name resolves to an IPv4 address in an IPv6 one.", "::ffff:127.0.0.1"),
    resolving("31-nat64", "A listed name resolves to a translated address of the metadata.", "64:ff9b::a9fe:a9fe"),
    resolving("32", "A listed name resolves to the host's own public address.", GATE_ADDRESS),
    resolving("32-6", "A listed name resolves to the host's own public IPv6 address.", GATE_ADDRESS_6),
    resolving(
        "31-nat64-64",
        "A listed name resolves to the metadata service, for a translator with a prefix of 64 bits.",
        "2a0f:64:0:1:a9:fea9:fe00:0",
        expected=looked_up("ipv4only.arpa")[1:],  # the one question about this network's translators
    ),
    *[
        ask(f"33-{host.rstrip('.')}", "A name that means something only here.", host, 8600)
        for host in ("localhost", "LOCALHOST.", "x.localhost", "x.local", "printer.internal", "router", "x.home.arpa")
    ],
    ask(
        "33-hosts-file",
        "A listed name has a private address in the host's /etc/hosts.",
        "hosts-file.example",
        80,
        answer=POLICY,
        lists={"hosts-file.example": [80]},
    ),
    ask(
        "33-hosts-file-public",
        "A listed name has a public address in the host's /etc/hosts, which is used.",
        "public.hosts-file.example",
        80,
        request("public.hosts-file.example"),
        1.0,
        expected=got("public.hosts-file.example")[2:],
        lists={"public.hosts-file.example": [80]},
    ),
    ask(
        "33-search",
        "A listed name exists only below a search domain of the host.",
        "only.search.example",
        80,
        expected=looked_up("only.search.example"),
        answer={"code": 7},
        lists={"only.search.example": [80]},
    ),
    permitted(
        "34", "A listed name has a private address and a public one.", "a34.lab.example", [LAN, SITE, "10.7.7.7"]
    ),
    permitted(
        "36-public",
        "A listed name is an alias of a public name that is not listed.",
        "a36.lab.example",
        Answer(cname="unlisted-public.example"),
    ),
    ask(
        "36-private",
        "A listed name is an alias of an alias of a private address.",
        "a36p.lab.example",
        80,
        expected=looked_up("a36p.lab.example"),
        answer=POLICY,
        lists={"a36p.lab.example": [80]},
        names={
            "a36p.lab.example": Answer(cname="a36q.lab.example"),
            "a36q.lab.example": Answer(cname="x.private.example"),
        },
    ),
]
LITERAL_ROWS: Final = [
    ask(
        "38-listed",
        "An address of a listed network is reached, and no other.",
        SITE,
        7,
        REDIS_PING,
        1.0,
        expected=(f"tcp {SITE}:7", f"tcp {SITE}:7 bytes {PING_SEEN}"),
        lists={"46.46.46.46/31": [7, 8443], "0.0.0.0/0": [8600], "::/0": [8600]},
    ),
    ask("38", "The neighbour of a listed network.", "46.46.46.48", 7),
    ask("39", "Another port of a listed address.", SITE, 9),
    ask("40", "The address of a listed name, as an address.", SITE, 8080, lists={"a40.lab.example": [8080]}),
    *literals(
        "41",
        "An address that is always denied, although the policy lists all addresses.",
        [
            *("198.18.0.16", "0.0.0.0", "255.255.255.255", "224.0.0.1", "100.100.100.200", "168.63.129.16"),  # noqa: S104
            *("127.0.0.1", "169.254.169.254", LAN, "10.7.7.7", GATE_ADDRESS, "192.0.2.1", "240.0.0.1"),
            *("::1", "::", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "fe80::1", "fd00:ec2::254"),
            *("ff02::1", "fec0::1", "::127.0.0.1", GATE_ADDRESS_6),
        ],
    ),
    ask("41-zone", "A link-local address with a zone.", "fe80::1%wan", 8600),
]
DNS_ROWS: Final = [
    ask("43-53", "DNS over TCP to a server of our choice.", "45.45.45.53", 53),
    ask("43-53-udp", "DNS over UDP to a server of our choice.", "45.45.45.53", 53, udp=True),
]
TLS_ROWS: Final = [
    listed("46", "The hello names another server than the connection is for.", 443, tls("a24.lab.example")),
    listed("47", "The hello names no server.", 443, tls()),
    listed(
        "48-names",
        "The hello has two names in one extension.",
        443,
        records(hello(server_names("a48-names.lab.example", EVIL)))[0],
    ),
    listed(
        "48-extensions", "The hello has two extensions with a name each.", 443, tls(EVIL, "a48-extensions.lab.example")
    ),
    listed("49", "The hello names an address.", 443, tls(SITE)),
    listed(
        "50",
        "The hello names the server in capitals.",
        443,
        tls("A50.LAB.EXAMPLE"),
        1.0,
        allowed=(f"tls {SITE}:443 A50.LAB.EXAMPLE",),
    ),
    listed(
        "51",
        "The hello is sent in records of one byte, over time.",
        443,
        *[
            part
            for piece in (hello(server_names("a51.lab.example")),)
            for at, record in enumerate(records(piece, 1))
            for part in ((record, 0.005) if at % 20 == 0 else (record,))
        ],
        1.0,
        allowed=(f"tls {SITE}:443 a51.lab.example",),
    ),
    listed(
        "51-other",
        "A hello with another name is sent in records of one byte.",
        443,
        b"".join(records(hello(server_names(EVIL)), 1)),
    ),
    listed("53", "Another protocol on a port of TLS.", 443, b"SSH-2.0-attack\r\n"),
    listed(
        "p4",
        "A tunnel is requested on a TLS port, with another name inside.",
        443,
        b"CONNECT {N}:443 HTTP/1.1\r\n\r\n" + tls(EVIL),
    ),
    ask("p3", "A listed name is in the hello, another address is dialled.", OTHER_SITE, 443, tls("a24.lab.example")),
    listed(
        "p6-grease",
        "The hello has an encrypted hello inside, and its outer name is the listed one.",
        443,
        b"".join(records(hello(server_names("ap6-grease.lab.example"), GREASE_ECH))),
        1.0,
        allowed=(f"tls {SITE}:443 ap6-grease.lab.example",),
    ),
    listed(
        "p25-endless",
        "A hello never ends, to fill the gate's buffer.",
        443,
        b"".join(records(b"\x01\xff\xff\xff" + bytes(80_000))),
    ),
    listed("p25-records", "A hello in empty records never ends.", 443, b"\x16\x03\x01\0\0" * 20_000),
    listed("p7-nul", "The hello's name goes on behind a NUL byte.", 443, tls(b"ap7-nul.lab.example\0.evil.test")),
    ask(
        "p22-literal",
        "A denied name is requested from a listed address.",
        SITE,
        8443,
        tls("denied.lab.example"),
        expected=(f"tcp {SITE}:8443",),
        answer=RESET_BY_POLICY,
    ),
]
WEBSOCKET: Final = ("Connection: Upgrade", "Upgrade: websocket")
HTTP_ROWS: Final = [
    listed("54", "The request is for another host.", 80, HTTP_EVIL),
    listed("55", "Two requests in one piece, the second for another host.", 80, request("{N}") + HTTP_EVIL),
    cut_off(
        "55-unanswered",
        "A second request for another host, before the first one's answer.",
        request("{N}"),
        HTTP_EVIL,
    ),
    cut_off("p9", "A second request for another host, after the first one's answer.", request("{N}"), 1.0, HTTP_EVIL),
    listed(
        "56",
        "The length of the body is stated twice, differently.",
        80,
        request(
            "{N}", "POST / HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + HTTP_EVIL
        ),
    ),
    listed(
        "57",
        "The length of the body is stated twice.",
        80,
        request("{N}", "POST / HTTP/1.1", "Content-Length: 0", "Content-Length: 50", body=HTTP_EVIL),
    ),
    listed(
        "58-space",
        "There is a space before a colon.",
        80,
        b"GET / HTTP/1.1\r\nHost: {N}\r\nHost : evil.lab.example\r\n\r\n",
    ),
    listed("58-bare-lf", "Lines end in LF alone.", 80, b"GET / HTTP/1.1\nHost: {N}\n\n"),
    listed("58-two-hosts", "There are two hosts.", 80, request("{N}", "GET / HTTP/1.1", f"Host: {EVIL}")),
    listed("59", "The target names another host than Host.", 80, request("{N}", f"GET http://{EVIL}/ HTTP/1.1")),
    passing(
        "59-same",
        "The target names the same host as Host, and is rewritten to a path.",
        request("{N}", "GET http://{N}/ HTTP/1.1"),
    ),
    listed("60", "A tunnel is asked for.", 80, request("{N}", f"CONNECT {EVIL}:443 HTTP/1.1")),
    listed("61-preface", "HTTP/2 without TLS begins.", 80, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
    passing(
        "61-upgrade",
        "An upgrade to HTTP/2 is requested.",
        request(
            "{N}",
            "GET / HTTP/1.1",
            "Connection: Upgrade, HTTP2-Settings",
            "Upgrade: h2c",
            "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        ),
    ),
    passing(
        "61-other",
        "An upgrade to another protocol is requested.",
        request("{N}", "GET /upgrade HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket, h2c"),
        line="GET /upgrade HTTP/1.1",
    ),
    *[
        listed(f"any-{word}", tried, 9, *said)
        for word, tried, said in (
            (
                "newlines",
                "8 KiB of line breaks precede a tunnel.",
                (b"\r\n" * 4096, 0.2, b"CONNECT 46.46.46.47:80 HTTP/1.1\r\n\r\n"),
            ),
            ("http-0.9", "A request of HTTP/0.9 without a line break.", (b"GET http://46.46.46.47/", 0.2, b"\n")),
            ("unknown", "An unknown protocol.", (b"hello\n",)),
        )
    ],
    listed("62", "A header of a mebibyte.", 80, b"GET / HTTP/1.1\r\nHost: {N}\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n"),
    *[
        cut_off(
            f"63-{word}",
            tried,
            request("{N}", "POST /echo HTTP/1.1", "Transfer-Encoding: chunked"),
            0.1,
            body,
            line="POST /echo HTTP/1.1",
        )
        for word, tried, body in (
            ("extension", "A request is hidden in a chunk's extension.", b"2;\nxx\r\n40\r\n0\r\n\r\n" + HTTP_EVIL),
            ("trailer", "A trailer names another host.", b"2\r\nab\r\n0\r\nHost: evil.lab.example\r\n\r\n"),
            ("size", "Servers read a chunk's size in two ways.", b"0x2\r\nab\r\n0\r\n\r\n" + HTTP_EVIL),
            ("after", "A request for another host is behind a chunked body.", b"2\r\nab\r\n0\r\n\r\n" + HTTP_EVIL),
        )
    ],
    cut_off(
        "64-refused",
        "An upgrade that the server refuses, then a request for another host.",
        request("{N}", "GET /refuse-upgrade HTTP/1.1", *WEBSOCKET),
        1.0,
        HTTP_EVIL,
        line="GET /refuse-upgrade HTTP/1.1",
    ),
    cut_off(
        "64-at-once",
        "A request for another host directly after an upgrade that is not answered yet.",
        request("{N}", "GET /refuse-upgrade HTTP/1.1", *WEBSOCKET) + HTTP_EVIL,
        1.0,
        line="GET /refuse-upgrade HTTP/1.1",
    ),
    passing(
        "64-accepted",
        "An upgrade that the server accepts: later bytes reach only that server.",
        request("{N}", "GET /upgrade HTTP/1.1", *WEBSOCKET),
        1.0,
        b"frames",
        line="GET /upgrade HTTP/1.1",
        more=f"http {SITE}:80 bytes frames",
    ),
    listed("http-0.9", "A request without a version.", 80, b"GET /\r\n"),
    listed("http-1.0", "A request of HTTP/1.0 without a host.", 80, b"GET / HTTP/1.0\r\n\r\n"),
    listed("p7-user", "The host of the request has a user's part.", 80, request("{N}@evil.lab.example")),
    listed(
        "p17-socks",
        "A proxy's handshake on an allowed connection.",
        80,
        b"\x05\x01\x00\x05\x01\x00\x03" + block(1, EVIL.encode()) + b"\0\x50",
    ),
    listed("any-http", "A request for another host on a port where anything goes.", 8000, HTTP_EVIL),
    listed("any-tls", "A hello with another name on a port where anything goes.", 9443, tls(EVIL)),
]
UDP_ROWS: Final = [
    ask(
        "65-443",
        "QUIC to a listed name and port.",
        "a65.lab.example",
        443,
        udp=True,
        lists={"a65.lab.example": [443, 9000]},
    ),
    ask("65-53", "UDP to a port that is not listed.", "a65.lab.example", 53, udp=True),
    ask(
        "65-listed",
        "UDP to a port that is listed.",
        "a65.lab.example",
        9000,
        b"ping",
        1.0,
        expected=(*looked_up("a65.lab.example"), f"udp {SITE}:9000 bytes ping"),
        answer={"code": 0, "data": "ping"},
        udp=True,
        names={"a65.lab.example": [SITE]},
    ),
    ask(
        "66",
        "The answer comes from another server than was asked.",
        "a66.lab.example",
        9001,
        b"ping",
        0.5,
        expected=(*looked_up("a66.lab.example"), f"udp {SITE}:9001 bytes ping"),
        answer={"code": 0, "data": ""},
        udp=True,
        lists={"a66.lab.example": [9001]},
        names={"a66.lab.example": [SITE]},
        extra_packets=(f"icmp {SITE}:0",),
    ),
]
PEER_ROWS: Final = [
    ask("p7-octal", "An address with octal numbers.", "0056.0056.0056.0056", 80),
    *literals(
        "p12",
        "Unlisted IPv6 addresses, plain and with an IPv4 address inside.",
        [SITE_6, "::ffff:46.46.46.46", "64:ff9b::2e2e:2e2e"],
        80,
    ),
    *literals(
        "p15",
        "The host by an alias that other sandboxes define.",
        ["10.0.2.2", "192.168.127.254", "198.18.0.1", "172.17.0.1"],
    ),
    *[
        ask(f"p15-{host}", "The host by a name that other sandboxes have.", host, 8600, names={host: [GATE_ADDRESS]})
        for host in ("host.docker.internal", "host.lima.internal", "gateway.docker.internal")
    ],
    ask("p16", "The cloud's metadata, though the policy lists it.", METADATA, 80, lists={METADATA: [80]}),
    ask(
        "p16-name",
        "The metadata service by the name that one cloud uses.",
        "metadata.google.internal",
        80,
        names={"metadata.google.internal": [METADATA]},
    ),
    ask(
        "p22-name",
        "A denied name whose address is listed.",
        "denied.lab.example",
        8443,
        names={"denied.lab.example": [SITE]},
        lists={"denied.lab.example": [8443]},
    ),
    ask("p24-case", "A denied name, in capitals.", "Denied.LAB.Example", 8443),
    ask("p24-dot", "A denied name, with a final dot.", "denied.lab.example.", 8443),
    ask(
        "p21",
        "Bytes to an allowed server: the result counts them.",
        "ap21.lab.example",
        9,
        REDIS_PING,
        0.1,
        expected=reached("ap21.lab.example", 9, f"tcp {SITE}:9 bytes {PING_SEEN}"),
        lists={"ap21.lab.example": [9]},
        names={"ap21.lab.example": [SITE]},
    ),
]


HEADER: Final = struct.Struct(">BBHII")
MESSAGE, OPEN, ANSWER, DATA, CREDIT, FIN, RESET, DATAGRAM = range(1, 9)
TCP, UDP = 6, 17  # kinds of streams
REFUSAL = 1  # the message


def raw(kind: int, stream: int, payload: bytes = b"", *, code: int = 0, zero: int = 0, length: int = -1) -> bytes:
    """Return a frame, valid or not."""
    return HEADER.pack(kind, code, zero, stream, len(payload) if length < 0 else length) + payload


# ------------------------------------------------------------------------------------ rows that need time in between

_REBINDING: Final = (Answer(addresses=(SITE,), ttl=0), Answer(addresses=("127.0.0.1",), ttl=0))
TIMED_FIRST: Final = [
    permitted("35-first", "A listed name resolves to its server at first.", "a35.lab.example", _REBINDING),
    ask(
        "35-again",
        "The name is requested again: the address is the one that was checked.",
        "a35.lab.example",
        80,
        request("a35.lab.example"),
        1.0,
        expected=(f"tcp {SITE}:80", f"http {SITE}:80 a35.lab.example GET / HTTP/1.1"),
    ),
    listed("52", "A hello stops in its middle.", 443, tls("a52.lab.example")[:60], answer=OPENED, keep="stalled"),
    listed(
        "52-http", "A request stops in its middle.", 80, b"GET / HTTP/1.1\r\nHost: {N}\r\n", answer=OPENED, keep="slow"
    ),
]
INTERNATIONAL: Final = [
    ask("29-homograph-ascii", "A Cyrillic letter, in its ASCII form.", "xn--pi-6kc.lab.example"),
    ask("29-bad-ascii", "An ASCII form of nothing.", "xn--a24.lab.example"),
    listed(
        "29-host",
        "The host of a request has a Cyrillic letter, in its ASCII form.",
        80,
        request("xn--pi-6kc.lab.example"),
    ),
]
TIMED_LAST: Final = [
    Row(
        id="52-end",
        tried="The incomplete hello is dropped, and none of it is forwarded.",
        do="await_end",
        words={"keep": "stalled", "wait_s": 14},
        answer={"reset": 5},
    ),
    Row(
        id="52-http-end",
        tried="The incomplete request is dropped, and none of it is forwarded.",
        do="await_end",
        words={"keep": "slow", "wait_s": 14},
        answer={"reset": 5},
    ),
    ask(
        "35-rebound",
        "The name now resolves to the host's loopback.",
        "a35.lab.example",
        80,
        expected=looked_up("a35.lab.example"),
        answer=POLICY,
    ),
]
CLAIM_ROWS: Final = [
    Row(
        id=f"told-{word}",
        tried=f"The guest claims to have refused {what} itself: nothing is contacted.",
        do="write",
        words={"say": [raw(MESSAGE, 0, struct.pack(">BH", transport, port) + host, code=REFUSAL).hex()]},
        answer={"lost": False},
    )
    for word, what, transport, host, port in (
        ("listed", "what is listed", 6, b"a24.lab.example", 80),
        ("unlisted", "what is not listed", 6, EVIL.encode(), 80),
        ("address", "a datagram to the metadata service", 17, METADATA.encode(), 80),
        ("name", "the look-up of a name", 17, EVIL.encode(), 0),
        ("malformed", "what is no host", 6, b"\x1b[2J\n\0\xff", 80),
    )
]
FRAME_ROWS: Final = [
    *TIMED_FIRST,
    *NAME_ROWS,
    *LITERAL_ROWS,
    *DNS_ROWS,
    *TLS_ROWS,
    *HTTP_ROWS,
    *UDP_ROWS,
    *PEER_ROWS,
    *CLAIM_ROWS,
    *TIMED_LAST,
    *INTERNATIONAL,
]
"""One guest runs all of these in this order; the gate survives each."""


# ------------------------------------------------------------------------------------- rows that end their own gate

AFTER: Final[Mapping[str, Script]] = {"after.lab.example": [OTHER_SITE]}
WEB: Final = "av.lab.example"
SLOW: Final = "slow.lab.example"


def opening(stream: int, host: bytes = WEB.encode(), port: int = 9, transport: int = TCP) -> bytes:
    """Return an OPEN frame."""
    return raw(OPEN, stream, struct.pack(">H", port) + host, code=transport)


def violation(
    number: str,
    tried: str,
    *say: bytes,
    tcp: int = 0,
    udp: bool = False,
    pause_s: float = 0.0,
    port: int = 9,
) -> Row:
    """Return a row whose frames break the protocol, so that the gate closes.

    tcp: TCP connections to open first, as streams 1, 3 and so on. udp: then open one for UDP. pause_s: between frames.
    """
    opens = [[WEB, port, False]] * tcp + [[WEB, 9000, True]] * udp
    return Row(
        id=number,
        tried=tried,
        do="frames",
        words={"opens": opens, "say": [one.hex() for one in say], "pause_s": pause_s},
        expected=(*(looked_up(WEB) if opens else ()), *[f"tcp {SITE}:{port}"] * tcp),
        answer={"codes": [0] * len(opens), "closed": True},
        lists={WEB: [9, 6000, 9000], "after.lab.example": [80]},
        names={WEB: [SITE], **AFTER},
    )


VIOLATIONS: Final = [
    violation("9", "The host is empty.", raw(OPEN, 1, b"\x00\x50", code=TCP)),
    violation("10", "The host has 300 bytes.", opening(1, b"a" * 300)),
    violation("13-short", "A frame is too short for a port.", raw(OPEN, 1, b"\x00", code=TCP)),
    violation("14", "A frame has the length 4294967295.", raw(DATA, 1, b"x", length=2**32 - 1), tcp=1),
    violation("14-over", "A frame is one byte longer than one may be.", raw(DATA, 1, bytes((128 << 10) + 1)), tcp=1),
    violation("14-empty", "Data of no bytes.", raw(DATA, 1), tcp=1),
    violation("15", "A frame is of no known type.", raw(99, 1, b"x"), tcp=1),
    violation("15-zero", "A frame is of type 0.", raw(0, 1), tcp=1),
    replace(
        violation("16", "Data comes before the answer.", opening(1, SLOW.encode(), 9), raw(DATA, 1, b"x"), pause_s=0.3),
        expected=looked_up(SLOW),
        lists={SLOW: [9], "after.lab.example": [80]},
        names={SLOW: Answer(rcode="SILENT"), **AFTER},
    ),
    violation("16-never", "Data comes for a stream that was never opened.", raw(DATA, 7, b"x"), tcp=1),
    violation("17", "The credit is larger than the window.", raw(CREDIT, 1, struct.pack(">I", 1)), tcp=1),
    violation("17-most", "The credit is the largest number.", raw(CREDIT, 1, struct.pack(">I", 2**32 - 1)), tcp=1),
    violation("17-none", "The credit is 0.", raw(CREDIT, 1, bytes(4)), tcp=1),
    violation("18-zero", "A stream has the number 0.", opening(0)),
    violation("18-even", "A stream has a number of the gate.", opening(2)),
    violation("18-reuse", "A stream's number is used again after its end.", raw(RESET, 1), opening(1), tcp=1),
    violation("18-descending", "A stream's number is smaller than the last one.", opening(1), tcp=2),
    violation("19", "A stream is opened twice.", opening(1), tcp=1),
    violation("20", "The guest answers in the gate's place.", raw(ANSWER, 1), tcp=1),
    violation("zero", "A field that must be zero is not.", raw(DATA, 1, b"x", zero=1), tcp=1),
    violation("code", "Data has a code.", raw(DATA, 1, b"x", code=1), tcp=1),
    violation("reset-code", "A reset has an unknown code.", raw(RESET, 1, code=200), tcp=1),
    violation("transport", "A connection of another transport is asked for.", opening(1, transport=1)),
    violation(
        "told-stream", "A claim of a refusal is on a stream.", raw(MESSAGE, 1, b"\x06\0\x50x", code=REFUSAL), tcp=1
    ),
    violation("told-empty", "A claim of a refusal has no host.", raw(MESSAGE, 0, b"\x06\0\x50", code=REFUSAL), tcp=1),
    violation(
        "told-long",
        "A claim of a refusal has a host of 300 bytes.",
        raw(MESSAGE, 0, b"\x06\0\x50" + b"a" * 300, code=REFUSAL),
        tcp=1,
    ),
    violation(
        "told-transport",
        "A claim of a refusal is of another transport.",
        raw(MESSAGE, 0, b"\x01\0\x50x", code=REFUSAL),
        tcp=1,
    ),
    violation(
        "told-number", "A message has an unknown number.", raw(MESSAGE, 0, b"\x06\0\x50x", code=REFUSAL + 1), tcp=1
    ),
    violation(
        "fin-twice", "Data comes behind the end of its direction.", raw(FIN, 1), raw(DATA, 1, b"x"), tcp=1, port=6000
    ),
    violation("fin-long", "The end of a direction has bytes.", raw(FIN, 1, b"x"), tcp=1),
    violation("datagram-tcp", "A datagram on a connection.", raw(DATAGRAM, 1, b"x"), tcp=1),
    violation("data-udp", "Data of a connection among datagrams.", raw(DATA, 1, b"x"), udp=True),
    violation("credit-udp", "Credit for datagrams.", raw(CREDIT, 1, struct.pack(">I", 1)), udp=True),
    violation("datagram-long", "A datagram is longer than one may be.", raw(DATAGRAM, 1, bytes(65508)), udp=True),
    Row(
        id="16-credit",
        tried="Data is sent beyond the window to a peer that does not read.",
        do="past_credit",
        words={"host": WEB, "port": 6000},
        expected=reached(WEB, 6000),
        answer={"code": 0, "closed": True},
        lists={WEB: [6000]},
        names={WEB: [SITE]},
    ),
    Row(
        id="71",
        tried="A new relay counts its streams from 1 again: it gets no data of the old streams.",
        do="restart",
        words={"host": WEB, "port": 9},
        expected=reached(WEB, 9),
        answer={"code": 0, "again": None, "closed": True},
        lists={WEB: [9]},
        names={WEB: [SITE]},
    ),
    Row(
        id="noise",
        tried="Random bytes.",
        do="noise",
        words={"count": 100_000},
        answer=CLOSED,
        lists={WEB: [9]},
        names={WEB: [SITE]},
    ),
]


# ------------------------------------------------------------------------------------------------- rows by the stack

STACK_NAME: Final = "as.lab.example"


def stack(
    number: str,
    tried: str,
    do: str,
    *,
    expected: tuple[str, ...] = (),
    answer: dict[str, Any] | None = None,
    **words: object,
) -> Row:
    """Return an attack through the guest's kernel and the honest relay."""
    return Row(id=number, tried=tried, do=do, words=words, expected=expected, answer=answer or {})


def answered(number: str, tried: str, codes: list[int], *queries: bytes) -> Row:
    """Return queries to the guest's DNS server. codes: the expected response codes; -1 stands for no answer."""
    hexadecimal = [query.hex() for query in queries]
    return stack(number, tried, "dns", answer={"codes": codes} if codes else {}, queries=hexadecimal)


_DATA_LABELS: Final = labels(f"{'6578666c' * 7}.{'74726174' * 7}.lab.example")
_LISTED: Final = labels(STACK_NAME)
TXT, PTR, A, HTTPS = 16, 12, 1, 65
STACK_ROWS: Final = [
    stack(
        "s-listed",
        "A listed name is reached by an ordinary connection of a program.",
        "tcp",
        host=STACK_NAME,
        port=80,
        say=request(STACK_NAME).hex(),
        expected=got(STACK_NAME),
        answer={"said": "OK"},
    ),
    answered("42-txt", "Data goes in the labels of a question for text.", [3], dns_query(_DATA_LABELS, TXT)),
    answered("42-below", "Data goes in labels before a listed name.", [3], dns_query(labels("secret") + _LISTED, A)),
    answered("p1", "A name that nothing lists is looked up; TCP is not even tried.", [3], dns_query(labels(EVIL), A)),
    answered("p6-keys", "The keys of an encrypted hello are asked for.", [0], dns_query(_LISTED, HTTPS)),
    answered("p20", "Two questions in one query.", [1], dns_query(_LISTED, A, questions=2)),
    answered("p23", "The name of an address is asked for.", [3], dns_query(labels("5.77.168.192.in-addr.arpa"), PTR)),
    answered("44-loop", "A name that points to itself.", [], dns_query(b"\xc0\x0c", A), dns_query(b"\x01a\xc0\x0c", A)),
    answered("44-short", "Queries that end too early.", [], b"\0", bytes(11), dns_query(_LISTED, A)[:-3]),
    answered("44-large", "A query of 64 KiB.", [], dns_query(_LISTED, A) + bytes(65_000)),
    stack(
        "p2-udp",
        "DNS queries to another server.",
        "udp",
        host="45.45.45.53",
        port=53,
        say=dns_query(labels(EVIL), A).hex(),
    ),
    stack("p2-tcp", "DNS over TCP to a server of our choice.", "tcp", host="45.45.45.53", port=53),
    stack(
        "p10-stack", "Another port of a listed name.", "tcp", host=STACK_NAME, port=22, answer={"said": "EHOSTUNREACH"}
    ),
    stack("p11", "UDP to a server by a raw message.", "udp", host=SITE, port=9000, say="00"),
    stack("p11-quic", "QUIC to a listed name.", "udp", host=STACK_NAME, port=443, say="00"),
    stack("p13-stack", "An address instead of a name.", "tcp", host=SITE, port=80),
    stack("p12-stack", "IPv6.", "tcp", host=SITE_6, port=80),
    stack("p15-stack", "The host's own address.", "tcp", host=GATE_ADDRESS, port=8600),
    stack("p16-stack", "The cloud's metadata.", "tcp", host=METADATA, port=80),
    stack(
        "p14",
        "A listed name resolves to a private address.",
        "tcp",
        host="ap14.lab.example",
        port=80,
        expected=looked_up("ap14.lab.example"),
        answer={"said": "EHOSTUNREACH"},
    ),
    stack(
        "54-stack",
        "A request for another host, through the relay.",
        "tcp",
        host=STACK_NAME,
        port=8080,
        say=HTTP_EVIL.hex(),
        expected=(f"tcp {SITE}:8080",),
        answer={"said": "ECONNRESET"},
    ),
    stack(
        "3",
        "Crafted packets on the loopback, and by raw sockets.",
        "raw_packets",
        targets=OUTSIDE,
        answer={"sent": 12},
    ),
    stack("4", "The host by its machine's own socket family, all ports.", "vsock", ports=65_536),
    stack(
        "2",
        "Devices: there is no network card and no such socket; virtual devices reach nothing.",
        "devices",
        targets=OUTSIDE,
        answer={"at_start": ["lo"], "cards": 0},
    ),
    stack(
        "7",
        "Every kernel module of the image is loaded: none provides a network card.",
        "load_modules",
        targets=OUTSIDE,
        answer={"devices": ["lo"]},
    ),
]
"""One guest runs all of these in this order, beside an honest relay."""

ENDS_RELAY: Final = [
    stack("1", "No rules any more, and a default route.", "without_rules", targets=OUTSIDE),
    stack("5", "The relay is killed; then all is tried.", "kill_relay", targets=OUTSIDE),
    stack("6", "A second writer on the relay's stream.", "second_writer", host=STACK_NAME, port=80),
]
STACK_LISTS: Final[Mapping[str, Sequence[int]]] = {STACK_NAME: [80, 8080, 443], "ap14.lab.example": [80]}
STACK_NAMES: Final[Mapping[str, Script]] = {
    STACK_NAME: [SITE],
    "ap14.lab.example": [LAN],
    **EVIL_NAMES,
}
