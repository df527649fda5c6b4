"""Hosts: the normal form of names and addresses, IPv4 addresses inside IPv6 (NAT64), and hosts that are always denied.

A name becomes lower case, without a final dot, with international labels in ASCII form (UTS 46). An IPv4-mapped IPv6
address becomes the IPv4 address. If some programs parse a text as an address and others as a name (``127.1``,
``0x7f.1``, ``017700000001``), the text is an error.

A translator of the network (NAT64) forwards an IPv6 address to the IPv4 address embedded in it (RFC 6052). A network
announces its prefixes in the IPv6 addresses of ``ipv4only.arpa``, which embed a well-known IPv4 address (RFC 7050).

No policy can allow names and addresses of this host, its networks and cloud, and reserved ones. ``is_global`` and
``is_private`` of ``ipaddress`` are not used. They differ between Python versions, and treat multicast, 6to4 and a
cloud's metadata service as global.
"""

import re
from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from typing import Final, NoReturn

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.hosts import Addresses, addresses

Address = IPv4Address | IPv6Address
Host = str | Address
"""A name, or an address."""


class Wildcard(msgspec.Struct, frozen=True):
    """All names below *suffix*, at any depth, but not the suffix itself."""

    suffix: str


Pattern = str | Wildcard | Addresses
"""Meaning of an allowlist entry."""

_TEXT_MAX: Final = 255  # characters, as in a policy
_NAME_MAX: Final = 253
_LABEL_MAX: Final = 63
_LABEL: Final = re.compile(r"[a-z0-9_-]*")
# A network or a range; excludes netmasks and zones, which ipaddress accepts.
_ADDRESSES: Final = re.compile(r"[0-9A-Fa-f:.]+(?:/[0-9]{1,3}|-[0-9A-Fa-f:.]+)")
_FIX: Final = "Use a name such as example.org, or an address such as 192.0.2.7 or [2001:db8::1]"
_FIX_PATTERN: Final = f"{_FIX}, a network (192.0.2.0/24), a range (192.0.2.1-192.0.2.9) or *.example.org"


def parse_host(text: str) -> Host:
    """Return the normal form of a name or an address. Raises UsageError for any other text."""
    if len(text) > _TEXT_MAX:
        _refuse(text, f"it has more than {_TEXT_MAX} characters")
    if ":" in text or text.startswith("["):
        return _ipv6(text)
    try:
        return IPv4Address(text)
    except ValueError:
        return _name(text)


def parse_guest_host(data: bytes) -> Host:
    """Return the normal form of a host in a guest's request. Raises UsageError if it is no ASCII name or address."""
    try:
        text = data[: _TEXT_MAX + 1].decode("ascii")
    except UnicodeDecodeError:
        _refuse(repr(data[:_TEXT_MAX]), "it is not ASCII text")
    return parse_host(text)


def parse_pattern(text: str) -> Pattern:
    """Parse an allowlist entry: a host, ``*.example.org``, a network or a range. Raises UsageError otherwise."""
    if "*" in text:
        suffix = parse_host(text.removeprefix("*.")) if text.startswith("*.") and text.count("*") == 1 else None
        if not isinstance(suffix, str) or "." not in suffix:
            why = "'*' must be the whole first label, followed by at least two labels"
            _refuse(text, why, _FIX_PATTERN)
        return Wildcard(suffix)
    if _ADDRESSES.fullmatch(text) and (found := addresses(text)) is not None:
        return found
    if "/" in text:
        _refuse(text, "it is not a network", _FIX_PATTERN)
    host = parse_host(text)
    return host if isinstance(host, str) else Addresses(host.version, int(host), int(host))


def unmapped(address: Address) -> Address:
    """Return the IPv4 address in an IPv4-mapped IPv6 address; any other address unchanged."""
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def matches(pattern: Pattern, host: Host) -> bool:
    """Return whether *host* matches *pattern*. Names never match addresses, and addresses never match names."""
    if isinstance(pattern, Addresses):
        same = not isinstance(host, str) and host.version == pattern.version
        return same and pattern.first <= int(host) <= pattern.last
    if isinstance(pattern, Wildcard):
        return isinstance(host, str) and host.endswith(f".{pattern.suffix}")
    return pattern == host


