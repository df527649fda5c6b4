"""Policies with other values than the built-in one, named by path."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from x07_sandbox.policy.decode import default_policy, render_policy

if TYPE_CHECKING:
    from collections.abc import Mapping


def document_with(values: Mapping[str, object]) -> dict[str, Any]:
    """Return the built-in policy as JSON with these values, such as "limits.fds"."""
    made: dict[str, Any] = json.loads(render_policy(default_policy()))
    for path, value in values.items():
        *sections, name = path.split(".")
        holder = made
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return made
