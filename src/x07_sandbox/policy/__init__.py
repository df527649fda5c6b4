"""The policy document: its model, its decoder and the built-in default policy."""

from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.default import default_policy, render_policy
from x07_sandbox.policy.environment import program_environment
from x07_sandbox.policy.model import SCHEMA_VERSION, Policy, leaf_values
from x07_sandbox.policy.problems import PolicyError, Problem

__all__ = [
    "SCHEMA_VERSION",
    "Policy",
    "PolicyError",
    "Problem",
    "decode_policy",
    "default_policy",
    "leaf_values",
    "program_environment",
    "render_policy",
]
