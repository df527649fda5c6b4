"""The normal form of a host: names, addresses, wildcards, networks and ranges."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.errors import UsageError
from x07_sandbox.network.hosts import (
    Wildcard,
    matches,
    parse_guest_host,
    parse_host,
    parse_pattern,
    pattern_text,
)
from x07_sandbox.policy.hosts import Addresses

LABELS = st.text("abcxyz019-_", min_size=1, max_size=12).filter(lambda label: not label.startswith("xn--"))
NAMES = st.builds(lambda labels, last: ".".join([*labels, last]), st.lists(LABELS, max_size=3), st.just("org"))
ADDRESSES = st.ip_addresses()


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("FAẞ.example", "xn--fa-hia.example"),
        ("XN--FA-HIA.example", "xn--fa-hia.example"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("exam\u00adple.org", "example.org"),  # UTS 46 drops a soft hyphen
        ("_srv.r3---sn-x.example.org", "_srv.r3---sn-x.example.org"),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
    ],
)
def test_spellings_of_a_host_have_one_normal_form(text: str, normal: str) -> None:
    """All spellings of a host have one normal form."""
    assert pattern_text(parse_host(text)) == normal


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "1 to 63 bytes"),
        ("a..b", "1 to 63 bytes"),
        ("example.org..", "1 to 63 bytes"),
        (f"{'a' * 64}.org", "1 to 63 bytes"),
        (".".join(["a" * 62] * 4) + ".org", "at most 253|more than 255"),
        ("a" * 300, "more than 255"),
        ("a b.org", "only letters"),
        ("a\0.org", "only letters"),
        ("user@a.org", "only letters"),
        ("*.example.org", "only letters"),
        ("127.1", "looks like an address"),
        ("2130706433", "looks like an address"),
        ("010.0.0.1", "looks like an address"),
        ("127.0.0.1.", "looks like an address"),
        ("\uff11\uff12\uff17.0.0.1", "looks like an address"),
        ("xn--a.example", "international label"),
        ("a\u200db.example", "international name"),
        ("\ud800.example", "international name"),
        ("[192.0.2.7]", "not an IPv6 address"),
        ("[example.org]", "not an IPv6 address"),
        ("[::1", "not an IPv6 address"),
        ("fe80::1%eth0", "zone"),
        ("::ffff:010.0.0.1", "not an IPv6 address"),
    ],
)
def test_a_host_in_an_odd_form_is_refused(text: str, why: str) -> None:
    """A malformed or ambiguous host is an error with a fix."""
    with pytest.raises(UsageError, match=why) as caught:
        parse_host(text)
    assert "Use a name such as" in str(caught.value)


@pytest.mark.parametrize("data", ["faß.example".encode(), b"a\xff.org", b"a" * 300, "\uff11.org".encode(), b""])
def test_a_guest_writes_hosts_in_ascii(data: bytes) -> None:
    """A host from a guest must be short ASCII text."""
    with pytest.raises(UsageError):
        parse_guest_host(data)
    assert parse_guest_host(b"A.EXAMPLE.") == parse_host("a.example")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("*.Example.org.", Wildcard("example.org")),
        ("*.faß.example", Wildcard("xn--fa-hia.example")),
        ("192.0.2.7", Addresses(4, 0xC0000207, 0xC0000207)),
        ("192.0.2.7/24", Addresses(4, 0xC0000200, 0xC00002FF)),
        ("192.0.2.1-192.0.2.9", Addresses(4, 0xC0000201, 0xC0000209)),
        ("::ffff:192.0.2.0/120", Addresses(4, 0xC0000200, 0xC00002FF)),
        ("abc-def.be", "abc-def.be"),
    ],
)
def test_entries_may_cover_several_hosts(text: str, pattern: object) -> None:
    """An entry is a host, a wildcard, a network or an address range."""
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *(
            "*",
            "*.",
            "*.org",
            "*.org.",
            "a.*.org",
            "*a.example.org",
            "*.*.example.org",
            "*.192.0.2.7",
            "**.example.org",
        ),
        *("10.0.0.0/33", "10.0.0.0/255.0.0.0", "/8", "example.org/24", "[10.0.0.0/8]", "fe80::1%a/64"),
        *("10.0.0.9-10.0.0.1", "10.0.0.1-::1"),
    ],
)
def test_an_invalid_entry_is_refused(text: str) -> None:
    """`*`, `*.tld`, netmasks, zones and inverted ranges are errors."""
    with pytest.raises(UsageError):
        parse_pattern(text)


@given(st.one_of(st.text(max_size=40), st.text("0123456789abcdefx.:-/[]*%_@", max_size=40), NAMES))
@example("xn--")
@example("xn--.org")
@example("xn---.org")
@example("\u0130.org")
def test_any_text_is_an_entry_a_host_or_our_error(text: str) -> None:
    """Any text gives an entry, and perhaps a normalized host, or a usage error."""
    try:
        pattern = parse_pattern(text)
        assert parse_pattern(pattern_text(pattern)) == pattern
        host = parse_host(text)
    except UsageError:
        return
    assert parse_host(pattern_text(host)) == host
    assert parse_guest_host(pattern_text(host).encode("ascii")) == host


@given(NAMES, ADDRESSES)
def test_names_and_addresses_never_match_each_other(name: str, number: object) -> None:
    """An address entry matches no name, and a name entry matches no address."""
    host, address = parse_host(name), parse_host(str(number))
    for everything in (Addresses(4, 0, 2**32 - 1), Addresses(6, 0, 2**128 - 1)):
        assert not matches(everything, host)
    assert not matches(parse_pattern(name), address)
    assert not matches(Wildcard("org"), address)
    assert matches(parse_pattern(pattern_text(address)), address)


def test_a_wildcard_covers_every_depth_but_not_its_own_name() -> None:
    """`*.example.org` matches names at any depth below example.org, but not example.org."""
    pattern = parse_pattern("*.example.org")
    hosts = ("a.example.org", "b.a.example.org", "example.org", "xexample.org", "a.example.org.evil.test")
    assert [matches(pattern, parse_host(host)) for host in hosts] == [True, True, False, False, False]
