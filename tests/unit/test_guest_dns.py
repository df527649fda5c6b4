"""The guest's DNS server: listed names have one address, others do not exist, and no query leaves."""

from __future__ import annotations

import struct
from typing import Final

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.resolver
import dns.reversename
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.guest.dns import REFUSED, TTL_S, NameTable, answer
from x07_sandbox.host.settings import GUEST_HOSTNAME

ADDRESS: Final = "198.18.0.16"
# Whatever a client may ask of a name that exists, other than its address.
OTHER_TYPES: Final = ("AAAA", "HTTPS", "SVCB", "MX", "TXT", "SRV", "ANY", "NS", "SOA", "PTR", "CNAME", "NULL", "AXFR")
LONGEST: Final = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 49, "example.net"])


def listed() -> NameTable:
    """Names of a policy with two exact entries and three wildcards."""
    return NameTable(
        {"example.org": ADDRESS, "www.example.net": "198.18.0.17"},
        [("example.net", "198.18.1.0"), ("deep.example.net", "198.18.2.0"), ("example.org", "198.18.3.0")],
    )


def ask(query: dns.message.Message, names: NameTable | None = None) -> dns.message.Message:
    """The parsed answer to a query."""
    reply = answer(query.to_wire(), names or listed())
    assert reply is not None
    return dns.message.from_wire(reply)


def lookup(name: str, kind: str = "A", names: NameTable | None = None) -> dns.message.Message:
    """The answer to a query without EDNS."""
    return ask(dns.message.make_query(name, kind), names)


def test_a_program_without_a_network_is_refused_every_name() -> None:
    """Without a network, every name but localhost is refused, and counts unless it is the guest's own."""
    names, asked = NameTable({}, []), list[str]()
    names.unlisted, names.on_unlisted = REFUSED, asked.append
    assert {lookup("a.example", kind, names).rcode() for kind in ("A", "AAAA", "MX")} == {dns.rcode.REFUSED}
    assert lookup(GUEST_HOSTNAME.upper(), "A", names).rcode() == dns.rcode.REFUSED
    assert asked == ["a.example"]
    assert addresses(lookup("localhost", "A", names)) == ["127.0.0.1"]


def addresses(reply: dns.message.Message) -> list[str]:
    """The data of all records in the answer."""
    return [str(data) for records in reply.answer for data in records]


def is_negative(reply: dns.message.Message) -> bool:
    """Return whether the reply has no answer and an SOA for negative caching."""
    soa = [(records.rdtype, records.ttl) for records in reply.authority]
    return not reply.answer and soa == [(dns.rdatatype.SOA, TTL_S)]


def message(
    *questions: bytes, flags: int = 0x0100, extra: bytes = b"", counts: tuple[int, int, int] = (0, 0, 0)
) -> bytes:
    """A message of raw questions and records."""
    return struct.pack(">HHHHHH", 7, flags, len(questions), *counts) + b"".join(questions) + extra


def question(*labels: bytes, kind: int = 1, in_class: int = 1) -> bytes:
    """A question whose labels may break every rule but the length byte."""
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0" + struct.pack(">HH", kind, in_class)


EXAMPLE: Final = question(b"example", b"org")


def rcode(query: bytes) -> dns.rcode.Rcode:
    """The response code for raw bytes."""
    reply = answer(query, listed())
    assert reply is not None
    return dns.message.from_wire(reply).rcode()


# names and their addresses


def test_a_listed_name_has_the_address_that_the_host_assigned() -> None:
    """A listed name resolves to the one address assigned to it, with a TTL of 30 seconds."""
    reply = lookup("example.org")
    assert reply.rcode() == dns.rcode.NOERROR
    assert addresses(reply) == [ADDRESS]
    assert [records.ttl for records in reply.answer] == [TTL_S]
    assert not reply.authority


@pytest.mark.parametrize("name", ["example.org", "a.example.org"])
def test_a_listed_name_has_no_other_records(name: str) -> None:
    """A listed name, and each name below a wildcard, exists for every record type, and has only an A record."""
    for kind in OTHER_TYPES:
        reply = lookup(name, kind)
        assert (reply.rcode(), is_negative(reply)) == (dns.rcode.NOERROR, True), kind


