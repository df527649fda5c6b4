"""Normal form of hosts from policies, flags and guests.

A name becomes lower case, without a final dot, with international labels in ASCII form (UTS 46). An IPv4-mapped IPv6
address becomes the IPv4 address. If some programs parse a text as an address and others as a name (``127.1``,
``0x7f.1``, ``017700000001``), the text is an error.
"""

import re
from ipaddress import IPv4Address, IPv6Address
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

PORT_LAST: Final = 65_535
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
