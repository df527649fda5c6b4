"""What a result says of something that was refused, and what would allow it. `plan/observed` makes most of it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class HowToAllow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What would allow it: a value of the policy, null where something else does, and the flag where there is one.

    setting: a line of the user's own settings (docs/explanation/network.md), where only that allows it.
    """

    json_path: str | None
    value: Any
    flag: str | None = None
    setting: str | None = None


class Denial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that the program tried, or the policy asked for, and did not get.

    field: the policy's; or `permissions`, `system-calls`, `scratch`, `output`, `secrets`, `protected`, `kind`,
        `reserved`, which no policy decides; of a connection, the id of the rule that refused it.
    subject: what it was about: a path as the program sees it, with a slash at its end where something new was to be
        made in that folder. count: how often, as far as it was seen.
    how_to_allow: null where nothing allows it. reason: why, as a clause; empty where the field says it.
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
    """Something that the program seems to have missed, and what would bring it there (plan/hints).

    kind: whether it is not there, is a library that cannot be loaded from where it lies, a variable that is not set, or
        a connection of a run that has no network.
    how: what lets it be read, or loaded. to_write: what lets a file of that name be made; null where nothing does.
    """

    subject: str
    kind: Literal["missing", "library", "variable", "network"] = "missing"
    how: HowToAllow
    to_write: HowToAllow | None = None


class Area(msgspec.Struct, frozen=True, kw_only=True):
    """A mount of the host's in the guest. given: as the policy or the flag names it. at: where the program sees it."""

    given: str
    at: str
    write: bool
