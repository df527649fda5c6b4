"""What `x07 init` reports, `x07.sandbox.init.report@0.1.0`."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from x07_sandbox.host.documents import Status

SCHEMA: Final = "x07.sandbox.init.report@0.1.0"


class InitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One compact line, with its keys in this order. out: the file's name in the project's root."""

    schema_version: Literal["x07.sandbox.init.report@0.1.0"] = SCHEMA
    toolchain: Literal["c", "cpp", "make", "python", "shell", "x07"]
    project_root: str
    out: str
    status: Status
