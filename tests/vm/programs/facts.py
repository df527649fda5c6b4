# ruff: noqa: PTH119, PTH120, PTH123, PTH208, T201 - run in the guest, as a user would write it
"""Tells where it lies and what its byte code is, as one line of JSON; then fails, to show its traceback."""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import sys


def told() -> dict[str, object]:
    """What a test wants to know."""
    cached = importlib.util.cache_from_source(__file__)
    with open(cached, "rb") as file:
        byte_code = file.read()
    with open("/x07/in/policy.json", "rb") as file:
        policy = file.read()
    code = importlib.machinery.SourcelessFileLoader("again", cached).get_code("again")
    assert code is not None
    return {
        "file": __file__,
        "argv": sys.argv,
        "beside": sorted(os.listdir(os.path.dirname(__file__))),
        "in": sorted(os.listdir("/x07/in")),
        "cached": os.path.basename(cached),
        "flags": int.from_bytes(byte_code[4:8], "little"),
        "from_byte_code": code.co_filename,
        "policy": hashlib.sha256(policy).hexdigest(),
        "path": sys.path[0],
    }


def fail() -> None:
    """End as a program with a mistake does."""
    raise ValueError("on purpose")  # the line that the traceback shows


print(json.dumps(told()), flush=True)
fail()
