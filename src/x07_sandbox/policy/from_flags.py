"""A complete policy made from a policy template and flags (`x07 policy new` and `x07 policy init`).

Also the flags that complete an incomplete policy document. Pure.
"""

import shlex
from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.decode import accept, parse
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.limits import NAMES, LimitChanges, change_limits, flag_text
from x07_sandbox.policy.model import Policy, leaf_values
from x07_sandbox.policy.overrides import Overrides, ReadFile, derive_policy
from x07_sandbox.policy.problems import PolicyError
from x07_sandbox.policy.templates import BUILT_IN, TEMPLATES


def _no_file(name: str) -> bytes:
    raise UsageError(f"cannot read {name}", "host files are not supported here", "Give the hosts as flags")


class NewPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The changes to make to the policy template called *template*. None keeps the id and the notes of the template."""

    template: str = "default"
    policy_id: str | None = None
    notes: str | None = None
    limits: LimitChanges = LimitChanges()
    overrides: Overrides = Overrides()


def make_policy(wanted: NewPolicy, read_spec_file: ReadFile = _no_file) -> Policy:
    """Return the template with the changes of *wanted*. Raises UsageError if a policy cannot hold one of the values.

    read_spec_file: see `derive_policy`.
    """
    base, overrides = TEMPLATES[wanted.template], wanted.overrides
    policy = change_limits(base, wanted.limits, may_raise=True, source=f"{BUILT_IN}{wanted.template}")
    if overrides.allows:
        policy = replace(policy, net=replace(policy.net, enabled=True, allow_tcp=True))
    if overrides.allow_read_root or overrides.allow_write_root or overrides.include:
        policy = replace(policy, fs=replace(policy.fs, enabled=True))
    if overrides.given:
        data = render_policy(policy)
        policy = derive_policy(policy, data, wanted.template, overrides, read_spec_file=read_spec_file).policy
    notes = base.notes if wanted.notes is None else wanted.notes
    return replace(policy, policy_id=wanted.policy_id or base.policy_id, notes=notes)


_DEFAULT: Final = TEMPLATES["default"]


class Completion(msgspec.Struct, frozen=True):
    """A command that completes a document."""

    words: tuple[str, ...]  # arguments of `x07 policy new`
    left_out: tuple[str, ...]  # fields that no flag can set

    def line(self, file: str) -> str:
        """Return the command as a shell line that writes its output to *file*."""
        return f"x07 policy new {' '.join(map(shlex.quote, self.words))}{' ' * bool(self.words)}> {shlex.quote(file)}"


def completion(data: bytes) -> Completion | None:
    """Return the command that completes a document, or None if anything else than missing fields is wrong with it.

    The document is untrusted: only printable values become arguments.
    """
    try:
        document = parse(data, source="")
    except PolicyError:
        return None
    if not isinstance(document, dict) or not document:
        return None
    filled = msgspec.to_builtins(_DEFAULT)
    for name, section in document.items():
        there = filled.get(name)
        filled[name] = there | section if isinstance(there, dict) and isinstance(section, dict) else section
    wanted = accept(filled)
    if wanted is None or accept(document) is not None:
        return None
    words, covered, refused = list[str](), set[str](), set[str]()
    for field, flag, new in _flags(wanted):
        if flag[1].isprintable() and not flag[1].startswith("-") and _is_valid(new):
            words += flag
            covered.add(field)
        else:
            refused.add(field)
    usual = leaf_values(_DEFAULT)
    changed = [field for field, value in leaf_values(wanted).items() if value != usual[field] and field != "notes"]
    return Completion(tuple(words), tuple(field for field in changed if field not in covered - refused))


def _flags(wanted: Policy) -> Iterator[tuple[str, list[str], NewPolicy]]:
    """Yield the fields in which *wanted* differs from the default, each with a flag and what the flag sets."""
    if wanted.policy_id != _DEFAULT.policy_id:
        yield "policy_id", ["--id", wanted.policy_id], NewPolicy(policy_id=wanted.policy_id)
    for name in NAMES:
        if (value := getattr(wanted.limits, name)) != getattr(_DEFAULT.limits, name):
            changes = replace(LimitChanges(), **{name: value})
            yield f"limits.{name}", flag_text(name, value).split(), NewPolicy(limits=changes)
    if wanted.fs.enabled:  # a flag for a root or a host would switch its section on
        for root in wanted.fs.read_roots:
            yield "fs.read_roots", ["--read", root], NewPolicy(overrides=Overrides(allow_read_root=(root,)))
        for root in wanted.fs.write_roots:
            yield "fs.write_roots", ["--write", root], NewPolicy(overrides=Overrides(allow_write_root=(root,)))
    for entry in wanted.net.allow_hosts if wanted.net.enabled and wanted.net.allow_tcp else ():
        host = f"[{entry.host}]" if ":" in entry.host else entry.host
        spec = f"{host}:{','.join(map(str, entry.ports))}"
        yield "net.allow_hosts", ["--allow-host", spec], NewPolicy(overrides=Overrides(allow_host=(spec,)))


def _is_valid(new: NewPolicy) -> bool:
    try:
        make_policy(new)
    except UsageError:
        return False
    return True
