"""The guest relay's view of a policy: which names have addresses, and what it may request."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import TYPE_CHECKING, Any, Final

from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.test_network_rules import policy_with
from x07_sandbox.guest.dns import NameTable
from x07_sandbox.network.rules import guest_view, make_allowlist
from x07_sandbox.network.settings import parse_settings
from x07_sandbox.policy.model import Db, DbNet, Drivers

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Network

SYNTHETIC: Final = IPv4Network("198.18.0.0/15")  # routed to the relay in the guest
PROGRAM: Final = IPv4Address("192.0.0.8")  # where a program's connections come from


def view(*hosts: tuple[str, tuple[int, ...]], **more: Any) -> Network:  # noqa: ANN401 - as policy_with has them
    """The relay's view of these hosts."""
    return guest_view(make_allowlist(policy_with(*hosts, **more)))


def ports(rows: list[list[Any]], address: str) -> set[int]:
    """The ports of an address in all rows."""
    at, same = int(ip_address(address)), [row for row in rows if (":" in row[0]) == (":" in address)]
    ranges = [(int(ip_address(first)), int(ip_address(last)), listed) for first, last, listed in same]
    return {port for first, last, listed in ranges if first <= at <= last for port in listed}


def test_each_name_has_an_address_of_its_own() -> None:
    """Each listed name has a stable address of its own, with its ports."""
    hosts = (("b.example", (443,)), ("A.example.", (80,)), ("faß.example", (22,)), ("a.example", (443,)))
    found = view(*hosts)
    assert found.names == {
        "a.example": "198.18.0.16",
        "b.example": "198.18.0.17",
        "xn--fa-hia.example": "198.18.0.18",
    }
    assert found.tcp == [
        ["198.18.0.16", "198.18.0.16", [80, 443]],
        ["198.18.0.17", "198.18.0.17", [443]],
        ["198.18.0.18", "198.18.0.18", [22]],
    ]
    assert found.udp == found.tcp
    assert view(*hosts) == found
    assert view(*reversed(hosts)).names == found.names


def test_ports_of_all_entries_that_match_a_name_are_united() -> None:
    """A name has the ports of all entries that match it."""
    found = view(("a.w.x.example", (22,)), ("*.w.x.example", (80,)), ("*.x.example", (443,)), ("A.w.x.example", (25,)))
    assert ports(found.tcp, found.names["a.w.x.example"]) == {22, 25, 80, 443}
    blocks = dict(found.wildcards)
    assert ports(found.tcp, blocks["w.x.example"]) == {80, 443}
    assert ports(found.tcp, blocks["x.example"]) == {443}


def test_wildcards_have_blocks_that_do_not_meet() -> None:
    """Each wildcard has a block of 256 addresses of its own."""
    found = view(("*.b.a.example", (22,)), ("*.a.example", (80,)), ("*.xa.example", (443,)))
    assert found.wildcards == [
        ["a.example", "198.18.4.0"],
        ["b.a.example", "198.18.5.0"],
        ["xa.example", "198.18.6.0"],
    ]
    assert [ports(found.tcp, f"198.18.{block}.255") for block in (4, 5, 6)] == [{80}, {22, 80}, {443}]


def test_addresses_networks_and_ranges_have_their_ports() -> None:
    """Listed addresses, networks and ranges have exactly their ports."""
    found = view(
        *(("93.184.215.14", (443,)), ("93.184.215.0/28", (80,)), ("93.184.216.3-93.184.216.9", (22,))),
        ("93.184.215.14", (25,)),
    )
    assert found.names == {}
    assert found.tcp == found.udp
    assert {at: ports(found.tcp, f"93.184.215.{at}") for at in (0, 14, 15, 16)} == {
        0: {80},
        14: {25, 80, 443},
        15: {80},
        16: set(),
    }
    assert [ports(found.tcp, f"93.184.216.{at}") for at in (2, 3, 9, 10)] == [set(), {22}, {22}, set()]


def test_ipv6_addresses_have_rows_of_their_own() -> None:
    """Listed IPv6 addresses form non-overlapping rows, and mapped IPv4 addresses IPv4 rows."""
    found = view(("2606:4700::1", (443,)), ("2606:4700::/126", (80,)), ("::ffff:93.184.215.14", (443,)))
    assert found.tcp == [
        ["93.184.215.14", "93.184.215.14", [443]],
        ["2606:4700::", "2606:4700::", [80]],
        ["2606:4700::1", "2606:4700::1", [80, 443]],
        ["2606:4700::2", "2606:4700::3", [80]],
    ]


def test_policy_switches_restrict_the_view() -> None:
    """allow_dns, allow_tcp and allow_udp each remove what they forbid."""
    hosts = (("a.example", (443,)), ("*.w.example", (443,)), ("93.184.215.14", (443,)))
    no_dns = view(*hosts, allow_dns=False)
    assert (no_dns.names, no_dns.wildcards) == ({}, [])
    assert no_dns.tcp == no_dns.udp == [["93.184.215.14", "93.184.215.14", [443]]]
    whole = view(*hosts)
    assert view(*hosts, allow_tcp=False) == whole._replace(tcp=[])
    assert view(*hosts, allow_udp=False) == whole._replace(udp=[])
    assert not any(view(*hosts, enabled=False))
    assert not any(view())


