"""The decision on a connection and the guest's view of the list agree, in any spelling."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import TYPE_CHECKING, Any, Final

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.guest.dns import NameTable
from x07_sandbox.network.hosts import parse_guest_host
from x07_sandbox.network.rules import Request, decide, guest_view, make_allowlist, parse_request
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.model import Db, DbNet, Drivers, HostPorts, Policy

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Network
    from x07_sandbox.network.rules import DeniedHosts, Transport

OF_NAMES: Final = IPv4Network("198.18.0.0/15")  # the relay asks the gate by the name of such an address
PORTS: Final = st.sampled_from([22, 80, 443])
LABEL: Final = st.sampled_from(["a", "b", "faß", "x-1"])
NAME: Final = st.lists(LABEL, min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "example"]))
LAST: Final = st.integers(0, 255)
ADDRESS: Final = st.builds("93.184.{}.{}".format, st.sampled_from([215, 216]), LAST)
SPECIAL: Final = st.sampled_from(["10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.7.5"])
LOCAL: Final = st.sampled_from(["localhost", "nas.local", "a.internal", "intranet"])
IPV6: Final = st.sampled_from(["2606:4700::1", "::ffff:93.184.215.14", "::1"])
NETWORK: Final = st.one_of(
    st.builds("93.184.{}.{}/{}".format, st.sampled_from([215, 216]), LAST, st.integers(20, 32)),
    st.builds(lambda low, more: f"93.184.215.{low}-93.184.216.{more}", LAST, LAST),
    st.sampled_from(["64.0.0.0/2", "10.0.0.0/8", "2606:4700::/32"]),
)
HOST: Final = st.one_of(NAME, NAME.map(lambda name: f"*.{name}"), ADDRESS, NETWORK, SPECIAL, LOCAL, IPV6)
ENTRY: Final = st.tuples(HOST, st.sets(PORTS).map(tuple))
NET: Final = st.fixed_dictionaries({name: st.booleans() for name in ("allow_tcp", "allow_udp", "allow_dns")})
DATABASES: Final = st.none() | st.builds(
    lambda name, cidr: DbNet(allow_dns=(name,), allow_cidrs=(cidr,), allow_ports=(22,)), NAME, NETWORK
)
DENIED: Final = st.dictionaries(NAME | ADDRESS | NETWORK, st.none() | st.sets(PORTS, min_size=1), max_size=2)


def pattern_text(host: str) -> st.SearchStrategy[str]:
    """Spellings of one host."""
    if ":" in host:
        return st.sampled_from([host, host.upper(), f"[{host}]"])
    if host.rpartition(".")[2].isdigit():
        return st.sampled_from([host, f"::ffff:{host}", f"[::FFFF:{host}]"])
    upper = host.replace("ß", "ẞ").upper()  # Python's own upper case of ß is SS, which is another name
    forms = [host, upper, f"{host}.", f"{upper}.", host.replace(".", "\u3002")]
    forms += [host.replace("faß", "xn--fa-hia"), host.replace("faß", "XN--FA-HIA"), host.replace("a", "\uff41")]
    return st.sampled_from(forms)


def policy_with(hosts: Any, net: dict[str, bool], databases: DbNet | None) -> Policy:  # noqa: ANN401 - as hypothesis makes them
    """The default policy with these hosts."""
    base = default_policy()
    entries = tuple(HostPorts(host=host, ports=ports) for host, ports in hosts)
    db = base.db
    if databases is not None:
        db = Db(enabled=True, drivers=Drivers(sqlite=False, postgres=True, mysql=False), net=databases)
    return replace(base, net=replace(base.net, **net, allow_hosts=entries), db=db)


POLICY: Final = st.builds(policy_with, st.lists(ENTRY, max_size=5), NET, DATABASES)
OTHER_HOST: Final = st.one_of(NAME, ADDRESS, SPECIAL, LOCAL, IPV6, st.just("198.18.0.16"))


def transport() -> st.SearchStrategy[Transport]:
    """TCP or UDP."""
    return st.sampled_from(["tcp", "udp"])


def endpoint(host: str, port: int) -> str:
    """An argument for `x07 policy check --host`."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def request_for(host: str, port: int, transport: Transport) -> Request:
    """The request of a program."""
    return parse_request(endpoint(host, port), transport)


