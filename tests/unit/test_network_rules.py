"""The allowlist: which connections it allows, by which rule, and what would allow a denied one."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.network.hosts import ALLOWED_BY
from x07_sandbox.network.rules import (
    Decision,
    Request,
    decide,
    decide_address,
    make_allowlist,
    parse_request,
    unreachable_entries,
)
from x07_sandbox.network.settings import parse_settings
from x07_sandbox.policy.changes import Overrides, derive_policy
from x07_sandbox.policy.decode import decode_policy, default_policy, render_policy
from x07_sandbox.policy.denials import HowToAllow
from x07_sandbox.policy.model import Db, DbNet, Drivers, HostPorts, Policy, PolicyError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from x07_sandbox.network.rules import Transport

ROOT = Path(__file__).parents[2]
GOOD = "93.184.215.14"  # an address that nothing in the floor holds
HOSTS = st.sampled_from(
    [
        *("example.org", "a.example.org", "b.a.example.org", "faß.example", "xn--fa-hia.example", GOOD),
        *("93.184.215.10-93.184.215.20", "93.184.215.0/24", "2606:4700::1111", "2606:4700::/32"),
        *("*.example.org", "*.a.example.org"),
    ]
)
ENTRIES = st.tuples(HOSTS, st.sets(st.sampled_from([22, 80, 443]), min_size=1).map(tuple))
REQUESTS = st.builds(
    lambda host, port, transport: parse_request(f"{host}:{port}", transport),
    st.sampled_from(
        [
            *("example.org", "A.example.org.", "b.a.example.org", "FAẞ.example", "localhost", GOOD, "93.184.215.200"),
            *("93.184.216.1", "[2606:4700::1111]", "[::ffff:93.184.215.14]", "10.0.0.1"),
        ]
    ),
    st.sampled_from([22, 80, 443]),
    st.sampled_from(["tcp", "udp"]),
)


def policy_with(*hosts: tuple[str, tuple[int, ...]], db: Db | None = None, **net: bool) -> Policy:
    """The default policy with hosts, UDP and databases."""
    base = default_policy()
    entries = tuple(HostPorts(host=host, ports=ports) for host, ports in hosts)
    policy = replace(base, net=replace(base.net, **({"allow_udp": True} | net), allow_hosts=entries))
    return policy if db is None else replace(policy, db=db)


def ask(
    policy: Policy,
    endpoint: str,
    transport: Transport = "tcp",
    denied: Mapping[str, Collection[int] | None] | None = None,
) -> Decision:
    """The decision about *endpoint*."""
    return decide(make_allowlist(policy, denied), parse_request(endpoint, transport))


def rule(*args: Any, **words: Any) -> tuple[bool, str]:  # noqa: ANN401 - as ask has them
    """Return whether it is allowed, and by which rule."""
    found = ask(*args, **words)
    return found.allowed, found.rule


def resolved(
    policy: Policy, name: str, address: str, denied: Mapping[str, Collection[int] | None] | None = None
) -> str:
    """The rule that refuses *address* for the listed *name*, or ""."""
    allowlist = make_allowlist(policy, denied)
    first = decide(allowlist, parse_request(f"{name}:443"))
    assert first.allowed
    found = decide_address(allowlist, first, ip_address(address))
    return "" if found.allowed else found.rule


def test_nothing_is_allowed_without_a_list() -> None:
    """Without net.enabled or with an empty net.allow_hosts every connection is denied."""
    assert rule(policy_with(("example.org", (443,)), enabled=False), "example.org:443") == (False, "net.enabled")
    assert rule(default_policy(), "example.org:443") == (False, "net.allow_hosts")


def test_a_listed_name_is_allowed_with_its_ports_only() -> None:
    """An entry allows exactly its host and ports."""
    policy = policy_with(("other.example", (1,)), ("example.org", (80, 443)))
    assert rule(policy, "Example.ORG.:443") == (True, "net.allow_hosts[1]")
    assert rule(policy, "example.org:22") == (False, "net.allow_hosts[1].ports")
    for other in ("example.org.evil.test", "xexample.org", "a.example.org", "org.example"):
        assert rule(policy, f"{other}:443") == (False, "net.allow_hosts")


def test_entries_of_one_host_are_united() -> None:
    """The ports of all matching entries are allowed, and an exact entry is named first."""
    policy = policy_with(("*.example.org", (80, 443)), ("a.example.org", (443,)), ("A.example.org.", (22,)))
    assert rule(policy, "a.example.org:443") == (True, "net.allow_hosts[1]")
    assert rule(policy, "a.example.org:22") == (True, "net.allow_hosts[2]")
    assert rule(policy, "a.example.org:80") == (True, "net.allow_hosts[0]")
    assert ask(policy, "a.example.org:25").reason == (
        "a.example.org is listed, but not with port 25 (only 22, 80, 443)"
    )


def test_networks_and_ranges_allow_addresses_that_are_asked_for() -> None:
    """A network or range allows exactly its addresses."""
    policy = policy_with(("93.184.215.0/28", (443,)), ("2606:4700::1-2606:4700::9", (53,)))
    assert rule(policy, "93.184.215.15:443") == (True, "net.allow_hosts[0]")
    assert rule(policy, "[::ffff:93.184.215.15]:443") == (True, "net.allow_hosts[0]")
    assert rule(policy, "[2606:4700::9]:53", "udp") == (True, "net.allow_hosts[1]")
    assert rule(policy, "93.184.215.16:443") == (False, "net.allow_hosts")
    assert rule(policy, "[2606:4700::a]:53") == (False, "net.allow_hosts")


def test_policy_switches_are_enforced() -> None:
    """allow_tcp, allow_udp and allow_dns each deny what they forbid."""
    hosts = (("example.org", (53,)), (GOOD, (53,)))
    assert rule(policy_with(*hosts, allow_tcp=False), f"{GOOD}:53") == (False, "net.allow_tcp")
    assert rule(policy_with(*hosts, allow_udp=False), f"{GOOD}:53", "udp") == (False, "net.allow_udp")
    assert rule(policy_with(*hosts, allow_dns=False), "example.org:53") == (False, "net.allow_dns")
    assert rule(policy_with(*hosts, allow_dns=False), f"{GOOD}:53") == (True, "net.allow_hosts[1]")


def test_udp_uses_the_ports_of_an_entry_but_quic_is_denied() -> None:
    """UDP may use the ports of an entry, except 443."""
    policy = policy_with(("example.org", (53, 443)))
    assert rule(policy, "example.org:53", "udp") == (True, "net.allow_hosts[0]")
    assert rule(policy, "example.org:443", "udp") == (False, "udp-443")
    assert rule(policy, "example.org:443") == (True, "net.allow_hosts[0]")


SPECIAL = """
metadata 169.254.169.254 168.63.129.16 100.100.100.200 fd00:ec2::254 fd20:ce::254 ::ffff:169.254.169.254
metadata 169.254.170.2 169.254.170.23 fd00:ec2::23 192.0.0.192 169.254.0.23 fe80::a9fe:a9fe 64:ff9b::a9fe:aa02
loopback 127.0.0.1 127.255.255.255 ::1 ::ffff:127.0.0.1
unspecified 0.0.0.0 0.1.2.3 ::
private 64:ff9b::a00:1 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 fc00::1 fd12:3456::1 fec0::1 ::ffff:10.0.0.1
shared 100.64.0.1 100.127.255.255
link-local 169.254.1.1 fe80::1 febf::1
multicast 224.0.0.1 239.255.255.255 ff02::1
benchmark 198.18.0.16 198.19.255.255
documentation 192.0.2.1 198.51.100.1 203.0.113.1 2001:db8::1 3fff::1
embedded ::7f00:1 64:ff9b:1::1 2001::1 2002:7f00:1:: 2002:a00:1::
special 192.0.0.8 192.31.196.1 192.52.193.1 192.88.99.1 192.175.48.1 100::1 2001:1ff::1 5f00::1
reserved 240.0.0.1 255.255.255.255 4000::1 1::1 200::1 e000::1
"""


@pytest.mark.parametrize("line", SPECIAL.strip().splitlines())
def test_special_addresses_are_denied_whatever_lists_them(line: str) -> None:
    """Special addresses are denied even if listed, also as the address of a listed name."""
    kind, *addresses = line.split()
    policy = policy_with(("0.0.0.0/0", (443,)), ("::/0", (443,)), ("example.org", (443,)))
    for address in addresses:
        found = ask(policy, f"[{address}]:443" if ":" in address else f"{address}:443")
        assert (found.allowed, found.rule) == (False, f"deny-floor:{kind}"), address
        setting = found.how_to_allow.setting if found.how_to_allow else None
        assert (setting is not None) == (kind in ALLOWED_BY and kind != "loopback"), address
        assert resolved(policy, "example.org", address) == f"deny-floor:{kind}", address


NEIGHBOURS = """
1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 172.15.255.255
172.32.0.0 192.0.1.0 198.17.255.255 198.20.0.0 223.255.255.255 168.63.129.17
[2000::1] [2001:200::1] [2003::1] [2620::1] [3ffe::1] [3fff:1000::1]
"""


def test_neighbours_of_special_addresses_are_not_denied() -> None:
    """Addresses next to special networks are not denied."""
    policy = policy_with(("0.0.0.0/0", (443,)), ("::/0", (443,)))
    for address in NEIGHBOURS.split():
        assert ask(policy, f"{address}:443").allowed, address


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("localhost", "localhost"),
        ("a.LOCALHOST.", "localhost"),
        ("printer.local", "local"),
        ("metadata.google.internal", "internal"),
        ("nas.home.arpa", "home.arpa"),
        ("home.arpa", "home.arpa"),
        ("x.onion", "onion"),
        ("intranet", "single-label"),
    ],
)
def test_local_names_are_denied_whatever_lists_them(name: str, suffix: str) -> None:
    """Local names and names without a dot are denied even if listed."""
    found = ask(policy_with((name, (443,)), ("*.google.internal", (443,))), f"{name}:443")
    assert (found.allowed, found.rule) == (False, f"local-name:{suffix}")
    assert (found.how_to_allow is None) == (suffix in {"localhost", "onion"})


def test_special_hosts_are_listed_until_the_settings_allow_them() -> None:
    """Each special host of a policy is named with the settings that would allow it, until they do."""
    hosts = (("host.x07", (80,)), ("198.18.0.5", (80,)), ("fd00::5", (80,)), ("224.0.0.1", (80,)), (GOOD, (80,)))
    found = [why for _, why in unreachable_entries(make_allowlist(policy_with(*hosts)))]
    assert [why.partition("; to allow it, set ")[2] for why in found] == [
        'allow_loopback = true and allow_local = ["127.0.0.1:80"]',
        'allow_special = ["198.18.0.5:80"]',
        'allow_local = ["[fd00::5]:80"]',
        "",
    ]
    text = b"""[net]
