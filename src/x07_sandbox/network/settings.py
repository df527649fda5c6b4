"""The section `[net]` of the user's settings (host/user_settings), for permissions that no policy can grant."""

from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import settings_file
from x07_sandbox.host.user_settings import settings_bytes, settings_table
from x07_sandbox.network.blocked_addresses import ALLOWED_BY, kind_of
from x07_sandbox.network.names import PORT_LAST, parse_pattern
from x07_sandbox.network.rules import NetSettings, opened_texts, split_port
from x07_sandbox.policy.hosts import Addresses

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
    for key in _SWITCHES:
        if not isinstance(net.get(key, False), bool):
            raise UsageError(what, f"net.{key} is not true or false", f"Set {key} = true or {key} = false")
    ports = _list(net, "opaque_ports", int, what)
    if any(isinstance(port, bool) or not 1 <= port <= PORT_LAST for port in ports):
        raise UsageError(what, "net.opaque_ports contains an invalid port", f"Use ports from 1 to {PORT_LAST}")
    opened = {key: frozenset(_opened(text, key, net, what) for text in _list(net, key, str, what)) for key in _LISTS}
    return NetSettings(**opened, opaque_ports=frozenset(ports))


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


def settings_to_json(settings: NetSettings) -> dict[str, list[Any]]:
    """Return the settings as JSON values."""
    opened = {key: opened_texts(getattr(settings, key)) for key in _LISTS}
    return {**opened, "opaque_ports": sorted(settings.opaque_ports)}


def settings_from_json(words: dict[str, list[Any]]) -> NetSettings:
    """Return the settings from `settings_to_json`. Raises UsageError if they are invalid."""
    opened = {key: [_addresses(text) for text in words[key]] for key in _LISTS}
    return NetSettings(
        **{key: frozenset((what, port) for what, port in found if what) for key, found in opened.items()},
        opaque_ports=frozenset(words["opaque_ports"]),
    )