@pytest.mark.parametrize("name", ["evil.test", "example.net", "org", "xexample.org", "example.org.evil.test", "."])
def test_an_unlisted_name_does_not_exist(name: str) -> None:
    """An unlisted name is NXDOMAIN for every record type."""
    for kind in ("A", *OTHER_TYPES):
        reply = lookup(name, kind)
        assert (reply.rcode(), is_negative(reply), reply.edns) == (dns.rcode.NXDOMAIN, True, -1), kind


def test_upper_and_lower_case_are_the_same_name() -> None:
    """Names are case-insensitive, and the question is echoed byte for byte."""
    query = message(question(b"eXaMPle", b"ORG"))
    reply = answer(query, listed())
    assert reply is not None
    assert reply[12 : len(query)] == query[12:]
    assert addresses(dns.message.from_wire(reply)) == [ADDRESS]


def test_a_wildcard_gives_each_name_below_it_an_address_that_stays() -> None:
    """Each name below a wildcard has a stable address of its own."""
    names = listed()
    first, second = (addresses(lookup(name, names=names)) for name in ("a.example.org", "x.b.example.org"))
    assert (first, second) == (["198.18.3.1"], ["198.18.3.2"])
    assert addresses(lookup("A.example.org", names=names)) == first
    assert names.address_of("a.example.org") == "198.18.3.1"


def test_the_most_specific_entry_decides() -> None:
    """Exact names take precedence over wildcards, and longer wildcards over shorter ones."""
    names = listed()
    assert names.address_of("www.example.net") == "198.18.0.17"
    assert names.address_of("a.deep.example.net") == "198.18.2.1"
    assert names.address_of("deep.example.net") == "198.18.1.1"
    assert names.address_of("example.net") is None


def test_a_wildcard_has_room_for_254_names() -> None:
    """A wildcard has 254 addresses; further names do not exist."""
    names = listed()
    found = [names.address_of(f"n{number}.deep.example.net") for number in range(300)]
    assert found == [f"198.18.2.{number}" for number in range(1, 255)] + [None] * 46
    assert lookup("late.deep.example.net", names=names).rcode() == dns.rcode.NXDOMAIN
    assert lookup("late.deep.example.net", "AAAA", names).rcode() == dns.rcode.NXDOMAIN
    assert addresses(lookup("n0.deep.example.net", names=names)) == ["198.18.2.1"]
    assert names.address_of("other.example.net") == "198.18.1.1"


@pytest.mark.parametrize("name", ["", ".", ".example.org", "a..example.org", "a b.example.org", "é.example.org"])
def test_only_valid_names_get_an_address(name: str) -> None:
    """A text that is no valid DNS name gets no address."""
    assert listed().address_of(name) is None
    assert listed().address_of(f"{'a' * 64}.example.org") is None
    assert listed().address_of(".".join(["a"] * 122) + ".example.org") is None


def test_a_connection_to_an_assigned_address_is_translated_to_its_name() -> None:
    """The destination address of a connection is translated to its name, even without a lookup."""
    names = listed()
    assert names.host_at(ADDRESS) == "example.org"
    assert names.host_at("198.18.3.1") is None
    names.address_of("a.example.org")
    assert names.host_at("198.18.3.1") == "a.example.org"
    assert names.host_at("192.0.2.1") is None


# special names


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "app.localhost"])
def test_localhost_is_the_machine_itself(name: str) -> None:
    """The name localhost, and names below it, resolve to the loopback addresses."""
    assert addresses(lookup(name)) == ["127.0.0.1"]
    assert addresses(lookup(name, "AAAA")) == ["::1"]
    reply = lookup(name, "TXT")
    assert (reply.rcode(), is_negative(reply)) == (dns.rcode.NOERROR, True)


