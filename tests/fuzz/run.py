"""Runs one fuzz target under atheris: python -m tests.fuzz.run TARGET FOLDER [libFuzzer arguments].

The seeds are written to the folder first, to which the fuzzer adds the inputs that it finds. See CONTRIBUTING.md.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Final

import atheris

from tests.fuzz.targets import target

# Instrumented for coverage; a target is imported only here, so that these modules are imported instrumented.
WATCHED: Final = {
    "changes": ["x07_sandbox.channel", "x07_sandbox.files"],
    "channel": ["x07_sandbox.channel"],
    "client_hello": ["h11", "x07_sandbox.network"],
    "dns": ["x07_sandbox.guest.dns"],
    "documents": ["x07_sandbox.policy", "x07_sandbox.programs", "x07_sandbox.reports", "tomllib"],
    "egress": ["x07_sandbox.channel"],
    "hints": ["x07_sandbox.policy"],
    "http_requests": ["h11", "x07_sandbox.network"],
    "images": ["x07_sandbox.images"],
    "names": ["idna", "x07_sandbox.network"],
    "observed": ["x07_sandbox.policy"],
    "patch": ["x07_sandbox.files.patch"],
    "ttrpc": ["x07_sandbox.backends.firecracker", "x07_sandbox.backends.protobuf"],
    "unpack": ["x07_sandbox.channel", "x07_sandbox.files", "x07_sandbox.guest"],
}


def main(argv: list[str]) -> None:
    """Fuzz until a failure, a limit in the arguments, or Ctrl-C."""
    if len(argv) < 3 or argv[1] not in WATCHED:
        sys.exit(__doc__)
    with atheris.instrument_imports(include=WATCHED[argv[1]]):
        fuzzed = target(argv[1])
    folder = Path(argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for data in fuzzed.seeds().values():
        (folder / hashlib.sha256(data).hexdigest()).write_bytes(data)
    atheris.Setup([argv[0], *argv[2:]], fuzzed.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
