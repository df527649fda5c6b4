"""The `x07 policy new` command that completes an incomplete policy document. Pure."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.decode import MAX_BYTES, parse
from x07_sandbox.policy.from_flags import NewPolicy, make_policy
from x07_sandbox.policy.limits import NAMES, LimitChanges, flag_text
from x07_sandbox.policy.overrides import Overrides
from x07_sandbox.policy.problems import PolicyError
from x07_sandbox.policy.rules import is_policy_id
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Iterator

_SWITCHES: Final = frozenset({"fs.enabled", "net.enabled", "net.allow_tcp"})  # set by flags that name a root or a host


class Completion(msgspec.Struct, frozen=True):
    """A command that completes a document."""

    words: tuple[str, ...]  # arguments of `x07 policy new`
    left_out: tuple[str, ...]  # fields that no flag can set

    def line(self, file: str) -> str:
        """Return the command as a shell line that writes its output to *file*."""
        return f"x07 policy new {' '.join(map(shlex.quote, self.words))}{' ' * bool(self.words)}> {shlex.quote(file)}"


def completion(data: bytes) -> Completion | None:
    """Return the command that completes a document, or None if it is not a non-empty JSON object.

    The document is untrusted: only valid, printable values become arguments.
    """
    if len(data) > MAX_BYTES:
        return None
    try:
        document = parse(data, source="")
    except PolicyError:
        return None
    if not isinstance(document, dict) or not document:
        return None
    words, covered, refused = [], set(), set()
    off = {path for path, value in _values(document) if path in _SWITCHES and value is not True}
    sections = tuple(f"{path.partition('.')[0]}." for path in off)
    for path, flag, value in _flags(document):
        if path.startswith(sections):  # a root or a host would switch the section on
            refused.add(path)
        elif flag[1].isprintable() and _is_valid(path, value):
            words += flag
            covered.add(path)
        else:
            refused.add(path)
    known = {*covered - refused, *_SWITCHES - off, "schema_version", "notes"}
    usual = dict(_values(msgspec.to_builtins(TEMPLATES["default"])))
    same = {
        path
        for path, value in _values(document)
        if path in usual and value in (usual[path], []) and path not in refused | off
    }
    left_out = [path for path, _ in _values(document) if path not in known | same and path.isprintable()]
    return Completion(tuple(words), tuple(left_out))


def _flags(document: dict[str, Any]) -> Iterator[tuple[str, list[str], NewPolicy]]:
    """Yield the path of each field that a flag can set, the flag with its values, and the keyword of `make_policy`."""
    if isinstance(name := document.get("policy_id"), str):
        yield "policy_id", ["--id", name], NewPolicy(policy_id=name)
    limits, fs, net = (
        found if isinstance(found := document.get(name), dict) else {} for name in ("limits", "fs", "net")
    )
    for field in NAMES:
        if type(value := limits.get(field)) is int and 0 <= value <= 1 << 40:
            changes = replace(LimitChanges(), **{field: value})
            yield f"limits.{field}", flag_text(field, value).split(), NewPolicy(limits=changes)
    for root in _texts(fs.get("read_roots")):
        yield "fs.read_roots", ["--read", root], NewPolicy(overrides=Overrides(allow_read_root=(root,)))
    for root in _texts(fs.get("write_roots")):
        yield "fs.write_roots", ["--write", root], NewPolicy(overrides=Overrides(allow_write_root=(root,)))
    hosts = net.get("allow_hosts")
    for entry in hosts if isinstance(hosts, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("host"), str) and isinstance(entry.get("ports"), list):
            host = f"[{entry['host']}]" if ":" in entry["host"] else entry["host"]
            spec = f"{host}:{','.join(map(str, entry['ports']))}"
            yield "net.allow_hosts", ["--allow-host", spec], NewPolicy(overrides=Overrides(allow_host=(spec,)))


def _texts(value: object) -> list[str]:
    """Return those strings of a list that can be a flag's value."""
    found = value if isinstance(value, list) else []
    return [text for text in found if isinstance(text, str) and not text.startswith("-")]


def _is_valid(path: str, wanted: NewPolicy) -> bool:
    if path == "policy_id":
        return is_policy_id(str(wanted.policy_id))
    try:
        make_policy(wanted)
    except UsageError:
        return False
    return True


def _values(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each field, two levels deep. Tuples are returned as lists."""
    for section, found in document.items():
        for name, value in found.items() if isinstance(found, dict) else [("", found)]:
            yield f"{section}.{name}".rstrip("."), list(value) if isinstance(value, tuple) else value