allow_loopback = true
allow_local = ["127.0.0.1:80", "[fd00::/8]:80"]
allow_special = ["198.18.0.5:80"]
"""
    opened = make_allowlist(policy_with(*hosts), settings=parse_settings(text, "here"))
    assert [why for _, why in unreachable_entries(opened)] == ["224.0.0.1 is a multicast address"]
    for host in ("host.x07", "198.18.0.5", "[fd00::5]"):
        assert decide(opened, parse_request(f"{host}:80")).allowed
        assert not decide(opened, parse_request(f"{host}:81")).allowed
    assert not decide(opened, parse_request("[fd00:ec2::254]:80")).allowed


def test_all_malformed_hosts_are_reported() -> None:
    """All malformed hosts of a list are reported at once with their places."""
    hosts = (("*", (80,)), ("example.org", (80,)), ("*.org", (80,)), ("127.1", (80,)))
    with pytest.raises(PolicyError) as caught:
        make_allowlist(policy_with(*hosts))
    assert [problem.json_path for problem in caught.value.problems] == [f"$.net.allow_hosts[{n}]" for n in (0, 2, 3)]
    assert make_allowlist(policy_with(*hosts, enabled=False)).entries == ()


def test_database_servers_join_the_list() -> None:
    """Servers of db.net are allowed over TCP, also if net.allow_hosts is empty."""
    servers = DbNet(allow_dns=("db.example",), allow_cidrs=("93.184.215.0/24",), allow_ports=(5432,))
    db = Db(enabled=True, drivers=Drivers(sqlite=False, postgres=True, mysql=False), net=servers)
    policy = policy_with(("example.org", (443,)), db=db)
    assert rule(policy, "db.example:5432") == (True, "db.net.allow_dns[0]")
    assert rule(policy, f"{GOOD}:5432") == (True, "db.net.allow_cidrs[0]")
    assert rule(policy, "db.example:5433") == (False, "db.net.allow_ports")
    assert rule(policy, "db.example:5432", "udp") == (False, "net.allow_hosts")
    off = policy_with(("example.org", (443,)), db=replace(db, enabled=False))
    assert rule(off, "db.example:5432") == (False, "net.allow_hosts")
    assert rule(policy_with(db=db), "db.example:5432") == (True, "db.net.allow_dns[0]")
    assert rule(policy_with(db=db, enabled=False), "db.example:5432") == (False, "net.enabled")


def test_denials_come_before_the_list() -> None:
    """A denied host stays denied whatever lists it, in every spelling."""
    policy = policy_with(("*.example.org", (80, 443)), ("93.184.215.0/24", (443,)), ("faß.example", (443,)))
    denied = {"Bad.example.org.": [443], "93.184.215.14": None, "XN--FA-HIA.example": None}
    assert rule(policy, "bad.example.org:443", denied=denied) == (False, "deny-host:bad.example.org")
    assert rule(policy, "bad.example.org:80", denied=denied) == (True, "net.allow_hosts[0]")
    assert rule(policy, "good.example.org:443", denied=denied) == (True, "net.allow_hosts[0]")
    assert rule(policy, f"[::ffff:{GOOD}]:443", denied=denied) == (False, f"deny-host:{GOOD}")
    assert rule(policy, "faß.example:443", denied=denied) == (False, "deny-host:xn--fa-hia.example")
    with pytest.raises(UsageError):
        make_allowlist(policy, {"127.1": None})


def test_a_name_is_never_allowed_by_the_rule_of_an_address() -> None:
    """A name is never allowed by an entry for addresses."""
    policy = policy_with(("0.0.0.0/0", (443,)), ("::/0", (443,)), ("example.org", (443,)))
    assert rule(policy, "other.example:443") == (False, "net.allow_hosts")
    allowlist = make_allowlist(policy, {"example.org": None})
    denied = decide(allowlist, parse_request("example.org:443"))
    assert denied.rule == "deny-host:example.org"
    assert decide_address(allowlist, denied, ip_address(GOOD)) == denied


def test_an_address_of_a_listed_name_is_not_listed() -> None:
    """The address of a listed name cannot be requested as an address."""
    policy = policy_with(("example.org", (443,)))
    assert resolved(policy, "example.org", GOOD) == ""
    assert rule(policy, f"{GOOD}:443") == (False, "net.allow_hosts")


def test_a_denied_address_is_denied_for_every_name() -> None:
    """A listed name cannot reach a denied address, and the reason names both."""
    policy = policy_with(("example.org", (443,)))
    assert resolved(policy, "example.org", GOOD, {"93.184.215.0/24": [443]}) == "deny-host:93.184.215.0-93.184.215.255"
    assert resolved(policy, "example.org", f"::ffff:{GOOD}", {GOOD: None}) == f"deny-host:{GOOD}"
    assert resolved(policy, "example.org", GOOD, {GOOD: [80]}) == ""
    for denied in (GOOD, "64:ff9b::/96"):
        assert resolved(policy, "example.org", "64:ff9b::5db8:d70e", {denied: None}).startswith("deny-host:")
    allowlist = make_allowlist(policy)
    found = decide_address(allowlist, decide(allowlist, parse_request("example.org:443")), ip_address("10.0.0.1"))
    assert found.reason == "example.org resolves to 10.0.0.1, and 10.0.0.1 is a private address"


@pytest.mark.parametrize(
    "text", ["", "example.org", ":443", "example.org:0", "example.org:65536", "a:\uff18", "::1:80"]
)
def test_a_request_needs_a_host_and_a_port(text: str) -> None:
    """A request without a valid host and port is an error with a fix."""
    with pytest.raises(UsageError, match=r"Write HOST:PORT|Use a name"):
        parse_request(text)


def test_a_denial_names_what_would_allow_it() -> None:
    """A denied connection names the policy value and the flag that would allow it."""
    policy = policy_with(("example.org", (443,)))
    assert ask(policy, "[2606:4700::1]:22").how_to_allow == HowToAllow(
        json_path="$.net.allow_hosts",
        value=[{"host": "example.org", "ports": [443]}, {"host": "2606:4700::1", "ports": [22]}],
        flag="--allow-host '[2606:4700::1]:22'",
    )
    no_udp = ask(policy_with(allow_udp=False), "example.org:53", "udp")
    assert no_udp.how_to_allow == HowToAllow(json_path="$.net.allow_udp", value=True)
    full = policy_with(*((f"h{n}.example", (443,)) for n in range(256)))
    assert ask(full, "example.org:443").how_to_allow is None


@given(st.lists(ENTRIES, max_size=4), st.fixed_dictionaries({"allow_udp": st.booleans(), "allow_dns": st.booleans()}))
def test_following_the_advice_allows_the_connection(hosts: Any, net: Any) -> None:  # noqa: ANN401 - as hypothesis makes them
    """Following how_to_allow keeps the policy valid and finally allows the connection."""
    policy = policy_with(*hosts, **net, enabled=False, allow_tcp=False)
    for request in (parse_request("new.example:8443"), parse_request(f"{GOOD}:53", "udp")):
        current = policy
        for _ in range(5):
            decision = decide(make_allowlist(current), request)
            if decision.allowed:
                break
            assert decision.how_to_allow is not None
            document = msgspec.json.decode(msgspec.json.encode(current))
            name = str(decision.how_to_allow.json_path).removeprefix("$.net.")
            document["net"][name] = decision.how_to_allow.value
            current = decode_policy(msgspec.json.encode(document), source="followed")
        assert decide(make_allowlist(current), request).allowed


@given(st.lists(ENTRIES, max_size=4), st.dictionaries(HOSTS, st.none() | st.just((443,)), max_size=3), REQUESTS)
def test_a_denial_never_allows_more(hosts: Any, denied: Any, request: Request) -> None:  # noqa: ANN401 - as above
    """A denial never allows anything more."""
    policy = policy_with(*hosts)
    with_denials = decide(make_allowlist(policy, denied), request)
    assert not with_denials.allowed or decide(make_allowlist(policy), request).allowed
    only = policy_with(*((host, ports or (22, 80, 443)) for host, ports in denied.items()))
    if denied and decide(make_allowlist(only), request).allowed:
        assert not with_denials.allowed


@pytest.mark.parametrize("path", sorted((ROOT / "examples/hosts").iterdir()), ids=lambda path: path.name)
def test_the_lists_of_hosts_in_examples_are_sound(path: Path) -> None:
    """Every file in examples/hosts allows each of its hosts and ports."""
    flags = Overrides(allow_host_file=(str(path),))
    base = default_policy()
    derived = derive_policy(
        base, render_policy(base), "the default", flags, read_spec_file=lambda name: Path(name).read_bytes()
    )
    policy = derived.policy
    allowlist = make_allowlist(policy)
    assert policy.net.allow_hosts
    for entry in policy.net.allow_hosts:
        assert all(decide(allowlist, Request(host=entry.host, port=port)).allowed for port in entry.ports)
