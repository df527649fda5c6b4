"""The table of attacks: what each one tries, and exactly which contacts it may cause.

A row's id starts with the number of a regression attack (facts 7.5), or with "p" and the number of a known bypass
(peers E); other ids are attacks of our own. Expected contacts are texts in the form that `described` gives.

Each row stands for a way to the outside. What the gate takes for a valid frame, host, ClientHello or request is tested
in tests/unit/test_egress_streams.py and tests/unit/test_network_*.py, with every spelling of these attacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tests.fuzz.fuzz_dns import asked
from tests.fuzz.tls import hello, sni
from tests.lab.attacks.guest_port import DATA, HEADER, RESET, asking, frame
from tests.lab.laboratory import GATE_ADDRESS, GATE_ADDRESS_6, LAN, METADATA, OTHER_SITE, SITE, SITE_6, Answer

if TYPE_CHECKING:
    from tests.lab.laboratory import Contact, Script

POLICY: Final = {"code": 5}
"""The gate refused the request by its rules."""
RESET_BY_POLICY: Final = {"code": 0, "reset": 5}
"""The gate connected, then refused the first bytes."""
OPENED: Final = {"code": 0}
OUTSIDE: Final = [[SITE, 80], [OTHER_SITE, 443], [METADATA, 80], [LAN, 80], [GATE_ADDRESS, 8600], ["45.45.45.53", 53]]
"""Targets outside that no test policy allows for these attacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One attack.

    id: test id. tried: the attack in one sentence. do, words: the command for the guest. expected: the contacts it may
    cause. answer: what the guest must report, which shows that it carried the attack out. lists: hosts and ports for
    the policy. names: names for the laboratory's DNS.
    """

    id: str
    tried: str
    do: str
    words: dict[str, Any]
    expected: tuple[str, ...] = ()
    answer: dict[str, Any] = field(default_factory=dict)
    lists: Mapping[str, Sequence[int]] = field(default_factory=dict)
    names: Mapping[str, Script] = field(default_factory=dict)


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


def request(host: str, line: str = "GET / HTTP/1.1", *fields: str) -> bytes:
    """Return an HTTP/1 request."""
    return "\r\n".join([line, f"Host: {host}", *fields, "", ""]).encode("latin-1")


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
    )


def listed(
    number: str,
    tried: str,
    port: int,
    *say: bytes | float,
    allowed: tuple[str, ...] = (),
    answer: dict[str, Any] | None = None,
) -> Row:
    """Return a row that asks for a listed name of its own, then sends what it may not send.

    "{N}" in *say* and *allowed* stands for that name. allowed: contacts beyond the connection; without any, the gate
    must reset the connection.
    """
    name = own_name(number)
    answer = answer or (OPENED if allowed else RESET_BY_POLICY)
    return ask(
        number,
        tried,
        name,
        port,
        *[one.replace(b"{N}", name.encode()) if isinstance(one, bytes) else one for one in say],
        expected=reached(name, port, *(one.replace("{N}", name) for one in allowed)),
        answer=answer,
        lists={name: [port]},
        names={name: [SITE]},
        wait_s=5.0 if "reset" in answer else 0.1,
    )


def own_name(number: str) -> str:
    """Return a name that only one row uses."""
    return f"a{number}.lab.example".lower()


def resolving(number: str, tried: str, address: str, *, expected: tuple[str, ...] = (), port: int = 8600) -> Row:
    """Return a row for a listed name with a bad address: it is looked up, never dialled."""
    name = own_name(number)
    return ask(
        number,
        tried,
        name,
        port,
        expected=(*looked_up(name), *expected),
        answer=POLICY,
        lists={name: [port]},
        names={name: [address]},
    )


EVIL: Final = "evil.lab.example"
EVIL_NAMES: Final[Mapping[str, Script]] = {EVIL: [OTHER_SITE], "evil.test": [OTHER_SITE], "*.evil.test": [OTHER_SITE]}
HTTP_EVIL: Final = request(EVIL)
TLS_EVIL: Final = hello(sni(EVIL.encode()))

FRAME_ROWS: Final = [
    ask("8", "A name that nothing lists is asked for.", EVIL, names=EVIL_NAMES),
    ask("11", "The host has a NUL byte in it.", b"a11.lab.example\0.evil.test", lists={"a11.lab.example": [80]}),
    ask("28", "A number that some programs read as the loopback address.", "2130706433", 8600),
    resolving("30", "A listed name resolves to the cloud's metadata service.", METADATA, port=80),
    resolving("32", "A listed name resolves to the host's own public address.", GATE_ADDRESS),
    resolving("32-6", "A listed name resolves to the host's own public IPv6 address.", GATE_ADDRESS_6),
    resolving(
        "31",
        "A listed name resolves to the metadata service, for a translator with a prefix of 64 bits.",
        "2a0f:64:0:1:a9:fea9:fe00:0",
        expected=looked_up("ipv4only.arpa")[1:],  # the one question about this network's translators
    ),
    ask("33", "A name that means something only here.", "localhost", 8600),
    ask(
        "33-hosts-file",
        "A listed name has a private address in the host's /etc/hosts.",
        "hosts-file.example",
        answer=POLICY,
        lists={"hosts-file.example": [80]},
    ),
    ask(
        "33-search",
        "A listed name exists only below a search domain of the host.",
        "only.search.example",
        expected=looked_up("only.search.example"),
        answer={"code": 7},
        lists={"only.search.example": [80]},
    ),
    ask(
        "36",
        "A listed name is an alias of an alias of a private address.",
        "a36p.lab.example",
        expected=looked_up("a36p.lab.example"),
        answer=POLICY,
        lists={"a36p.lab.example": [80]},
        names={
            "a36p.lab.example": Answer(cname="a36q.lab.example"),
            "a36q.lab.example": Answer(cname="x.private.example"),
        },
    ),
    ask(
        "38",
        "An address of a listed network is reached, and no other.",
        SITE,
        7,
        REDIS_PING,
        1.0,
        expected=(f"tcp {SITE}:7", f"tcp {SITE}:7 bytes {PING_SEEN}"),
        lists={"46.46.46.46/31": [7], "0.0.0.0/0": [8600], "::/0": [8600]},
    ),
    *[
        ask(f"41-{host}", "An address that is always denied, although the policy lists all addresses.", host, 8600)
        for host in ("127.0.0.1", METADATA, LAN, GATE_ADDRESS, GATE_ADDRESS_6)
    ],
    ask("43-53", "DNS over TCP to a server of our choice.", "45.45.45.53", 53),
    ask("43-53-udp", "DNS over UDP to a server of our choice.", "45.45.45.53", 53, udp=True),
    listed("46", "The hello names another server than the connection is for.", 443, TLS_EVIL),
    listed("54", "The request is for another host.", 80, HTTP_EVIL),
    listed(
        "p9",
        "A second request for another host, after the first one's answer.",
        80,
        request("{N}"),
        1.0,
        HTTP_EVIL,
        allowed=(f"http {SITE}:80 {{N}} GET / HTTP/1.1",),
        answer=RESET_BY_POLICY,
    ),
    listed(
        "64",
        "An upgrade that the server accepts: later bytes reach only that server.",
        80,
        request("{N}", "GET /upgrade HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket"),
        1.0,
        b"frames",
        1.0,
        allowed=(f"http {SITE}:80 {{N}} GET /upgrade HTTP/1.1", f"http {SITE}:80 bytes frames"),
    ),
    listed(
        "any-newlines",
        "8 KiB of line breaks precede a tunnel.",
        9,
        b"\r\n" * 4096,
        0.2,
        b"CONNECT 46.46.46.47:80 HTTP/1.1\r\n\r\n",
    ),
    listed("any-tls", "A hello with another name on a port where anything goes.", 9443, TLS_EVIL),
    ask(
        "65",
        "UDP to a port that is listed.",
        "a65.lab.example",
        9000,
        b"ping",
        1.0,
        expected=(*looked_up("a65.lab.example"), f"udp {SITE}:9000 bytes ping"),
        answer={"code": 0, "data": "ping"},
        lists={"a65.lab.example": [9000]},
        names={"a65.lab.example": [SITE]},
        udp=True,
    ),
    ask("p16", "The cloud's metadata, though the policy lists it.", METADATA, lists={METADATA: [80]}),
    ask(
        "p22",
        "A denied name whose address is listed.",
        "denied.lab.example",
        8443,
        names={"denied.lab.example": [SITE]},
        lists={"denied.lab.example": [8443]},
    ),
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
"""One guest runs all of these in this order; the gate survives each."""


# ------------------------------------------------------------------------------------- rows that end their own gate

WEB: Final = "av.lab.example"


def violation(number: str, tried: str, do: str, **words: str) -> Row:
    """Return a row that connects to a listed server and then breaks the protocol, so that the gate closes."""
    return Row(
        id=number,
        tried=tried,
        do=do,
        words={"host": WEB, "port": 9, **words},
        expected=reached(WEB, 9),
        answer={"code": 0, "closed": True},
        lists={WEB: [9], "after.lab.example": [80]},
        names={WEB: [SITE], "after.lab.example": [OTHER_SITE]},
    )


ENDLESS: Final = HEADER.pack(DATA, 0, 0, 1, 2**32 - 1) + b"x"
AGAIN: Final = frame(RESET, 1) + asking(1, WEB.encode(), 9)
VIOLATIONS: Final = [
    violation("14", "A frame has the length 4294967295.", "frames", say=ENDLESS.hex()),
    violation("18", "A stream's number is used again after its end.", "frames", say=AGAIN.hex()),
    violation("71", "A new relay counts its streams from 1 again: it gets no data of the old ones.", "restart"),
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
    stack(
        "42",
        "Data goes in labels before a listed name, in a question to the guest's DNS server.",
        "dns",
        query=asked(f"secret.{STACK_NAME}").hex(),
        answer={"code": 3},
    ),
    stack(
        "p2-udp",
        "DNS queries to another server.",
        "udp",
        host="45.45.45.53",
        port=53,
        say=asked(EVIL).hex(),
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
