"""A run's result as JSON: the short form (`--json`) or the full form (`--json=full`). A run loads no other document."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import msgspec

from x07_sandbox.host.documents import plain, render_json

if TYPE_CHECKING:
    from x07_sandbox.sessions.result import Result


class OmittedControls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A summary of the controls that plain `--json` omits, because they equal those of the built-in policy in a VM.

    enforced: the number of omitted controls whose field is enforced.
    advisory: the policy fields of the omitted controls that are only advisory.
    digest: `sha256:<hex>` of the omitted controls, in the form of `x07 run --json=full` but as JSON without blanks.
    """

    enforced: int
    advisory: list[str]
    digest: str


def render_result(result: Result, *, full: bool) -> bytes:
    """Return one JSON object. The full form has many lines, the short form one line for each key."""
    if full:
        return render_json(result.document())
    document = _short(result)
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def _short(result: Result) -> dict[str, object]:
    document: dict[str, object] = plain(result.document())
    usual = _usual_controls()
    omitted = [msgspec.to_builtins(c) for c in result.controls if usual.get(c.field) == (c.state, c.by, c.why)]
    if not omitted:
        return document
    fields = {control["field"] for control in omitted}
    short = OmittedControls(
        enforced=sum(control["state"] == "enforced" for control in omitted),
        advisory=[control["field"] for control in omitted if control["state"] == "advisory"],
        digest=f"sha256:{hashlib.sha256(json.dumps(omitted, separators=(',', ':')).encode()).hexdigest()}",
    )
    listed = [msgspec.to_builtins(control) for control in result.controls if control.field not in fields]
    return document | {"controls": listed, "controls_omitted": msgspec.to_builtins(short)}


def _usual_controls() -> dict[str, tuple[str, str, str]]:
    """Return the state, enforcer and reason of each field of the built-in policy in a VM."""
    from x07_sandbox.policy.controls import make_plan
    from x07_sandbox.policy.decode import default_policy
    from x07_sandbox.policy.features import vm_features

    plan = make_plan(default_policy(), vm_features("vm-hardware"))
    return {c.field: (c.state, c.by, c.why) for c in plan.controls if c.state != "refused"}
