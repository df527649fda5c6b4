"""Hints on what a failed program lacked, derived from the end of its output.

A missing file, package or variable is not a denial, because most programs probe for many. The text is hostile, so no
host file or program is looked up by a name from it. Tables name the Debian packages of well-known programs and modules.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.channel.messages import CWD
from x07_sandbox.policy.denials import GuestMount, Hint, HowToAllow
from x07_sandbox.policy.guest import guest_path, is_below
from x07_sandbox.policy.observed import advise, advise_loading, advise_root

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy

_MOST: Final = 3
_QUOTED: Final = r"b?(?P<quote>['\"])(?P<path>(?:(?!(?P=quote))[^\n]){1,255})(?P=quote)"
_FIRST: Final = r"b?(?P<first>['\"])(?:(?!(?P=first))[^\n]){1,255}(?P=first)"
# Messages of Python, coreutils (which quote paths with blanks), perror(3) and Go. A blank is part of an unquoted path
# only if nothing else precedes the path. For a rename Python and C++ report both paths; either may be missing.
_MISSING: Final = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        rf"No such file or directory: {_QUOTED}",
        rf"No such file or directory: {_FIRST} -> {_QUOTED}",
        r"(?P<quote>['\"])(?P<path>/(?:(?!(?P=quote))[^\n]){1,255})(?P=quote)(?: [a-z ]{1,20})?: No such file or dir",
        r"(?:^|: )(?P<path>/[^:'\"\n]{1,255}): No such file or directory",
        r"No such file or directory \[(?P<path>[^\]\n]{1,255})\]",  # C++'s std::filesystem
        r"No such file or directory \[[^\]\n]{1,255}\] \[(?P<path>[^\]\n]{1,255})\]",
        r"(?:^|[\s:])(?P<path>/[^\s:'\"]{1,255}): [Nn]o such file or directory",
    )
)
# The dynamic loader, if the kernel does not allow a file to be mapped executable.
_UNLOADED: Final = re.compile(r"(?:^|: )([^:'\"\n]{1,255}): failed to map segment from shared object", re.MULTILINE)
# Python's subprocess, for a program not in PATH (and, in the same words, for a missing `cwd`).
_PROGRAM: Final = re.compile(
    r'^  File "[^"\n]*subprocess\.py", line \d+, in _execute_child\n(?:    [^\n]*\n){1,3}'
    r"FileNotFoundError: \[Errno 2\] No such file or directory: '([\w.+-]{1,100})'$",
    re.MULTILINE | re.ASCII,
)
# bash and dash: "it.sh: line 3: jq: command not found", "it.sh: 3: jq: not found".
_COMMAND: Final = re.compile(
    r"^[^:\n]{1,255}: (?:line )?\d+: (\w[\w.+-]{0,99}): (?:command )?not found$", re.MULTILINE | re.ASCII
)
# Node, and coreutils' env.
_SPAWNED: Final = re.compile(
    r"\bspawn (\w[\w.+-]{0,99}) ENOENT|\benv: ['\u2018](\w[\w.+-]{0,99})['\u2019]: No such", re.ASCII
)
# Python's import, also in pytest's report, and `python3 -m NAME`.
_MODULE: Final = re.compile(
    r"^(?:(?:E {1,8})?ModuleNotFoundError: No module named '|[\w/.-]{0,100}python[\d.]{0,6}: No module named )"
    r"(\w{1,100})",
    re.MULTILINE | re.ASCII,
)
# Unset variables: Python's os.environ, bash, dash.
_VARIABLES: Final = tuple(
    re.compile(pattern, re.MULTILINE | re.ASCII)
    for pattern in (
        r'^  File ".*\bos(?:\.py|>)", line \d+, in __getitem__\n(?: {4}.*\n){0,2}KeyError: b?.([A-Za-z_]\w{0,99}).$',
        r"^[^:\n]{1,255}: line \d+: ([A-Za-z_]\w{0,99}): (?:unbound variable|parameter (?:null or )?not set)$",
        r"^[^:\n]{1,255}: \d+: ([A-Za-z_]\w{0,99}): parameter not set(?: or null)?$",
    )
)


_IMAGE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Adding(NamedTuple):
    """A command that adds something, and a flag for the next run; "" if that needs none."""

    command: str
    next_flag: str = ""

    @property
    def text(self) -> str:
        """Both in one phrase."""
        return f"{self.next_flag}, after {self.command}" if self.next_flag else self.command

    @property
    def how(self) -> HowToAllow:
        """Both as advice."""
        next_flag = self.next_flag or None
        return HowToAllow(json_path=None, value=None, flag=self.text, command=self.command, next_flag=next_flag)


class ImageInUse(NamedTuple):
    """The image of a run, to which a package may be added. name: as the user wrote it. Lists: see images/store."""

    name: str = "default"
    include: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    on_host: bool = False  # the backend uses the host's programs instead of an image

    def adding(self, flag: str, packages: Sequence[str]) -> Adding:
        """Return what adds *packages*: a command and, for an image without a name, a flag for the next run."""
        if self.on_host:
            return Adding(f"{'apt-get' if flag == '--include' else 'pip'} install {' '.join(packages)}")
        lists = {"--include": self.include, "--pip": self.pip, "--preload": self.preload}
        lists[flag] = (*lists[flag], *packages)
        if _IMAGE_NAME.fullmatch(self.name):  # the image keeps the lists that are not given
            return Adding(f"x07 image build --name {self.name} {flag} {','.join(lists[flag])}")
        words = " ".join(f"{name} {','.join(values)}" for name, values in lists.items() if values)
        return Adding(f"x07 image build --name mine {words}", "--image mine")


DEFAULT_IMAGE: Final = ImageInUse()


class LocalModules(NamedTuple):
    """Python modules beside a single-file program on the host. They are not copied in."""

    modules: Collection[str]
    adding: Adding  # what copies them in, as files of a project


def hints(  # noqa: PLR0913 - each is a fact about one run
    tail: bytes,
    policy: Policy,
    areas: Sequence[GuestMount],
    cwd: str,
    local: LocalModules | None = None,
    host_variables: Collection[str] = (),
    *,
    image: ImageInUse = DEFAULT_IMAGE,
) -> list[Hint]:
    """Return at most three hints. tail: the end of the output. host_variables: names of variables on the host."""
    text = tail.decode("utf-8", "replace")
    executed = dict.fromkeys(name for pattern in (_PROGRAM, _SPAWNED) for name in _names(pattern, text))
    paths = dict.fromkeys(_paths(text, policy, areas, cwd))
    # A bare name that was to be executed is a program of the image, not a file to copy in.
    tools = {path: path.removeprefix("./") for path in paths}
    executed |= dict.fromkeys(name for name in tools.values() if is_known_program(name))
    paths = {path: None for path in paths if tools[path] not in executed}
    modules = (_module(name, local, image) for name in dict.fromkeys(_MODULE.findall(text)))
    programs = (program_hint(name, image) for name in executed)
    commands = (program_hint(name, image) for name in dict.fromkeys(_COMMAND.findall(text)) if name not in executed)
    missing = (_elsewhere(path, areas) or _hint(path, policy) for path in paths)
    # A script that continues may lack many programs, so commands come last.
    names = dict.fromkeys(name for pattern in _VARIABLES for name in pattern.findall(text))
    variables = (_variable(name, policy, host_variables) for name in names)
    connections = connection_hints(text, policy)
    found = (*_libraries(text, policy, areas, cwd), *connections, *programs, *missing, *modules, *variables, *commands)
    return list(itertools.islice((hint for hint in found if hint is not None), _MOST))


def _names(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    for match in pattern.finditer(text):
        yield next(name for name in match.groups() if name)


def program_hint(name: str, image: ImageInUse) -> Hint:
    """Return a hint about a program that is not installed in the image."""
    flag, package = package_of_program(name)
    return Hint(subject=f"the program {name}", how=image.adding(flag, [package]).how)


def _variable(name: str, policy: Policy, host_variables: Collection[str]) -> Hint | None:
    """Return a hint about a variable that is not set, or None if no change would provide it.

    No change provides X07's own variables, or a variable that was passed in and then removed by the program.
    """
    allowed, denied = policy.env.allow_keys, policy.env.deny_keys
    how: HowToAllow | None = HowToAllow(json_path=None, value=None, flag=f"--env {name}=VALUE")
    if not policy.env.enabled:
        how = advise(policy, "env.enabled", value=True)
    elif name in denied:
        how = advise(policy, "env.deny_keys", [key for key in denied if key != name])
    elif name in host_variables:
        how = None if name in allowed else advise(policy, "env.allow_keys", [*allowed, name], f"--env {name}")
    if how is None or name.startswith("X07_"):
        return None
    return Hint(subject=f"the variable {name}", kind="variable", how=how)


def _libraries(text: str, policy: Policy, areas: Sequence[GuestMount], cwd: str) -> Iterator[Hint]:
    for name in dict.fromkeys(_UNLOADED.findall(text)):
        if "/" in name and name.isprintable():
            path = posixpath.normpath(posixpath.join(cwd, name))
            if how := advise_loading(path, policy, areas, cwd):
                yield Hint(subject=f"the library {path}", kind="library", how=how)


def _paths(text: str, policy: Policy, areas: Sequence[GuestMount], cwd: str) -> Iterator[str]:
    for pattern in _MISSING:
        for path in (found["path"] for found in pattern.finditer(text)):
            at, _ = guest_path(path, cwd, deny_hidden=False)
            visible = at is None or any(at == area.at or is_below(at, area.at) for area in areas)
            visible = visible and not (at and _hidden(path, policy))
            if not visible and path.isprintable() and not is_below(path, CWD):
                yield path if "/" in path else f"./{path}"


def _hidden(path: str, policy: Policy) -> bool:
    """Return whether fs.deny_hidden is the only reason why the path is missing."""
    at, _ = guest_path(path, CWD, deny_hidden=False)
    return at != guest_path(path, CWD, deny_hidden=policy.fs.deny_hidden)[0]


def _elsewhere(path: str, areas: Sequence[GuestMount]) -> Hint | None:
    """Return a hint if *path* is the path on the host of something that has another path in the VM."""
    for area in areas:
        if area.host and is_below(f"{path}/", area.host):
            in_vm = posixpath.normpath(f"{area.at}/{path.removeprefix(area.host)}")
            return Hint(subject=path, kind="elsewhere", how=HowToAllow(json_path=None, value=None), in_vm=in_vm)
    return None


def _hint(path: str, policy: Policy) -> Hint | None:
    """Return a hint about a missing path, or None if no policy provides it."""
    if _hidden(path, policy):
        field, value = ("fs.deny_hidden", False) if policy.fs.enabled else ("fs.enabled", True)
        how = advise(policy, field, value)
        return None if how is None else Hint(subject=path, how=how)
    folder = path.rpartition("/")[0]
    how = advise_root(policy, "read_roots", path)
    there = folder and guest_path(folder, CWD, deny_hidden=policy.fs.deny_hidden)[0]
    # The program may have tried to read or to create the file. To create it, its folder must be writable.
    to_write = advise_root(policy, "write_roots", folder) if there else None
    return None if how is None else Hint(subject=path, how=how, to_write=to_write)


def _module(name: str, local: LocalModules | None, image: ImageInUse) -> Hint:
    flag, package = package_of_module(name)
    adding = local.adding if local is not None and name in local.modules else image.adding(flag, [package])
    return Hint(subject=f"the Python module {name}", how=adding.how)


# connections that a program without network tried

_HOST: Final = r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]{0,252})"
_PORT: Final = r"(?P<port>\d{1,5})"
# DNS labels; none of these characters is special to a shell.
_DOMAIN: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9]{1,63}", re.ASCII)
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
_MOST_HOSTS: Final = 2


def connection_hints(text: str, policy: Policy) -> Iterator[Hint]:
    """Yield hints on at most two unreachable hosts, or one hint without a host if the text contains none."""
    if policy.may_connect:  # the gate reports each denied connection
        return
    failed = _FAILED.search(text)
    found = dict.fromkeys(itertools.islice(hosts_in(text, nearby=failed is not None), _MOST_HOSTS))
    for host, port in found:
        yield _connection(f"the connection to {host}:{port}", f"{host}:{port}", policy)
    if not found and failed is not None and failed[0] != "Connection refused":  # refused by this machine itself
        yield _connection("a connection", "HOST:PORT", policy)


def _connection(subject: str, host: str, policy: Policy) -> Hint:
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
            if _DOMAIN.fullmatch(host) and not _LOCAL.match(host) and port:
                yield host, port


def _port(match: re.Match[str], otherwise: int = 443) -> int:
    """Return the port in the match, else the scheme's port, else *otherwise*. Return 0 for an invalid port."""
    parts = match.groupdict()
    if parts.get("port"):
        number = int(parts["port"])
        return number if number <= _PORT_MAX else 0
    return _PORTS.get(parts.get("scheme") or "", otherwise)


