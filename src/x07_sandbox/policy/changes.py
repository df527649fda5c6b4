"""Changes that a caller makes to a policy: limits such as `--memory 1G`, and grants such as `--allow-host`. Pure.

The author of a policy may raise its limits up to the schema's maximum. Everybody else may only lower them. Grants add
hosts and folders, or remove hosts. The result is deterministic: the policy's own entries, then new entries in the
order given, files before flags.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NoReturn

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import Flag, Text, UsageError
from x07_sandbox.options import FILE_SIZE, LIMITS, Option
from x07_sandbox.policy.decode import canonical_json, check_policy, render_policy
from x07_sandbox.policy.hosts import PORT_LAST, Addresses, covers, is_name, meaning, port_number
from x07_sandbox.policy.model import FILE_BYTES, EffectivePolicy, HostPorts, Limits, Net, Policy

NAMES: Final[Mapping[str, Option]] = MappingProxyType({row.sets.removeprefix("limits."): row for row in LIMITS})
"""The option for each field of a policy's limits."""
_FILE_FIELDS: Final = ("max_read_bytes", "max_write_bytes")  # set by --max-file-size

# Checked per flag for a better message; check_policy checks the result again, and the number of entries.
_HOST_MAX_BYTES: Final = 255
_ROOT_MAX_CHARS: Final = 4096
_NOTES_MAX_CHARS: Final = 4096
_ID_MAX_BYTES: Final = 64
_DIGEST_CHARS: Final = 8
_ALLOW_FORM: Final = "Write HOST:PORT[,PORT...], such as example.org:443 or [2001:db8::1]:80,443"
_DENY_FORM: Final = "Write HOST:PORT[,PORT...] or HOST:*, such as example.org:443 or example.org:*"

ReadFile = Callable[[str], bytes]
# The ports of each host, in the order given; None stands for all ports.
Hosts = Mapping[str, set[int] | None]


