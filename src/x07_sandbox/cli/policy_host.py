"""`x07 policy check --host`: whether the gate would allow a connection."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from x07_sandbox.network.rules import NetSettings, decide, make_allowlist, parse_request
from x07_sandbox.network.settings import read_settings
from x07_sandbox.policy.overrides import denied_hosts
from x07_sandbox.reports.policies import HostReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from x07_sandbox.network.rules import Transport
    from x07_sandbox.policy.model import Policy


def host_report(
    policy: Policy, source: str, endpoint: str, transport: Transport, denied: Sequence[str] = ()
) -> HostReport:
    """Decide about a connection as the gate does. Raises UsageError, PolicyError.

    source: the policy as the user named it. denied: hosts in the form of `--deny-host`.
    """
    request = parse_request(endpoint, transport)
    # Connections to a loopback address stay in the guest, so the user's settings do not apply.
    own = not isinstance(request.host, str) and request.host.is_loopback
    settings = NetSettings() if own else read_settings()
    decision = decide(make_allowlist(policy, denied_hosts(denied), settings), request)
    return HostReport(
        policy=source,
        policy_id=policy.policy_id,
        host=str(request.host),
        port=request.port,
        transport=transport,
        allowed=decision.allowed,
        rule=decision.rule,
        reason=decision.reason,
        how_to_allow=decision.how_to_allow,
        resolved_later=decision.allowed and isinstance(request.host, str),
    )


def lines(report: HostReport) -> list[str]:
    """Return the report as text."""
    host = f"[{report.host}]" if ":" in report.host else report.host
    connection = f"{host}:{report.port} ({report.transport})"
    text = [f"{connection}: {'allowed' if report.allowed else 'denied'}", f"  rule {report.rule}: {report.reason}"]
    if report.allowed:
        if report.resolved_later:
            text.append("  its addresses are checked at run time; special ones, such as private ones, are denied")
    elif (how := report.how_to_allow) is None:
        text.append("  no change to the policy allows it")
    elif how.json_path == "$.net.allow_hosts":  # the value is the whole list
        text.append(f"  to allow it: add {json.dumps(how.value[-1])} to net.allow_hosts in the policy")
        if how.flag:
            text.append(f"  or, for one run: {how.flag}")
    else:
        text.append(f"  to allow it: set {str(how.json_path)[2:]} to {json.dumps(how.value)} in the policy")
    return text
