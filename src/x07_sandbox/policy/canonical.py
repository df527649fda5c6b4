"""The one form of a document that its digest is made of."""

import hashlib
import json

import msgspec

from x07_sandbox.policy.model import Policy


def canonical_json(value: object) -> bytes:
    """JSON without blanks, keys sorted at all levels, characters unescaped, no newline."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def policy_digest(policy: Policy) -> str:
    """`sha256:` and the sum of the canonical JSON, with the defaults of every section that is there filled in.

    The result of a run has another digest (`digests.policy`), of the file's bytes.
    """
    return f"sha256:{hashlib.sha256(canonical_json(msgspec.to_builtins(policy))).hexdigest()}"
