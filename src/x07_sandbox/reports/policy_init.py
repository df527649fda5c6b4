"""The document of `x07 policy init`, `x07.policy.init.report@0.1.0`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from x07_sandbox.host.documents import Status


class PolicyInitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line, with its keys in this order. out: the policy's path, relative to the project's root if inside it."""

    schema_version: Literal["x07.policy.init.report@0.1.0"] = "x07.policy.init.report@0.1.0"
    template: Literal[
        "cli",
        "default",
        "fs-tool",
        "http-client",
        "postgres-client",
        "sqlite-app",
        "web-service",
        "worker",
        "worker-parallel",
    ]
    project_root: str
    out: str
    status: Status
    policy_id: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