class LimitChanges(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that the caller set; None keeps the policy's limit."""

    mem_bytes: int | None = None
    cpu_ms: int | None = None
    wall_ms: int | None = None
    procs: int | None = None
    fds: int | None = None
    file_bytes: int | None = None  # of one file that is copied, in or back

    def given(self) -> dict[str, int]:
        """Return the limits that are set, by field."""
        return {field: value for field in NAMES if (value := getattr(self, field)) is not None}


class FlagReach(msgspec.Struct, frozen=True):
    """How far flags can raise the effective limits."""

    tops: Mapping[str, int] = MappingProxyType({})  # the largest value that a flag can set, by path ("limits.fds")
    policy_too: bool = True  # whether a change of the policy could also raise the limits


def change_limits(policy: Policy, changes: LimitChanges, *, may_raise: bool, source: str) -> Policy:
    """Return *policy* with the caller's limits. source: the policy's name. Raises UsageError for a forbidden limit.

    If limits may be raised, a new procs limit also raises a smaller process.max_live, and a new wall_ms also raises a
    smaller cpu_ms.
    """
    given = changes.given()
    if may_raise and "cpu_ms" not in given and given.get("wall_ms", 0) > policy.limits.cpu_ms:
        given["cpu_ms"] = given["wall_ms"]
    wanted = [(NAMES[field], value, f"limits.{field}", getattr(policy.limits, field)) for field, value in given.items()]
    process, fs = policy.process, policy.fs
    if (procs := given.get("procs")) is not None and process.may_spawn and process.max_live < procs:
        wanted.append((NAMES["procs"], procs, "process.max_live", process.max_live))
        process = replace(process, max_live=procs)
    if size := changes.file_bytes:
        wanted += [(FILE_SIZE, size, f"fs.{name}", getattr(fs, name) or FILE_BYTES) for name in _FILE_FIELDS]
        fs = replace(fs, **dict.fromkeys(_FILE_FIELDS, size))
    for row, value, path, held in wanted:
        if value > held and not may_raise:
            raise _too_large(row, value, path, held, source)
    return replace(policy, limits=replace(policy.limits, **given), process=process, fs=fs)


def _too_large(row: Option, value: int, path: str, held: int, source: str) -> UsageError:
    """Return the error for a limit above the limit *held* of a policy, if the caller may only lower limits."""
    limit = row.flag_text(held)
    allowed = f"{limit.partition(' ')[2]}{' s' if row.kind == 'seconds' else ''}"
    why = f"the policy {source} allows at most {allowed} ({path})"
    fix = (f"Set {path} to {value} in the policy, or use ", Flag(limit))
    return UsageError(("cannot use ", Flag(row.flag_text(value))), why, fix).caused_by(path, value)


def flag_reach(own: Limits | None, current: Limits, *, may_raise: bool) -> FlagReach:
    """Return how far flags can raise the limits *current*. own: the limits of the unchanged policy, or None."""
    if may_raise:
        return FlagReach({row.sets: int(row.most * (1000 if row.kind == "seconds" else 1)) for row in LIMITS})
    if own is None:
        return FlagReach()
    tops = {f"limits.{field}": getattr(own, field) for field in NAMES if getattr(own, field) > getattr(current, field)}
    return FlagReach(tops, policy_too=False)


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """The flags as the user gave them. Values of file flags are paths."""

    allow_host: tuple[str, ...] = ()
    allow_host_file: tuple[str, ...] = ()
    deny_host: tuple[str, ...] = ()
    deny_host_file: tuple[str, ...] = ()
    allow_read_root: tuple[str, ...] = ()
    allow_write_root: tuple[str, ...] = ()
    allow_hidden: bool = False
    allow_symlinks: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that were given, such as `--allow-host`."""
        return tuple(f"--{name.replace('_', '-')}" for name, value in msgspec.structs.asdict(self).items() if value)

    @property
    def include(self) -> tuple[str, ...]:
        """The kinds of entries that the flags include: "hidden", "symlinks"."""
        return ("hidden",) * self.allow_hidden + ("symlinks",) * self.allow_symlinks

    @property
    def allows(self) -> bool:
        """Whether a flag adds hosts."""
        return bool(self.allow_host or self.allow_host_file)

    @property
    def hosts(self) -> bool:
        """Whether a flag adds or removes hosts."""
        return bool(self.allows or self.deny_host or self.deny_host_file)


def derive_policy(  # noqa: PLR0913 - the policy, the overrides, and four facts about them
    base: Policy,
    base_bytes: bytes,
    base_path: str,
    overrides: Overrides,
    *,
    read_spec_file: ReadFile,
    may_relax: bool = False,
    gate: bool = False,
) -> EffectivePolicy:
    """Return *base* with *overrides* applied. A denied host stays denied even if another flag allows it.

    base_bytes: the base policy's bytes as read. base_path: the name for the notes. read_spec_file: returns the bounded
    content of a file of host specs, or raises UsageError. may_relax: whether overrides may grant what only the author
    of *base* may. gate: whether an egress gate also enforces denials, so that a part of a network may be denied.
    Raises UsageError for the first flag that cannot be applied.
    """
    _need_author(base, overrides, may_relax=may_relax)
    _need_sections(base, overrides)
    allow = _by_host(_specs("--allow-host", overrides.allow_host_file, overrides.allow_host, read_spec_file))
    deny = _by_host(_specs("--deny-host", overrides.deny_host_file, overrides.deny_host, read_spec_file))
    read_roots = tuple(_roots("--allow-read-root", overrides.allow_read_root))
    write_roots = tuple(_roots("--allow-write-root", overrides.allow_write_root))
    asked = {
        "allow_hosts": [{"host": host, "ports": sorted(ports or ())} for host, ports in sorted(allow.items())],
        "allow_read_roots": sorted(read_roots),
        "allow_write_roots": sorted(write_roots),
        "deny_hosts": [
            {"all_ports": ports is None, "host": host, "ports": sorted(ports or ())}
            for host, ports in sorted(deny.items())
        ],
    }
    asked |= {"let_in": sorted(overrides.include)} if overrides.include else {}
    digest = hashlib.sha256(base_bytes + canonical_json(asked)).hexdigest()[:_DIGEST_CHARS]
    mark = f".g{digest}"
    policy = replace(
        base,
        policy_id=base.policy_id[: _ID_MAX_BYTES - len(mark)] + mark,
        notes=_notes(base, base_path, digest),
        net=_net(base.net, allow, deny, raise_dns=overrides.allows, gate=gate) if overrides.hosts else base.net,
        fs=replace(
            base.fs,
            read_roots=tuple(dict.fromkeys((*base.fs.read_roots, *read_roots))),
            write_roots=tuple(dict.fromkeys((*base.fs.write_roots, *write_roots))),
            deny_hidden=base.fs.deny_hidden and not overrides.allow_hidden,
            allow_symlinks=base.fs.allow_symlinks or overrides.allow_symlinks,
        ),
    )
    name = f"{base.policy_id}{mark}.policy.json"
    check_policy(policy, source=name)
    return EffectivePolicy(policy, render_policy(policy), base_path, deny, may_raise=may_relax, file_name=name)


def denied_hosts(given: Sequence[str]) -> dict[str, set[int] | None]:
    """Return the ports that `--deny-host` flags deny, by host (None: all). Raises UsageError for an invalid flag."""
    return _by_host(_specs("--deny-host", (), given, lambda _name: b""))


def _need_author(base: Policy, overrides: Overrides, *, may_relax: bool) -> None:
    """Raise UsageError if flags grant what only the author of *base* may."""
    for word, field, is_granted, value in (
        ("hidden", "deny_hidden", not base.fs.deny_hidden, False),
        ("symlinks", "allow_symlinks", base.fs.allow_symlinks, True),
    ):
        if word in overrides.include and not is_granted and not may_relax:
            why = f"policy {base.policy_id} does not allow it; flags can relax only built-in policies"
            fix = f"Set fs.{field} to {str(value).lower()} in the policy"
            what = ("cannot use ", Flag(f"--allow-{word}"))
            raise UsageError(what, why, fix).caused_by(f"fs.{field}", value=value)


def _need_sections(base: Policy, overrides: Overrides) -> None:
    needs = []
    if overrides.hosts:
        needs += [("net.enabled", base.net.enabled, "hosts"), ("net.allow_tcp", base.net.allow_tcp, "hosts")]
    if overrides.allow_read_root or overrides.allow_write_root or overrides.include:
        needs.append(("fs.enabled", base.fs.enabled, "files"))
    for field, current, what in needs:
        if not current:
            raise UsageError(
                f"cannot change the {what} of policy {base.policy_id}",
                f"{field} is false",
                f"Set {field} to true in the policy, or omit the flags",
            ).caused_by(field, value=True)


def _specs(
    flag: str, files: Iterable[str], given: Iterable[str], read: ReadFile
) -> Iterator[tuple[str, set[int] | None]]:
    """Yield the host and ports of each spec. Files come first, then flags. Raises UsageError."""
    deny = flag == "--deny-host"
    for name in files:
        try:
            text = read(name).decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            why = f"it is not UTF-8 text (byte {exc.start})"
            raise UsageError(f"cannot use {flag}-file {name}", why, "Write one host per line") from None
        for number, line in enumerate(text.split("\n"), start=1):
            if spec := line.partition("#")[0].strip():
                yield _parsed((f"{flag}-file {name}, line {number}",), spec, deny=deny)
    for spec in given:
        yield _parsed((Flag(flag), f" {spec!r}"), spec.strip(), deny=deny)


def _parsed(where: tuple[str, ...], spec: str, *, deny: bool) -> tuple[str, set[int] | None]:
    """Return the host of a spec, in lower case and without brackets, and its ports (None for all ports).

    where: the origin of the spec, for errors.
    """

    def refuse(why: Text) -> NoReturn:
        raise UsageError(("cannot use ", *where), why, _DENY_FORM if deny else _ALLOW_FORM)

    if "://" in spec:
        refuse("it is a URL, not a host")
    host, colon, ports = spec.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    host, ports = host.strip(), ports.strip()
    if not colon or not ports or spec.endswith("]"):
        refuse("the port is missing")
    if not host:
        refuse("the host is missing")
    if problem := _host_problem(host):
        refuse(problem)
    host = host.encode().lower().decode()  # bytes.lower() changes ASCII letters only
    if ports == "*":
        return (host, None) if deny else refuse(("'*' for all ports is valid only with ", Flag("--deny-host")))
    found = {port_number(text.strip()) for text in ports.split(",")}
    return (host, found) if 0 not in found else refuse(f"a port must be a number from 1 to {PORT_LAST}")


def _host_problem(host: str) -> str:
    """Return the problem with a host, or "" for a valid host."""
    if any("\ud800" <= char <= "\udfff" for char in host):
        return "it is not UTF-8 text"
    if "*" in host:
        return "wildcards are allowed only in net.allow_hosts of a policy"
    if "[" in host or "]" in host:  # those of [2001:db8::1]:80 were removed
        return "its brackets do not match"
    if len(host.encode()) > _HOST_MAX_BYTES or any(char in ";\0" or char.isspace() for char in host):
        return f"a host has at most {_HOST_MAX_BYTES} bytes and no ';', whitespace or NUL"
    return "a part between dots is empty" if ".." in host or host.startswith(".") else ""


def _by_host(specs: Iterable[tuple[str, set[int] | None]]) -> dict[str, set[int] | None]:
    """Return the ports of each host; None means all ports."""
    found: dict[str, set[int] | None] = {}
    for host, ports in specs:
        before = found.setdefault(host, set())
        found[host] = None if before is None or ports is None else before | ports
    return found


def _net(net: Net, allow: Hosts, deny: Hosts, *, raise_dns: bool, gate: bool) -> Net:
    hosts: dict[str, set[int]] = {}
    for entry in net.allow_hosts:
        hosts.setdefault(entry.host.encode().lower().decode(), set()).update(entry.ports)
    for host, more in allow.items():
        hosts.setdefault(host, set()).update(more or ())
    _deny(hosts, deny, gate=gate)
    left = {host: tuple(sorted(ports)) for host, ports in hosts.items() if ports}
    # A flag that only removes hosts must not enable anything.
    allow_dns = net.allow_dns or (raise_dns and any(is_name(host) for host in left))
    entries = tuple(HostPorts(host=host, ports=ports) for host, ports in left.items())
    return replace(net, allow_dns=allow_dns, allow_hosts=entries)


def _deny(hosts: dict[str, set[int]], deny: Hosts, *, gate: bool) -> None:
    """Remove denied ports from *hosts*. Raises UsageError if a denial covers part of an entry and there is no gate."""
    names: dict[Addresses | str, list[str]] = {}
    for host in hosts:
        names.setdefault(meaning(host), []).append(host)
    ranges = [token for token in names if not isinstance(token, str)]
    partly = []
    for denied, ports in deny.items():  # possibly many thousands
        mine = meaning(denied)
        for token in (mine,) if isinstance(mine, str) else ranges:
            cover = covers(mine, token)
            for host in names.get(token, ()):
                if cover == "whole":
                    hosts[host] = set() if ports is None else hosts[host] - ports
                elif cover == "part" and not gate:
                    partly.append((denied, ports, host))
    for denied, ports, host in partly:
        if hosts[host] if ports is None else hosts[host] & ports:
            raise UsageError(
                f"cannot deny {denied}",
                f"it is only part of {host}, which is allowed",
                f"Deny {host}, and allow the rest as smaller networks",
            )


def _roots(flag: str, given: Iterable[str]) -> Iterator[str]:
    """Yield the distinct folders in the order given."""
    seen = set()
    for text in given:
        root = text.strip()
        why = ""
        if not root or len(root) > _ROOT_MAX_CHARS:
            why = f"a path has 1 to {_ROOT_MAX_CHARS} characters"
        elif ";" in root or "\0" in root:
            why = "a path must not contain ';' or NUL"
        elif any("\ud800" <= char <= "\udfff" for char in root):
            why = "a path must be valid UTF-8"
        if why:
            shown = root if len(root) <= _HOST_MAX_BYTES else root[:_HOST_MAX_BYTES] + "..."
            raise UsageError(f"cannot use {flag} {shown!r}", why, "Use the path of a file or folder")
        if root not in seen:
            seen.add(root)
            yield root


def _notes(base: Policy, base_path: str, digest: str) -> str | msgspec.UnsetType:
    """Return the notes of *base*, with a line on the origin of this policy if there is room for the line."""
    path = base_path.encode("utf-8", "replace").decode()
    line = f"Derived from {path} by overrides {digest}."
    notes = f"{base.notes_in_force}\n{line}" if base.notes_in_force else line
    return notes if len(notes) <= _NOTES_MAX_CHARS else base.notes
