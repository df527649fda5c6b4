"""Hints on connections that a program without network tried, derived from its error output, which is hostile."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from x07_sandbox.policy.denials import Hint, HowToAllow
from x07_sandbox.policy.observed import advise

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy

_HOST: Final = r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]{0,252})"
_PORT: Final = r"(?P<port>\d{1,5})"
# DNS labels; none of these characters is special to a shell.
_NAME: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9]{1,63}", re.ASCII)
_LOCAL: Final = re.compile(r"127\.|0\.0\.0\.0|localhost")
# Messages that name the host: urllib3; curl, git and ssh; curl; wget; Node; Node; Go; Go.
_NAMED: Final = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"HTTPS?Connection(?:Pool)?\(host='{_HOST}', port={_PORT}\)",
        rf"Could not resolve host(?:name)?:? {_HOST}",
        rf"Failed to connect to {_HOST} port {_PORT}",
        rf"unable to resolve host address ['\u2018]{_HOST}",
        rf"getaddrinfo (?:ENOTFOUND|EAI_AGAIN) {_HOST}",
        rf"connect (?:ENETUNREACH|EHOSTUNREACH|ECONNREFUSED) {_HOST}:{_PORT}",
        rf"dial tcp: lookup {_HOST}",
        rf"dial tcp {_HOST}:{_PORT}: connect: (?:network is unreachable|connection refused)",
    )
)
# Messages without a host: the resolvers of C, Python and Rust; the kernel.
_FAILED: Final = re.compile(
    r"Temporary failure in name resolution|Name or service not known|No address associated with hostname"
    r"|failed to lookup address information|[Nn]etwork is unreachable|[Cc]ould not resolve host|Connection refused",
    re.ASCII,
)
# Text near such a message that may name the host, as in a traceback: a URL, or a (host, port) pair.
_NEARBY: Final = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"(?P<scheme>https?)://{_HOST}(?::{_PORT})?",
        rf"\(\s{{0,3}}['\"]{_HOST}['\"],\s{{0,3}}{_PORT}\s{{0,3}}\)",
    )
)
_URLS: Final = re.compile(rf"(?P<scheme>https?|ssh)://{_HOST}(?::{_PORT})?", re.ASCII)
_PORTS: Final = {"http": 80, "https": 443, "ssh": 22}
_PORT_MAX: Final = 65_535
_MOST: Final = 2


def connection_hints(text: str, policy: Policy) -> Iterator[Hint]:
    """Yield hints on at most two unreachable hosts, or one hint without a host if the text contains none."""
    if policy.may_connect:  # the gate reports each denied connection
        return
    failed = _FAILED.search(text)
    found = dict.fromkeys(itertools.islice(hosts_in(text, nearby=failed is not None), _MOST))
    for host, port in found:
        yield _hint(f"the connection to {host}:{port}", f"{host}:{port}", policy)
    if not found and failed is not None and failed[0] != "Connection refused":  # refused by this machine itself
        yield _hint("a connection", "HOST:PORT", policy)


def _hint(subject: str, host: str, policy: Policy) -> Hint:
    how = HowToAllow(json_path=None, value=None, flag=f"--allow-host {host}")
    if not policy.net.enabled:
        how = advise(policy, "net.enabled", value=True) or how
    return Hint(subject=subject, kind="network", how=how)


def hosts_in(text: str, *, nearby: bool) -> Iterator[tuple[str, int]]:
    """Yield hosts and ports that are safe to paste. nearby: whether to search more than failure messages."""
    ports = {match["host"].lower(): _port(match) for match in _URLS.finditer(text)}
    for pattern in (*_NAMED, *(_NEARBY if nearby else ())):
        for match in pattern.finditer(text):
            host = match["host"].rstrip(".").lower()
            port = _port(match, ports.get(host) or 443)
            if _NAME.fullmatch(host) and not _LOCAL.match(host) and port:
                yield host, port


def _port(match: re.Match[str], otherwise: int = 443) -> int:
    """Return the port in the match, else the scheme's port, else *otherwise*. Return 0 for an invalid port."""
    parts = match.groupdict()
    if parts.get("port"):
        number = int(parts["port"])
        return number if number <= _PORT_MAX else 0
    return _PORTS.get(parts.get("scheme") or "", otherwise)
