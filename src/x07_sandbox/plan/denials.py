"""Denials and hints of a result, and what would allow them. `plan/observed` makes most of them."""

from typing import Any, Literal

import msgspec


class HowToAllow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What would allow it: a policy value (json_path is null if there is none), a flag, or a setting.

    setting: a line of the user's own settings (docs/explanation/network.md), if only that allows it.
    """

    json_path: str | None
    value: Any
    flag: str | None = None
    setting: str | None = None


class Denial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that the program tried, or the policy asked for, and that was denied.

    field: the policy's; or `permissions`, `system-calls`, `scratch`, `output`, `secrets`, `protected`, `kind`,
        `reserved`, which no policy controls; for a connection the id of the rule that denied it.
    subject: for a file its path as the program sees it, with a final slash if something new was to be created in that
        folder. count: how often it was observed.
    how_to_allow: null if nothing allows it. reason: a clause; empty if the field says enough.
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
    """Something that the program seems to lack, and what would provide it (plan/hints).

    kind: a missing file, a library that cannot be loaded from its folder, an unset variable, or a connection of a run
        without network.
    how: what would make it readable or loadable. to_write: what would allow a file of that name to be created.
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