def test_no_policy_gives_localhost_another_meaning() -> None:
    """A policy cannot redirect localhost."""
    names = NameTable({"localhost": ADDRESS}, [("localhost", "198.18.1.0")])
    assert addresses(lookup("localhost", names=names)) == ["127.0.0.1"]
    assert addresses(lookup("a.localhost", names=names)) == ["127.0.0.1"]


@pytest.mark.parametrize(
    "name",
    [
        "in-addr.arpa",
        "18.198.in-addr.arpa",
        "016.0.18.198.in-addr.arpa",
        "1.16.0.18.198.in-addr.arpa",
        "1.0.0.127.in-addr.arpa",
        "8.8.8.8.in-addr.arpa",
        f"1.{'0.' * 31}ip6.arpa",
    ],
)
def test_a_reverse_lookup_of_any_other_address_finds_nothing(name: str) -> None:
    """A reverse lookup of any other address is NXDOMAIN."""
    names = listed()
    names.address_of("example.org")
    assert lookup(name, "PTR", names).rcode() == dns.rcode.NXDOMAIN


# the protocol


@pytest.mark.parametrize("recursion", [True, False])
def test_the_flags_are_those_of_a_recursive_resolver(recursion: bool) -> None:  # noqa: FBT001 - a parameter of pytest
    """Answers have the flags of a recursive resolver that does not validate."""
    query = dns.message.make_query("example.org", "A")
    query.flags = dns.flags.AD | dns.flags.CD | (dns.flags.RD if recursion else 0)
    reply = ask(query)
    assert reply.id == query.id
    assert reply.flags == dns.flags.QR | dns.flags.RA | (query.flags & dns.flags.RD)


@given(st.binary(max_size=4000), st.integers(0, 0xFFFF))
@example(b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0), 1)
def test_records_behind_the_question_change_nothing(extra: bytes, count: int) -> None:
    """EDNS options, signatures and any other bytes after the question are ignored."""
    assert answer(message(EXAMPLE, extra=extra, counts=(0, 0, count)), listed()) == answer(message(EXAMPLE), listed())


LABELS: Final = (b"a b", b"a.b", b"a\0", b"\n", b"*", b"a@", b"a:", b"a/", b"a%", b"\xc3\xa9", b"\xff", b"\x1b[2J")
POINTERS: Final = (
    b"\xc0\x0c",
    b"\xc0\x00",
    b"\xc0\x0e\xc0\x0c",
    b"\x01a\xc0\x0c",
    b"\xff\xff",
    b"\xc0",
)  # the first to itself
ODD: Final = [
    *((message(question(b"a", kind=16, in_class=number)), dns.rcode.REFUSED) for number in (3, 4, 254, 255)),
    *((message(one, flags=code << 11), dns.rcode.NOTIMP) for code in range(1, 16) for one in (EXAMPLE, b"", b"\xff")),
    *((message(*[EXAMPLE] * count), dns.rcode.FORMERR) for count in (0, 2, 3)),
    *((message(question(label, b"example", b"org")), dns.rcode.FORMERR) for label in LABELS),
    *(
        (message(name + rest), dns.rcode.FORMERR)
        for name in (*POINTERS, b"\x07exam", b"")
        for rest in (b"\0\x01\0\x01", b"")
    ),
]


@pytest.mark.parametrize(("query", "code"), ODD)
def test_odd_queries_are_answered_with_their_code(query: bytes, code: dns.rcode.Rcode) -> None:
    """A query of another class is refused, of another opcode not implemented, and a malformed one a format error."""
    assert rcode(query) == code


def test_names_are_as_long_as_names_may_be() -> None:
    """Names up to 253 characters with labels up to 63 are served; longer ones are malformed."""
    assert len(LONGEST) == 253
    assert lookup(LONGEST).rcode() == dns.rcode.NOERROR
    labels = LONGEST.encode().split(b".")
    assert rcode(message(question(*labels[:3], b"d" * 50, *labels[4:]))) == dns.rcode.FORMERR
    for size in (64, 127, 128, 191, 192, 255):
        assert rcode(message(question(b"a" * size, b"example", b"org"))) == dns.rcode.FORMERR