def pattern_text(pattern: Pattern | Host) -> str:
    """Return the text of a host or a pattern."""
    if isinstance(pattern, Wildcard):
        return f"*.{pattern.suffix}"
    if isinstance(pattern, Addresses):
        kind = IPv4Address if pattern.version == 4 else IPv6Address  # noqa: PLR2004 - IPv4
        first, last = kind(pattern.first), kind(pattern.last)
        return str(first) if first == last else f"{first}-{last}"
    return str(pattern)


def _ipv6(text: str) -> Address:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if "%" in inner:
        _refuse(text, "IPv6 zones are not supported")
    try:
        return unmapped(IPv6Address(inner))
    except ValueError:
        _refuse(text, "it is not an IPv6 address")


def _name(text: str) -> str:
    name = (text if text.isascii() else _to_ascii(text)).lower().removesuffix(".")
    if len(name) > _NAME_MAX:
        _refuse(text, f"a name has at most {_NAME_MAX} bytes")
    labels = name.split(".")
    for label in labels:
        if not 0 < len(label) <= _LABEL_MAX:
            _refuse(text, f"each part between dots must have 1 to {_LABEL_MAX} bytes")
        if not _LABEL.fullmatch(label):
            _refuse(text, "a name contains only letters, digits, '-', '_' and dots")
        if label.startswith("xn--") and not _is_international(label):
            _refuse(text, f"{label} is not a valid international label")
    # getaddrinfo accepts these as addresses. Checked after UTS 46, which converts full-width digits.
    if labels[-1].isdigit() or labels[-1].startswith("0x"):
        _refuse(text, "it looks like an address but is not in standard form")
    return name


def _to_ascii(text: str) -> str:
    from idna import encode

    try:
        return encode(text, uts46=True, std3_rules=True).decode()
    except (ValueError, ArithmeticError, LookupError) as exc:  # as in _is_international
        _refuse(text, f"it is not a valid international name ({exc})")


def _is_international(label: str) -> bool:
    from idna import alabel, ulabel

    try:
        return alabel(ulabel(label)).decode() == label
    except (ValueError, ArithmeticError, LookupError):  # IDNAError, and errors of Python's punycode
        return False


def _refuse(text: str, why: str, fix: str = _FIX) -> NoReturn:
    shown = text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}..."
    raise UsageError(f"cannot use the host {shown!r}", why, fix) from None


# NAT64

NAT64_NAME: Final = "ipv4only.arpa"
_NAT64_WELL_KNOWN: Final = IPv6Network("64:ff9b::/96")
_IPV4_ONLY: Final = frozenset(map(IPv4Address, ("192.0.0.170", "192.0.0.171")))
# The bytes of an IPv6 address that hold the IPv4 address, by the length of the prefix. Byte 8 is always left out.
_NAT64_BYTES: Final = {
    32: (4, 5, 6, 7),
    40: (5, 6, 7, 9),
    48: (6, 7, 9, 10),
    56: (7, 9, 10, 11),
    64: (9, 10, 11, 12),
    96: (12, 13, 14, 15),
}


def nat64_prefixes(answers: Iterable[Address]) -> set[IPv6Network]:
    """Return the prefixes that addresses of ``ipv4only.arpa`` announce: every length at which one of them fits."""
    return {
        IPv6Network((int(address), length), strict=False)
        for address in answers
        if isinstance(address, IPv6Address)
        for length in _NAT64_BYTES
        if _embedded_at(address, length) in _IPV4_ONLY
    }


def embedded_ipv4(address: Address, known: Collection[IPv6Network]) -> list[IPv4Address]:
    """Return the IPv4 addresses that translators with the *known* or the well-known prefix read from *address*."""
    if not isinstance(address, IPv6Address):
        return []
    return [_embedded_at(address, one.prefixlen) for one in (_NAT64_WELL_KNOWN, *known) if address in one]


def _embedded_at(address: IPv6Address, length: int) -> IPv4Address:
    packed = address.packed
    return IPv4Address(bytes(packed[at] for at in _NAT64_BYTES[length]))


# always denied

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
    if address in _NAT64_WELL_KNOWN:
        (address,) = embedded_ipv4(address, ())
    for kind, what, networks in _FLOOR:
        if any(address in network for network in networks):
            return kind, what
    outside = address.version == _UNICAST.version and address not in _UNICAST
    return ("reserved", "a reserved address") if outside else ("", "")
