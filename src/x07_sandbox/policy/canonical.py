"""The canonical form of a document, from which its digest is computed."""

import hashlib
import json

import msgspec

from x07_sandbox.policy.model import Policy


def canonical_json(value: object) -> bytes:
    """Return JSON without whitespace or final newline, keys sorted at all levels, characters unescaped."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def policy_digest(policy: Policy) -> str:
    """Return `sha256:` and the digest of the canonical JSON, with the defaults of every present section filled in.

    `digests.policy` in the result of a run is another digest: that of the file's bytes.
    """
    return f"sha256:{hashlib.sha256(canonical_json(msgspec.to_builtins(policy))).hexdigest()}"
