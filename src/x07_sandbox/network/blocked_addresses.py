"""Addresses and names that no policy can allow: those of this host, its networks and cloud, and reserved ones.

``is_global`` and ``is_private`` of ``ipaddress`` are not used. They differ between Python versions, and treat
multicast, 6to4 and a cloud's metadata service as global.
"""

from ipaddress import IPv4Address, IPv6Network, ip_network
from typing import Final

from x07_sandbox.network import nat64
from x07_sandbox.network.names import Address, Host
from x07_sandbox.policy.hosts import Addresses

# Services that give a machine's credentials or settings to every program on it.
_METADATA: Final = (
    "169.254.169.254",  # AWS, Azure, Google, Oracle, OpenStack, DigitalOcean, Hetzner and most others
    *("fd00:ec2::254", "169.254.170.2"),  # AWS: instance metadata, ECS task credentials
    *("169.254.170.23", "fd00:ec2::23"),  # AWS: EKS pod identity
    *("169.254.169.253", "fd00:ec2::253", "169.254.169.123", "fd00:ec2::123"),  # AWS: DNS, time
    "168.63.129.16",  # Azure: virtual machine agent, DNS
    *("fd20:ce::254", "169.254.169.252"),  # Google: instance metadata, Kubernetes Engine
    *("192.0.0.192", "fd00:c1::a9fe:a9fe"),  # Oracle
    *("100.100.100.200", "fd00:100::100:200"),  # Alibaba
    "169.254.0.23",  # Tencent
    "100.96.0.96",  # Volcengine
    "fe80::a9fe:a9fe",  # OpenStack
    "fd00:a9fe:a9fe::1",  # Akamai (Linode)
    *("169.254.42.42", "fd00:42::42"),  # Scaleway
    "192.80.8.124",  # Equinix Metal
)
# Kind, description and networks; the first match counts.
_FLOOR: Final = tuple(
    (kind, what, tuple(map(ip_network, networks.split())))
    for kind, what, networks in (
        ("metadata", "a cloud metadata service", " ".join(_METADATA)),
        ("loopback", "a loopback address, which inside the sandbox is the program's own", "127.0.0.0/8 ::1/128"),
        ("unspecified", "an unspecified address", "0.0.0.0/8 ::/128"),
        ("private", "a private address", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10"),
        ("shared", "an address of a provider's NAT", "100.64.0.0/10"),
        ("link-local", "a link-local address", "169.254.0.0/16 fe80::/10"),
        ("multicast", "a multicast address", "224.0.0.0/4 ff00::/8"),
        ("benchmark", "a benchmark address", "198.18.0.0/15"),
        (
            "documentation",
            "a documentation address",
            "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20",
        ),
        (
            "embedded",
            "an IPv6 address with an embedded IPv4 address",
            "::/96 64:ff9b:1::/48 2001::/32 2002::/16",
        ),
        (
            "special",
            "a special-purpose address",
            "192.0.0.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.175.48.0/24 100::/64 2001::/23 5f00::/16",
        ),
        ("reserved", "a reserved address", "240.0.0.0/4"),
    )
)
# The settings that can allow a kind of address. Kinds that are missing here are always denied.
ALLOWED_BY: Final = {
    **dict.fromkeys(("private", "shared", "link-local"), "allow_local"),
    **dict.fromkeys(("documentation", "benchmark"), "allow_special"),
    "loopback": "allow_loopback",
    "metadata": "allow_metadata",
}
HOST_NAME: Final = "host.x07"
"""The name of this host in a sandbox. It stands for HOST_ADDRESS and is never looked up."""
HOST_ADDRESS: Final = IPv4Address("127.0.0.1")
_UNICAST: Final = IPv6Network("2000::/3")
# Names with a meaning only on one machine or network, whatever a resolver returns.
_LOCAL_SUFFIXES: Final = ("localhost", "local", "internal", "home.arpa", "onion", HOST_NAME)


def special(host: Host) -> tuple[str, str] | None:
    """Return the rule id and the reason if *host* is always denied, or None if it is not."""
    if isinstance(host, str):
        for suffix in _LOCAL_SUFFIXES:
            if host == suffix or host.endswith(f".{suffix}"):
                return f"local-name:{suffix}", f"{host} is a name of this host or a local network"
        single = f"{host} has no dot and is therefore a local name"
        return None if "." in host else ("local-name:single-label", single)
    kind, what = kind_of(host)
    return (f"deny-floor:{kind}", f"{host} is {what}") if kind else None


def special_within(addresses: Addresses) -> tuple[str, ...]:
    """Return a clause for each part of an address range that is always denied."""
    found = []
    for _, what, networks in _FLOOR:
        for network in networks:
            first, last = int(network[0]), int(network[-1])
            if network.version == addresses.version and first <= addresses.last and addresses.first <= last:
                found.append(f"{network} is {what}")
    return tuple(found)


def kind_of(address: Address) -> tuple[str, str]:
    """Return the kind of a special address and its description, or two empty texts."""
    if address in nat64.WELL_KNOWN:
        (address,) = nat64.embedded(address, ())
    for kind, what, networks in _FLOOR:
        if any(address in network for network in networks):
            return kind, what
    outside = address.version == _UNICAST.version and address not in _UNICAST
    return ("reserved", "a reserved address") if outside else ("", "")