def test_database_servers_are_reached_over_tcp_only() -> None:
    """Servers of db.net are reachable over TCP only."""
    servers = DbNet(allow_dns=("db.example",), allow_cidrs=("93.184.215.0/24",), allow_ports=(5432,))
    db = Db(enabled=True, drivers=Drivers(sqlite=False, postgres=True, mysql=False), net=servers)
    found = view(("a.example", (443,)), db=db)
    assert ports(found.tcp, found.names["db.example"]) == {5432}
    assert ports(found.tcp, "93.184.215.7") == {5432}
    assert found.udp == [["198.18.0.16", "198.18.0.16", [443]]]


def test_an_entry_without_ports_makes_no_row() -> None:
    """A host without ports can be looked up but not connected to."""
    found = view(("a.example", ()))
    assert found.names == {"a.example": "198.18.0.16"}
    assert found.tcp == found.udp == []


LAST: Final = st.integers(0, 40)
NETWORKS: Final = st.one_of(
    st.builds("93.184.215.{}".format, LAST),
    st.builds("93.184.215.{}/{}".format, LAST, st.integers(24, 32)),
    st.builds(lambda low, more: f"93.184.215.{low}-93.184.215.{low + more}", LAST, LAST),
)


@given(st.lists(st.tuples(NETWORKS, st.just((443,))), min_size=1, max_size=4))
@example([("93.184.215.0/24", (443,)), ("93.184.215.14", (443,))])
@example([("93.184.215.0-93.184.215.9", (443,)), ("93.184.215.5-93.184.215.20", (443,))])
def test_no_two_rows_hold_one_address_and_port(hosts: list[tuple[str, tuple[int, ...]]]) -> None:
    """Rows never overlap, even if networks of the policy do."""
    found = sorted((IPv4Address(first), IPv4Address(last)) for first, last, _ in view(*hosts).tcp)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(found))


def test_a_network_opens_no_ports_of_names() -> None:
    """A listed network adds no ports to names."""
    found = view(("a.example", (443,)), ("0.0.0.0/0", (22,)))
    assert ports(found.tcp, found.names["a.example"]) == {443}


LABEL: Final = st.sampled_from(["a", "b", "c"])
NAME: Final = st.lists(LABEL, min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "example"]))
HOSTS: Final = st.lists(st.tuples(NAME | NAME.map(lambda name: f"*.{name}"), st.just((443,))), max_size=20)


@given(HOSTS)
def test_no_two_names_share_an_address(hosts: list[tuple[str, tuple[int, ...]]]) -> None:
    """Names and wildcard blocks have distinct addresses within the guest's network."""
    found = view(*hosts)
    names = [IPv4Address(address) for address in found.names.values()]
    blocks = [IPv4Network(f"{first}/24") for _, first in found.wildcards]
    assert len({*names, *blocks}) == len(names) + len(blocks)
    assert all(address in SYNTHETIC and address > PROGRAM for address in names)
    assert all(block.subnet_of(SYNTHETIC) and not any(name in block for name in names) for block in blocks)
    NameTable(found.names, [(suffix, first) for suffix, first in found.wildcards])  # the guest takes it


def test_the_longest_list_fits() -> None:
    """256 names or 256 wildcards fit into the guest's network."""
    names = view(*((f"n{number}.example", (443,)) for number in range(256))).names
    assert max(map(IPv4Address, names.values())) == IPv4Address("198.18.1.15")
    wildcards = view(*((f"*.n{number}.example", (443,)) for number in range(256))).wildcards
    assert max(IPv4Address(first) for _, first in wildcards) == IPv4Address("198.19.3.0")


def test_names_move_away_from_allowed_benchmark_addresses() -> None:
    """Names get addresses of another network if policy and settings allow addresses of the usual one."""
    policy = policy_with(
        ("198.18.7.7", (443,)), ("a.example", (80,)), ("fd78:3037::/126", (1,)), ("192.0.0.8/30", (1,))
    )
    usual = guest_view(make_allowlist(policy))
    assert usual.names == {"a.example": "198.18.0.16"}
    assert not ports(usual.tcp, "198.18.7.7")
    opened = parse_settings(b'[net]\nallow_special = ["198.18.0.0/15:443"]', "here")
    moved = guest_view(make_allowlist(policy, settings=opened))
    assert moved.names == {"a.example": "240.0.0.16"}
    assert [ports(moved.tcp, address) for address in ("198.18.7.7", "240.0.0.16")] == [{443}, {80}]
    for own in ("192.0.0.8", "192.0.0.9", "fd78:3037::", "fd78:3037::1"):
        assert not ports(moved.tcp, own)
    assert ports(moved.tcp, "192.0.0.10") == ports(moved.tcp, "fd78:3037::2") == {1}
    by_name = policy_with(("a.example", (80,)))
    assert guest_view(make_allowlist(by_name, settings=opened)).names == {"a.example": "198.18.0.16"}
