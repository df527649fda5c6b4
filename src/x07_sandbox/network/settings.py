"""`[net]` in the user's own settings, ~/.config/x07/sandbox.toml: what no policy may decide.

Never read from a project: what a program's author writes must not open the user's own network.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Final

from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.network.floor import special
from x07_sandbox.network.rules import NetSettings, Request, parse_request

_MAX_BYTES: Final = 1 << 20
_KEYS: Final = frozenset({"allow_local", "allow_loopback", "allow_metadata", "opaque_ports"})
_PORT_LAST: Final = 65_535
_OPENED: Final = frozenset({"private", "shared", "link-local"})  # kinds of floor.py that allow_local alone opens
_OPENED_BY: Final = {"loopback": "allow_loopback", "metadata": "allow_metadata"}


def settings_file() -> Path:
    """XDG_CONFIG_HOME/x07/sandbox.toml, else ~/.config/x07/sandbox.toml. Raises HostError without a home."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    if config.startswith("/"):  # the XDG specification: any other is ignored
        return Path(config) / "x07" / "sandbox.toml"
    home = os.environ.get("HOME")
    if not home:
        raise HostError("no place for settings", "HOME is not set", "Set HOME")
    return Path(home) / ".config" / "x07" / "sandbox.toml"


def read_settings(path: Path | None = None) -> NetSettings:
    """Return what the file says; the defaults where there is none. Raises UsageError, HostError."""
    path = path or settings_file()
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return NetSettings()
    except OSError as exc:
        raise HostError(f"cannot read {path}", exc.strerror or str(exc), "Make it readable, or remove it") from exc
    if info.st_uid not in {0, os.geteuid()} or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = "others than you can write to it"
        raise HostError(f"cannot use {path}", why, f"Run: chmod go-w {path}; it must belong to you or root")
    return parse_settings(data, str(path))


def parse_settings(data: bytes, source: str) -> NetSettings:
    """Return what the text of a settings file says. Raises UsageError, naming *source*."""
    import tomllib

    what = f"cannot use {source}"
    if len(data) > _MAX_BYTES:
        raise UsageError(what, f"it has more than {_MAX_BYTES} bytes", "Make it smaller")
    try:
        net = tomllib.loads(data.decode()).get("net", {})
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(what, f"it is not TOML: {exc}", "Correct it") from exc
    if not isinstance(net, dict):
        raise UsageError(what, "net is not a table", "Write [net]")
    if unknown := sorted(set(net) - _KEYS):
        raise UsageError(what, f"[net] has no key {unknown[0]!r}", f"Its keys are {', '.join(sorted(_KEYS))}")
    for key in _OPENED_BY.values():
        if not isinstance(net.get(key, False), bool):
            raise UsageError(what, f"net.{key} is not true or false", "Correct it")
    ports = _list(net, "opaque_ports", int, what)
    if any(isinstance(port, bool) or not 1 <= port <= _PORT_LAST for port in ports):
        raise UsageError(what, "net.opaque_ports has a number that is not a port", f"Ports go from 1 to {_PORT_LAST}")
    local = frozenset(_local(text, net, what) for text in _list(net, "allow_local", str, what))
    return NetSettings(allow_local=local, opaque_ports=frozenset(ports))


def _list(net: dict[str, Any], key: str, kind: type, what: str) -> list[Any]:
    found = net.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise UsageError(what, f"net.{key} is not a list of {'numbers' if kind is int else 'texts'}", "Correct it")
    return found


def _local(text: str, net: dict[str, Any], what: str) -> tuple[Any, int]:
    """One entry of allow_local. Raises UsageError."""
    try:
        request: Request = parse_request(text)
    except UsageError as exc:
        raise UsageError(what, f"net.allow_local: {exc.what}: {exc.why}", exc.fix) from exc
    found = None if isinstance(request.host, str) else special(request.host)
    if found is None:
        fix = "Name addresses of your own network; for others the policy is enough"
        raise UsageError(what, f"net.allow_local: {text!r} is not a special address with a port", fix)
    kind = found[0].partition(":")[2]
    if (word := _OPENED_BY.get(kind)) is not None:
        if net.get(word) is not True:
            raise UsageError(what, f"net.allow_local: {found[1]}", f"Write {word} = true in [net] if you mean it")
    elif kind not in _OPENED:
        raise UsageError(what, f"net.allow_local: {found[1]}", "Leave it out: nothing opens it")
    return request.host, request.port


def as_words(settings: NetSettings) -> dict[str, list[Any]]:
    """Return the settings as JSON can hold them."""
    local = [str(Request(host=host, port=port)) for host, port in settings.allow_local]
    return {"allow_local": sorted(local), "opaque_ports": sorted(settings.opaque_ports)}


def from_words(words: dict[str, list[Any]]) -> NetSettings:
    """Return the settings that `as_words` was given. Raises UsageError."""
    local = [parse_request(text) for text in words["allow_local"]]
    return NetSettings(
        allow_local=frozenset((request.host, request.port) for request in local if not isinstance(request.host, str)),
        opaque_ports=frozenset(words["opaque_ports"]),
    )
