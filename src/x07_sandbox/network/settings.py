"""The section `[net]` of the user's settings (host/user_settings), for permissions that no policy can grant.

Also the user's own certificate authorities, which programs in the guest trust in addition to those of the image.
"""

import base64
import re
import textwrap
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import read_bounded, settings_file
from x07_sandbox.host.user_settings import settings_bytes, settings_table
from x07_sandbox.network.hosts import ALLOWED_BY, kind_of, parse_host, parse_pattern
from x07_sandbox.network.rules import NetSettings, Proxy, opened_texts, parse_request
from x07_sandbox.policy.hosts import PORT_LAST, Addresses, split_port

LIMITS: Final = {  # the least and the greatest value of each limit
    "max_connections": (1, 512),
    "connections_per_second": (1, 1000),
    "max_pending": (1, 256),
    "idle_seconds": (1, 86_400),
}
_PROXY: Final = re.compile(r"http://(?:([^@/?#\s]*)@)?([^@/?#\s]+)/?", re.ASCII)
_CERTIFICATES_MAX: Final = 256 * 1024
_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")
_LISTS: Final = ("allow_local", "allow_special")
_SWITCHES: Final = ("allow_loopback", "allow_metadata")


def read_settings(path: Path | None = None) -> NetSettings:
    """Return the settings in the file, or the defaults if it is missing. Raises UsageError, HostError."""
    path = path or settings_file()
    data = settings_bytes(path)
    return NetSettings() if data is None else parse_settings(data, str(path))


def parse_settings(data: bytes, source: str) -> NetSettings:
    """Return the settings in a file's content. source: the file's name in errors. Raises UsageError."""
    what = f"cannot use {source}"
    net = settings_table(data, "net", source)
    for key in (*_SWITCHES, "proxy_resolves"):
        if not isinstance(net.get(key, False), bool):
            raise UsageError(what, f"net.{key} is not true or false", f"Set {key} = true or {key} = false")
    ports = _list(net, "opaque_ports", int, what)
    if any(isinstance(port, bool) or not 1 <= port <= PORT_LAST for port in ports):
        raise UsageError(what, "net.opaque_ports contains an invalid port", f"Use ports from 1 to {PORT_LAST}")
    fields: dict[str, Any] = {
        key: frozenset(_opened(text, key, net, what) for text in _list(net, key, str, what)) for key in _LISTS
    }
    ca = net.get("ca")
    if ca is not None and not (isinstance(ca, str) and ca.startswith("/")):
        raise UsageError(what, "net.ca is not an absolute path", "Write the path of a PEM file, from /")
    fields |= {"opaque_ports": frozenset(ports), "proxy": _proxy(net, what), "ca": None if ca is None else Path(ca)}
    return NetSettings(**fields, **_limits(net, what))


def _proxy(net: dict[str, Any], what: str) -> Proxy | None:
    """Return the proxy. The URL may contain a password, so no message contains the URL. Raises UsageError."""
    url, resolves = net.get("proxy"), net.get("proxy_resolves", False)
    if url is None:
        if resolves:
            raise UsageError(what, "net.proxy_resolves is true, but net.proxy is missing", "Add proxy, or remove it")
        return None
    found = _PROXY.fullmatch(url) if isinstance(url, str) else None
    try:
        request = parse_request(found[2]) if found is not None else None
    except UsageError:
        request = None
    if found is None or request is None:
        fix = 'Write proxy = "http://HOST:PORT" or "http://USER:PASSWORD@HOST:PORT", with %40 for @ in a password'
        raise UsageError(what, "net.proxy is not the URL of an HTTP proxy with a port", fix)
    words = base64.b64encode(unquote_to_bytes(found[1] or "")).decode()
    authorization = f"Basic {words}" if words else ""
    return Proxy(host=request.host, port=request.port, authorization=authorization, resolves=resolves)


def _limits(net: dict[str, Any], what: str) -> dict[str, Any]:
    limits = {key: net[key] for key in LIMITS if key in net}
    for key, value in limits.items():
        least, most = LIMITS[key]
        if type(value) is not int or not least <= value <= most:
            why = f"net.{key} is not a whole number from {least} to {most}"
            raise UsageError(what, why, f"Set {key} = {getattr(NetSettings(), key)}, the default, or remove it")
    return limits


def _list(net: dict[str, Any], key: str, kind: type, what: str) -> list[Any]:
    found = net.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        why = f"net.{key} is not a list of {'numbers' if kind is int else 'strings'}"
        raise UsageError(what, why, "Correct the file")
    return found


