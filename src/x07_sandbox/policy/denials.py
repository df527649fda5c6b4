"""Outcomes, controls, denials, hints and network use in a result, and advice on how to allow what was denied."""

from typing import Any, Final, Literal

import msgspec

CONNECTS: Final = frozenset({"connect", "look up"})  # actions of denied connections
STARTS: Final = "start"
"""The action of a denied process or thread."""

State = Literal["enforced", "advisory", "refused"]
# How a run ended. The table of outcomes (policy/outcomes) is elsewhere, because it would slow down every start.
Outcome = Literal[
    "ok",
    "failed",
    "signalled",
    "timeout",
    "cpu-limit",
    "oom",
    "output-limit",
    "refused",
    "guest-lost",
    "gate-lost",
    "backend-error",
    "internal-error",
    "build-failed",
    "cancelled",
    "usage-error",
]


class Control(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field of the policy, and what enforces it.

    field: the policy field.
    state: whether the field is enforced, advisory (only programs that check the policy obey it) or refused.
    by: the component that enforces the field.
    why: how the field is enforced, or why it is not.
    """

    field: str
    state: State
    by: str
    why: str


class HowToAllow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The change that would allow something that was denied.

    json_path: the policy field to change; null if no field allows it.
    value: the value to set the field to.
    flag: the flag that has the same effect, if such a flag exists, or `command` and `next_flag` in one phrase.
    command: the command to run first; null if none is needed.
    next_flag: what the next run needs after that command; null if it needs nothing.
    setting: lines for the user's own settings, which are needed besides the policy (docs/explanation/network.md).
    """

    json_path: str | None
    value: Any
    flag: str | None = None
    command: str | None = None
    next_flag: str | None = None
    setting: str | None = None


class Denial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An action that the program tried or the policy requested, and that was denied.

    field: the policy field that decided. If no policy field decided, it is `permissions`, `system-calls`, `scratch`,
    `output`, `secrets`, `hide`, `protected`, `kind` or `reserved`. For a connection, it is the id of the rule that
    denied it.
    action: the denied action.
    subject: the path, host or limit concerned. A path with a trailing slash is the folder in which the program tried to
        create something.
    enforced_by: the component that denied the action.
    observed_by: whether the host or the guest observed the denial.
    count: how many times the action was denied.
    how_to_allow: the change that would allow the action; null if no change can.
    reason: why the action was denied; empty if `field` explains it.
    """

    field: str
    action: str
    subject: str
    enforced_by: str
    observed_by: Literal["host", "guest"]
    count: int
    how_to_allow: HowToAllow | None
    reason: str = ""


class Hint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that the program seems to lack, and what would provide it.

    subject: the path, module, command, variable or host.
    kind: `missing` (the subject was not found), `library` (it cannot be loaded from its folder), `variable` (it is not
    set), `network` (the run has no network) or `elsewhere` (the file of the host has another path in the VM).
    how: the change that would provide the subject; no change for `elsewhere`.
    in_vm: the path in the VM, for `elsewhere`.
    to_write: the change that would let the program create a file of that name; null if no change can.
    """

    subject: str
    kind: Literal["missing", "library", "variable", "network", "elsewhere"] = "missing"
    how: HowToAllow
    in_vm: str | None = None
    to_write: HowToAllow | None = None


class GuestMount(msgspec.Struct, frozen=True, kw_only=True):
    """A host folder in the guest. given: the folder as written in the policy or flag. at: its path in the guest.

    host: its absolute path on the host; empty if it is not known.
    """

    given: str
    at: str
    write: bool
    host: str = ""


class Contact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections or datagrams to one destination that had the same result.

    host: the name or address that the program asked for; empty for all further hosts of a rule, after 256 rows.
    port: the destination port; 0 if the host is empty, or if a name was only looked up.
    transport: TCP or UDP.
    rule: the id of the rule that decided.
    reason: why the connections were denied or failed; empty if they were made.
    address: the address that the gate connected to or would have connected to; empty if the name was not resolved.
    tls_name: the name in TLS or HTTP, if that name caused the decision.
    count: the number of connections or datagrams.
    sent_bytes: the number of bytes that the program sent.
    received_bytes: the number of bytes that the program received.
    """

    host: str
    port: int
    transport: Literal["tcp", "udp"]
    rule: str
    reason: str = ""
    address: str = ""
    tls_name: str = ""
    count: int = 1
    sent_bytes: int = 0
    received_bytes: int = 0


class NetworkUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All connections of a run.

    allowed: connections that were made.
    denied: connections that were denied.
    failed: connections that were allowed but failed, for example because the server refused them or they were idle.
    more: the number of denials that the list does not contain, because it is full.
    log_dropped: the number of lines that the log of connections does not contain, because of its limits.
    """

    allowed: list[Contact] = []
    denied: list[Contact] = []
    failed: list[Contact] = []
    more: int = 0
    log_dropped: int = 0
