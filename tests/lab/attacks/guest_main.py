"""Runs in the guest as root: reads one command per line of JSON, and answers each with one line."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from typing import Any


def main() -> None:
    """Arguments: "frames" for the stream to the gate, else "stack" for what the guest's kernel and relay offer."""
    attacks = importlib.import_module(f"tests.lab.attacks.guest_{sys.argv[1]}")
    state: dict[str, Any] = {}
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        name = order.pop("do")
        if name == "end":
            break
        try:
            answer = getattr(attacks, name)(state, **order) or {}
        except BaseException:  # noqa: BLE001 - the test tells of it
            answer = {"error": traceback.format_exc()}
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