# packages

# Well-known programs: a missing file of such a name means the program. Packages have the same names.
_SAME_NAME: Final = (
    *("cargo", "cmake", "curl", "ffmpeg", "fish", "g++", "gawk", "gcc", "git", "jq", "less", "lua5.4", "make", "npm"),
    *("perl", "ruby", "rustc", "sqlite3", "unzip", "vim", "wget", "zip", "zsh"),
)
_PROGRAMS: Final = dict(zip(_SAME_NAME, _SAME_NAME, strict=True)) | {
    "Rscript": "r-base-core",
    "cc": "gcc",
    "convert": "imagemagick",
    "go": "golang-go",
    "java": "default-jre-headless",
    "javac": "default-jdk-headless",
    "lua": "lua5.4",
    "node": "nodejs",
    "npx": "npm",
    "php": "php-cli",
    "pkg-config": "pkg-config",
    "psql": "postgresql-client",
    "pytest": "python3-pytest",
    "rg": "ripgrep",
    "ssh": "openssh-client",
    "tclsh": "tcl",
    "tsc": "node-typescript",
    "xz": "xz-utils",
}
_PIP: Final = frozenset({"pip", "pip3"})
# Modules whose package has another name than python3-NAME.
_MODULES: Final = {"cv2": "opencv", "dns": "dnspython", "tkinter": "tk"}
# Modules whose package is python3-NAME, in lower case and with '-' for '_'.
_PLAIN_MODULES: Final = frozenset(
    {
        *("PIL", "aiohttp", "attr", "babel", "bs4", "click", "colorama", "cryptography", "dateutil", "django"),
        *("docutils", "fastapi", "flask", "h5py", "httpx", "hypothesis", "jinja2", "jsonschema", "lxml", "mako"),
        *("markdown", "markupsafe", "matplotlib", "mpmath", "msgpack", "networkx", "nltk", "numba", "numpy"),
        *("openpyxl", "packaging", "pandas", "pexpect", "pkg_resources", "psutil", "psycopg2", "pydantic", "pygments"),
        *("pymysql", "pyparsing", "pytest", "redis", "regex", "requests", "rich", "scipy", "seaborn", "serial"),
        *("setuptools", "simplejson", "six", "skimage", "sklearn", "sqlalchemy", "statsmodels", "sympy", "tabulate"),
        *("toml", "tornado", "tqdm", "typing_extensions", "ujson", "urllib3", "websockets", "wheel", "xarray"),
        *("yaml", "zmq"),
    }
)


def is_known_program(name: str) -> bool:
    """Return whether a missing file of this name is a program rather than a user's file."""
    return name in _PROGRAMS or name in _PIP


def package_of_program(name: str) -> tuple[str, str]:
    """Return the `x07 image build` flag and the package for a program, or a placeholder for an unknown package."""
    return ("--pip", "PACKAGE") if name in _PIP else ("--include", _PROGRAMS.get(name, "PACKAGE"))


def package_of_module(name: str) -> tuple[str, str]:
    """Return the `x07 image build` flag and the package for a Python module, or a placeholder for an unknown package.

    A PyPI package of the module's name may be anybody's, and the name comes from the program's output.
    """
    if name in _MODULES or name in _PLAIN_MODULES:
        return "--include", f"python3-{_MODULES.get(name, name.lower().replace('_', '-'))}"
    return "--pip", "PACKAGE"
