"""The canonical form of a document, from which its digest is computed."""

import hashlib
import json

import msgspec

from x07_sandbox.policy.model import Policy


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys, without whitespace, final newline or escapes for non-ASCII characters."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def policy_digest(policy: Policy) -> str:
    """Return `sha256:` and the digest of the canonical JSON of *policy*, with the defaults of every section.

    The field `digests.policy` in a run's result is a different digest: that of the policy file's bytes.
    """
    return f"sha256:{hashlib.sha256(canonical_json(msgspec.to_builtins(policy))).hexdigest()}"
