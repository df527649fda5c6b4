"""Pack the guest's Python code as byte code into a zip; run by the guest image's own interpreter.

    python3 -I -S pack.py SOURCE DATA TARGET

SOURCE contains the folder x07_sandbox, and DATA the data files. The byte code is "unchecked", so that Python does not
look for source files. The zip is reproducible: it has sorted names and a fixed date.
"""

import importlib.util
import marshal
import sys
import zipfile
from pathlib import Path

SHOWN = "/x07/agent"  # the path in tracebacks
MAIN = b"from x07_sandbox.guest.agent import main\n\nmain()\n"
DATE = (1980, 1, 1, 0, 0, 0)


def byte_code(source: bytes, shown: str) -> bytes:
    """Return the content of a .pyc with an unchecked source hash (PEP 552). shown: the file name in tracebacks."""
    code = compile(source, shown, "exec", dont_inherit=True, optimize=0)
    flags = (1).to_bytes(4, "little")
    return importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(source) + marshal.dumps(code)


def main(source: str, data: str, target: str) -> None:
    """Write the Python code below *source* and the files in *data* to the zip *target*."""
    files = {"__main__.py": MAIN}
    for path in Path(source).rglob("*.py"):
        files[path.relative_to(source).as_posix()] = path.read_bytes()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            code = byte_code(files[name], f"{SHOWN}/{name.removeprefix('x07_sandbox/')}")
            archive.writestr(_entry(name + "c"), code)
        for path in sorted(Path(data).iterdir()):
            archive.writestr(_entry(f"data/{path.name}"), path.read_bytes())


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, DATE)
    info.external_attr = 0o100444 << 16
    return info


if __name__ == "__main__":
    main(*sys.argv[1:])
