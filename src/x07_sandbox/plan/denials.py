"""Denials and hints of a result, and what would allow them. `plan/observed` makes most of them."""

from typing import Any, Literal

import msgspec


class HowToAllow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What would allow something that was refused.

    json_path: the field of the policy; null if no field does.
    value: the value to set it to.
    flag: the flag that does the same, if there is one.
    setting: a line of the user's own settings, if only that allows it (docs/explanation/network.md).
    """

    json_path: str | None
    value: Any
    flag: str | None = None
    setting: str | None = None


class Denial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that the program tried, or the policy asked for, and that was denied.

    field: the field of the policy; or `permissions`, `system-calls`, `scratch`, `output`, `secrets`, `protected`,
        `kind` or `reserved`, which no policy decides; for a connection, the id of the rule that refused it.
    action: what was tried.
    subject: the path, host or limit concerned. A path that ends in a slash is the folder in which something was to be
        made.
    enforced_by: who refused it.
    observed_by: where it was seen.
    count: how often it was seen.
    how_to_allow: what would allow it; null if nothing does.
    reason: why it was refused, as a clause; empty if the field says so.
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
    """Something that the program seems to miss, and what would provide it.

    subject: the path, module, command, variable or host.
    kind: whether it is not there, is a library in a place it cannot be loaded from, a variable that is not set, or a
        connection of a run without network.
    how: what lets the program read or load it.
    to_write: what lets the program create a file of that name; null if nothing does.
    """

    subject: str
    kind: Literal["missing", "library", "variable", "network"] = "missing"
    how: HowToAllow
    to_write: HowToAllow | None = None


class GuestMount(msgspec.Struct, frozen=True, kw_only=True):
    """A host folder in the guest. given: its name in the policy or flag. at: its path in the guest."""

    given: str
    at: str
    write: bool
