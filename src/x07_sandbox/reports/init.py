"""The document of `x07 init`, `x07.sandbox.init.report@0.1.0`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from x07_sandbox.host.documents import Status
from x07_sandbox.programs.new_manifest import ROWS

_TOOLCHAINS: Final = sorted([*(row.name for row in ROWS), "x07"])


class InitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line, with its keys in this order. out: the file's name in the project's root."""

    schema_version: Literal["x07.sandbox.init.report@0.1.0"] = "x07.sandbox.init.report@0.1.0"
    toolchain: Annotated[str, msgspec.Meta(extra_json_schema={"enum": _TOOLCHAINS})]
    project_root: str
    out: str
    status: Status
