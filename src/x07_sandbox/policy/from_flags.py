"""A complete policy from a few flags, and the flags that make a policy of what an incomplete document says.

Pure but for files of hosts, which are not taken here.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.decode import MAX_BYTES, parse
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.limits import NAMES, LimitChanges, change_limits, flag_text
from x07_sandbox.policy.overrides import Overrides, derive_policy
from x07_sandbox.policy.problems import PolicyError
from x07_sandbox.policy.templates import BUILT_IN, TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.policy.model import Policy

_ID_MAX: Final = 64
_SWITCHES: Final = frozenset({"fs.enabled", "net.enabled", "net.allow_tcp"})  # on wherever a root or a host is named


class NewPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a new policy is to say. template: what it says besides."""

    template: str = "default"
    policy_id: str | None = None
    limits: LimitChanges = LimitChanges()
    hosts: tuple[str, ...] = ()
    read_roots: tuple[str, ...] = ()
    write_roots: tuple[str, ...] = ()


def make_policy(wanted: NewPolicy) -> Policy:
    """The policy. Raises UsageError for what no policy can say."""
    base = TEMPLATES[wanted.template]
    policy = change_limits(base, wanted.limits, may_raise=True, source=f"{BUILT_IN}{wanted.template}")
    if wanted.hosts:
        policy = replace(policy, net=replace(policy.net, enabled=True, allow_tcp=True))
    if wanted.read_roots or wanted.write_roots:
        policy = replace(policy, fs=replace(policy.fs, enabled=True))
    overrides = Overrides(
        allow_host=wanted.hosts, allow_read_root=wanted.read_roots, allow_write_root=wanted.write_roots
    )
    if overrides.any:
        data = render_policy(policy)
        policy = derive_policy(policy, data, wanted.template, overrides, read_spec_file=_no_file).policy
    policy_id = wanted.policy_id or f"custom.{wanted.template}"
    return replace(policy, policy_id=policy_id, notes=f"Made by x07 policy new from the template {wanted.template}.")


def _no_file(name: str) -> bytes:
    raise UsageError(f"cannot read {name}", "files of hosts are not taken here", "Name the hosts")


class Completion(msgspec.Struct, frozen=True):
    """What completes a document. words: of `x07 policy new`. left_out: paths of fields that no flag says."""

    words: tuple[str, ...]
    left_out: tuple[str, ...]

    def line(self, file: str) -> str:
        """The command as a line to paste, which writes *file*."""
        return f"x07 policy new {' '.join(map(shlex.quote, self.words))}{' ' * bool(self.words)}> {shlex.quote(file)}"


def completion(data: bytes) -> Completion | None:
    """What makes a complete policy of a document's own fields; None where it is no incomplete one.

    The document may come from anybody: only values that a policy can hold are taken, and none that does not print.
    """
    if len(data) > MAX_BYTES:
        return None
    try:
        document = parse(data, source="").value
    except PolicyError:
        return None
    if not isinstance(document, dict) or not document:
        return None
    words, said, refused = [], set(), set()
    off = {path for path, value in _values(document) if path in _SWITCHES and value is not True}
    sections = tuple(f"{path.partition('.')[0]}." for path in off)
    for path, flag, value in _flags(document):
        if path.startswith(sections):  # a root or a host would switch it on
            refused.add(path)
        elif flag[1].isprintable() and _is_taken(path, value):
            words += flag
            said.add(path)
        else:
            refused.add(path)
    known = {*said - refused, *_SWITCHES - off, "schema_version", "notes"}
    usual = dict(_values(msgspec.to_builtins(TEMPLATES["default"])))
    same = {
        path
        for path, value in _values(document)
        if path in usual and value in (usual[path], []) and path not in refused | off
    }
    left_out = [path for path, _ in _values(document) if path not in known | same and path.isprintable()]
    return Completion(tuple(words), tuple(left_out))


def _flags(document: dict[str, Any]) -> Iterator[tuple[str, list[str], NewPolicy]]:
    """Each field that a flag says: its path, the flag, and the same as `make_policy` takes it."""
    if isinstance(name := document.get("policy_id"), str):
        yield "policy_id", ["--id", name], NewPolicy(policy_id=name)
    limits, fs, net = (
        found if isinstance(found := document.get(name), dict) else {} for name in ("limits", "fs", "net")
    )
    for field in NAMES:
        if type(value := limits.get(field)) is int and 0 <= value <= 1 << 40:
            yield (
                f"limits.{field}",
                flag_text(field, value).split(),
                NewPolicy(limits=replace(LimitChanges(), **{field: value})),
            )
    for root in _texts(fs.get("read_roots")):
        yield "fs.read_roots", ["--read", root], NewPolicy(read_roots=(root,))
    for root in _texts(fs.get("write_roots")):
        yield "fs.write_roots", ["--write", root], NewPolicy(write_roots=(root,))
    hosts = net.get("allow_hosts")
    for entry in hosts if isinstance(hosts, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("host"), str) and isinstance(entry.get("ports"), list):
            host = f"[{entry['host']}]" if ":" in entry["host"] else entry["host"]
            spec = f"{host}:{','.join(map(str, entry['ports']))}"
            yield "net.allow_hosts", ["--allow-host", spec], NewPolicy(hosts=(spec,))


def _texts(value: object) -> list[str]:
    """The texts of a list that can stand behind a flag."""
    found = value if isinstance(value, list) else []
    return [text for text in found if isinstance(text, str) and not text.startswith("-")]


def _is_taken(path: str, wanted: NewPolicy) -> bool:
    """Whether a policy can say it."""
    if path == "policy_id":
        return is_policy_id(str(wanted.policy_id))
    try:
        make_policy(wanted)
    except UsageError:
        return False
    return True


def is_policy_id(text: str) -> bool:
    """Whether a policy can have that name."""
    return 0 < len(text) <= _ID_MAX and text.isascii() and all(char.isalnum() or char in "_.-" for char in text)


def _values(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Its fields by their paths, two levels deep; a tuple as a list."""
    for section, found in document.items():
        for name, value in found.items() if isinstance(found, dict) else [("", found)]:
            yield f"{section}.{name}".rstrip("."), list(value) if isinstance(value, tuple) else value