def _opened(text: str, key: str, net: dict[str, Any], what: str) -> tuple[Addresses, int]:
    """Return an entry of the list *key*. Raises UsageError if the entry is invalid or not allowed."""
    entry = f"the entry {text!r} of net.{key}"
    try:
        found, port = _addresses(text)
    except UsageError as exc:
        raise UsageError(what, f"{entry} is invalid ({exc.why})", exc.fix) from exc
    if found is None:
        raise UsageError(what, f"{entry} is not an address", "Use an address, not a name")
    for number in {found.first, found.last}:
        address = IPv4Address(number) if found.version == 4 else IPv6Address(number)  # noqa: PLR2004 - IPv4
        kind, why = kind_of(address)
        by = ALLOWED_BY.get(kind)
        fix = ""
        if not kind:
            fix, why = "Use an address of your own network. Other addresses need only a policy entry", "not special"
        elif by in _SWITCHES and key == "allow_local":
            if net.get(by) is not True:
                fix = f"To allow it, also set {by} = true in [net]"
            elif found.first != found.last:
                fix = "A network cannot include it. List the address by itself"
        elif by != key:
            to = "allow_special" if by == "allow_special" else "allow_local"
            fix = f"Move the entry to {to}" if by else f"Remove the entry {text!r}: it is always denied"
        if fix:
            raise UsageError(what, f"{address} is {why} ({entry})", fix)
    return found, port


def _addresses(text: str) -> tuple[Addresses | None, int]:
    """Parse ``ADDRESS:PORT``, also with a network or a range. Raises UsageError."""
    host, port = split_port(text)
    found = parse_pattern(host.removeprefix("[").removesuffix("]"))
    return found if isinstance(found, Addresses) else None, port


def settings_to_json(settings: NetSettings) -> dict[str, Any]:
    """Return the settings as JSON values."""
    proxy = settings.proxy
    return {
        **{key: opened_texts(getattr(settings, key)) for key in _LISTS},
        "opaque_ports": sorted(settings.opaque_ports),
        "proxy": None if proxy is None else {**msgspec.structs.asdict(proxy), "host": str(proxy.host)},
        **{key: getattr(settings, key) for key in LIMITS},
    }


def settings_from_json(words: dict[str, Any]) -> NetSettings:
    """Return the settings from `settings_to_json`. Raises UsageError if they are invalid."""
    fields: dict[str, Any] = {key: words[key] for key in LIMITS}
    for key in _LISTS:
        fields[key] = frozenset((found, port) for found, port in map(_addresses, words[key]) if found)
    return NetSettings(
        opaque_ports=frozenset(words["opaque_ports"]),
        proxy=words["proxy"] and Proxy(**{**words["proxy"], "host": parse_host(words["proxy"]["host"])}),
        **fields,
    )


def read_certificates(path: Path) -> bytes:
    """Return the certificates of a PEM file, without the text around them. Raises UsageError for any other content."""
    import ssl  # slow to import, and few runs need it

    what, fix = f"cannot use the certificates in {path}", "Use a PEM file that contains only certificates"
    text = read_bounded(path, "certificates", _CERTIFICATES_MAX).decode("utf-8", "replace")
    found = _CERTIFICATE.findall(text)
    if "PRIVATE KEY" in text:
        raise UsageError(what, "the file contains a private key", fix)
    if not found or "-----" in _CERTIFICATE.sub("", text):
        raise UsageError(what, "the file has no certificates, or also something else in PEM format", fix)
    lines = ("\n".join(textwrap.wrap("".join(one.split()), 64)) for one in found)
    pem = "".join(f"-----BEGIN CERTIFICATE-----\n{one}\n-----END CERTIFICATE-----\n" for one in lines)
    try:
        whole = all(map(_is_one_sequence, map(base64.b64decode, found)))
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as exc:
        raise UsageError(what, "a certificate is malformed", fix) from exc
    if not whole:
        raise UsageError(what, "a certificate is malformed", fix)
    return pem.encode()


def _is_one_sequence(der: bytes) -> bool:
    """Return whether *der* is one SEQUENCE and nothing more, since OpenSSL ignores what follows it (X.690, 8.1.3)."""
    head = 2 + (der[1] & 0x7F if der[1:2] >= b"\x80" else 0)
    return len(der) == head + int.from_bytes(der[2:head] or der[1:2])
