"""The real servers and proxies of the differential fuzzer, each in the most forgiving configuration that people use.

Each origin server has a virtual host for the listed name and a default one for all others, and logs the requests that
it accepts. Each proxy sends what it accepts to a sink, by address, so that no name is looked up.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SERVERS: Final = Path(__file__).resolve().parent / "servers"
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Program:
    """One program to start.

    argv: its command; as in its configuration (servers/NAME.conf), words such as @address@ are replaced. ports: the
    names of its ports. sinks: those of its ports that are proxies. optional: used if it is installed, because its
    package would start a service on a port of another one.
    """

    name: str
    argv: tuple[str, ...]
    ports: tuple[str, ...]
    sinks: tuple[str, ...] = ()
    optional: bool = False

    @property
    def ours(self) -> bool:
        """Whether the program runs a file of the folder `servers`."""
        return any(word.startswith(str(SERVERS)) for word in self.argv)

    def command(self) -> str | None:
        """Return the path of the program; None if it is not installed."""
        return shutil.which(self.argv[0], path=_PATH)


PROGRAMS: Final = (
    Program("nginx", ("nginx", "-p", "@folder@", "-c", "@file@"), ("nginx", "nginx-lax", "nginx-proxy-line")),
    Program(
        "apache2",
        ("apache2", "-X", "-d", "@folder@", "-f", "@file@"),
        ("apache", "apache-unsafe", "apache-proxy"),
        ("apache-proxy",),
    ),
    Program(
        "squid",
        ("squid", "-N", "-f", "@file@"),
        ("squid", "squid-accelerator", "squid-proxy-line"),
        ("squid", "squid-accelerator", "squid-proxy-line"),
    ),
    Program("tinyproxy", ("tinyproxy", "-d", "-c", "@file@"), ("tinyproxy",), ("tinyproxy",)),
    Program(
        "haproxy",
        ("haproxy", "-db", "-f", "@file@"),
        ("haproxy", "haproxy-lax", "haproxy-sni"),
        ("haproxy", "haproxy-lax"),
    ),
    Program("lighttpd", ("lighttpd", "-D", "-f", "@file@"), ("lighttpd",), optional=True),
    Program(
        "python",
        (sys.executable, "-I", os.fspath(SERVERS / "python_server.py"), "@address@", "@python@", "@python-lazy@"),
        ("python", "python-lazy"),
    ),
    Program(
        "node",
        ("node", os.fspath(SERVERS / "node_server.js"), "@address@", "@node@", "@node-lax@", "@node-h2@"),
        ("node", "node-lax", "node-h2"),
    ),
)
