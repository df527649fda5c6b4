"""A complete policy made from a policy template and flags (`x07 policy new` and `x07 policy init`).

Also the flags that complete an incomplete policy document. Pure.
"""

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.limits import LimitChanges, change_limits
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.overrides import Overrides, ReadFile, derive_policy
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
