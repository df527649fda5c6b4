"""Runs in the build VM: check a Python source, byte-compile it, pack both as a newc archive (cpio(5)).

Arguments: source, its own name, the folder it will lie in, output. Exit 1 with the error as Python shows it.
"""

import importlib.util
import io
import sys
import traceback
from importlib._bootstrap_external import _code_to_hash_pyc  # type: ignore[attr-defined]  # as py_compile does

source, name, folder, output = sys.argv[1:]
with open(source, "rb") as file:
    text = file.read()
sys.dont_write_bytecode = True
try:
    code = compile(text, f"{folder}/{name}", "exec", dont_inherit=True)
except (SyntaxError, ValueError) as exc:
    sys.stderr.write("".join(traceback.format_exception_only(exc)))
    sys.exit(1)

stem = name.rpartition(".")[0]
byte_code = _code_to_hash_pyc(code, importlib.util.source_hash(text), checked=False)
entries = [
    (name, 0o100644, text),
    ("__pycache__", 0o040755, b""),
    (f"__pycache__/{stem}.{sys.implementation.cache_tag}.pyc", 0o100644, byte_code),
    ("TRAILER!!!", 0, b""),
]
archive = io.BytesIO()
for number, (path, mode, data) in enumerate(entries, start=1):
    raw = path.encode("utf-8", "surrogateescape") + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    archive.write(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
    archive.write(b"\0" * (-archive.tell() % 4))
    archive.write(data)
    archive.write(b"\0" * (-archive.tell() % 4))
with open(output, "wb") as file:
    file.write(archive.getvalue())
