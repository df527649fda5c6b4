"""A complete policy made from a policy template and a few flags (`x07 policy new`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.limits import LimitChanges, change_limits
from x07_sandbox.policy.overrides import Overrides, derive_policy
from x07_sandbox.policy.templates import BUILT_IN, TEMPLATES

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy


class NewPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that the flags set. All other fields come from the policy template called *template*."""

    template: str = "default"
    policy_id: str | None = None
    limits: LimitChanges = LimitChanges()
    hosts: tuple[str, ...] = ()
    read_roots: tuple[str, ...] = ()
    write_roots: tuple[str, ...] = ()


def make_policy(wanted: NewPolicy) -> Policy:
    """Return the policy with the fields of *wanted*. Raises UsageError if a policy cannot hold one of the values."""
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
    raise UsageError(f"cannot read {name}", "host files are not supported here", "Give the hosts as flags")