REQUEST: Final = st.builds(request_for, OTHER_HOST, PORTS, transport())


def asked_by_guest(view: Network, request: Request) -> bool:
    """Return whether the relay asks the gate, by the rules that the guest derives from its view."""
    host = request.host
    if isinstance(host, str):
        names = NameTable(view.names, [(suffix, first) for suffix, first in view.wildcards])
        found = names.address_of(host)
        if found is None:
            return False
        host = IPv4Address(found)
    elif host in OF_NAMES:
        return False
    rows = [(ip_address(first), ip_address(last), ports) for first, last, ports in getattr(view, request.transport)]
    return any(
        int(first) <= int(host) <= int(last) and request.port in ports
        for first, last, ports in rows
        if first.version == host.version
    )


@given(st.lists(ENTRY, min_size=1, max_size=4), ENTRY, NET, DATABASES, REQUEST)
def test_an_entry_adds_its_own_traffic_and_nothing_else(
    hosts: Any,  # noqa: ANN401 - as hypothesis makes them
    new: Any,  # noqa: ANN401 - as above
    net: dict[str, bool],
    databases: DbNet | None,
    request: Request,
) -> None:
    """An added entry allows its own traffic and nothing else, on the host and in the guest."""
    without = make_allowlist(policy_with(hosts, net, databases))
    alone = make_allowlist(policy_with([new], net, None))
    together = make_allowlist(policy_with([*hosts, new], net, databases))
    allowed = [decide(allowlist, request).allowed for allowlist in (without, alone, together)]
    assert allowed[2] == (allowed[0] or allowed[1])
    inside = [asked_by_guest(guest_view(allowlist), request) for allowlist in (without, alone, together)]
    assert inside[2] >= (inside[0] or inside[1])


@given(POLICY, DENIED, OTHER_HOST, PORTS, transport())
def test_the_guest_may_ask_for_what_is_allowed(
    policy: Policy, denied: DeniedHosts, host: str, port: int, transport: Transport
) -> None:
    """The guest may request everything that is allowed and nothing that the list refuses."""
    request = request_for(host, port, transport)
    allowlist = make_allowlist(policy, denied)
    decision = decide(allowlist, request)
    inside = asked_by_guest(guest_view(allowlist), request)
    if decision.allowed:
        assert inside
    elif inside:  # the guest does not know the rules beside the list; the gate refuses such a destination
        beside = ("deny-floor:", "local-name:", "deny-host:", "udp-443")
        assert decision.rule.startswith(beside), decision


@given(POLICY, DENIED, OTHER_HOST, PORTS, transport(), st.data())
def test_spellings_of_one_host_are_judged_alike(
    policy: Policy, denied: DeniedHosts, host: str, port: int, transport: Transport, data: st.DataObject
) -> None:
    """All spellings of a host get the same decision."""
    allowlist = make_allowlist(policy, denied)
    decision = decide(allowlist, request_for(host, port, transport))
    other = data.draw(pattern_text(host))
    assert decide(allowlist, request_for(other, port, transport)) == decision
    if other.isascii():
        by_guest = Request(host=parse_guest_host(other.encode()), port=port, transport=transport)
        assert decide(allowlist, by_guest) == decision
    for one, two in ((host, other), (other, host)):
        listed = make_allowlist(policy_with([(one, (port,))], {"allow_udp": True}, None))
        plain = make_allowlist(policy_with([(two, (port,))], {"allow_udp": True}, None))
        request = request_for(host, port, transport)
        assert decide(listed, request).allowed == decide(plain, request).allowed
        assert guest_view(listed) == guest_view(plain)
        hidden = make_allowlist(policy_with([(one, (port,))], {"allow_udp": True}, None), {two: None})
        assert not decide(hidden, request).allowed
