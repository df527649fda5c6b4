"""Differences between two policies: what the second grants or withdraws, field by field and list entry by list entry.

Effective values are compared, regardless of the order of a list and the case of a host. A change is ``granted`` if the
second policy allows more, ``withdrawn`` if it allows less, else ``changed``.
"""

from collections.abc import Iterator
from typing import Any, Final, Literal

import msgspec

from x07_sandbox.policy.model import HostPorts, Policy, leaf_values

Effect = Literal["granted", "withdrawn", "changed"]

_MIB: Final = 1 << 20


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One difference. field: the path of the field.

    before, after: the field's values in the two policies. For a list field, each change is about one entry. Its
    value is None for the policy that lacks the entry.
    """

    field: str
    effect: Effect
    before: Any
    after: Any


# Fields in which a larger value, true or a further entry restricts the program; in all others it grants something.
_RESTRICTS: Final = frozenset(
    {
        *("fs.deny_hidden", "db.sqlite.readonly_only", "env.deny_keys", "process.kill_on_drop", "process.kill_tree"),
        *("db.net.require_tls", "db.net.require_verify"),
    }
)
# Without patterns, X07 may accept all arguments or none, so the first pattern may grant or restrict.
_NEUTRAL: Final = frozenset({"schema_version", "policy_id", "notes", "process.allow_args_regex_lite"})
# What X07 uses in place of 0; None if X07's runtime decides.
_ZERO_MEANS: Final[dict[str, int | None]] = {
    "fs.max_read_bytes": 16 * _MIB,
    "fs.max_write_bytes": 16 * _MIB,
    "fs.max_entries": 10_000,
    "fs.max_depth": 64,
    "threads.max_workers": None,
}


def differences(first: Policy, second: Policy) -> tuple[Change, ...]:
    """Return the changes from *first* to *second*, in the model's order. The tuple is empty if there are none."""
    after = leaf_values(second)
    return tuple(
        change for field, before in leaf_values(first).items() for change in _changes(field, before, after[field])
    )


def _changes(field: str, before: object, after: object) -> Iterator[Change]:
    if isinstance(before, tuple) and isinstance(after, tuple):
        old, new = _entries(before), _entries(after)
        for entry in (entry for entry in old if entry not in new):
            yield Change(field=field, effect=_effect(field, more=False), before=entry, after=None)
        for entry in (entry for entry in new if entry not in old):
            yield Change(field=field, effect=_effect(field, more=True), before=None, after=entry)
        return
    old_size, new_size = _size(field, before), _size(field, after)
    if old_size != new_size:
        effect: Effect = "changed"
        if isinstance(old_size, int) and isinstance(new_size, int):
            effect = _effect(field, more=new_size > old_size)
        yield Change(field=field, effect=effect, before=before, after=after)


def _effect(field: str, *, more: bool) -> Effect:
    if field in _NEUTRAL:
        return "changed"
    return "withdrawn" if more == (field in _RESTRICTS) else "granted"


def _size(field: str, value: object) -> object:
    """Return a value for comparison. A 0 with a special meaning becomes the value that X07 uses in place of it."""
    return _ZERO_MEANS[field] if value == 0 and field in _ZERO_MEANS else value


def _entries(values: tuple[object, ...]) -> dict[object, None]:
    """Return the distinct entries of a list in order. A host becomes one entry per port."""
    found: dict[object, None] = {}
    for value in values:
        if isinstance(value, HostPorts):
            found |= {f"{value.host.encode().lower().decode()}:{port}": None for port in value.ports}
        else:
            found[value] = None
    return found
