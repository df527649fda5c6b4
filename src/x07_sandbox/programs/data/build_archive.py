"""Runs in the build VM: checks a script or a tree of them, and packs it as a newc archive (cpio(5)).

Arguments: "file" or "tree", the source's folder, the file to start, the folder where the archive will be unpacked, the
output, then the command that checks the file to start (none for Python). Every Python file is byte-compiled. Errors go
to standard error and make the exit status 1.
"""

import sys

del sys.path[0]  # the folder of this script, where the source may be too, under a name like traceback.py

import importlib.util
import io
import os
import traceback
from importlib._bootstrap_external import _code_to_hash_pyc  # type: ignore[attr-defined]  # as py_compile does

what, folder, name, target, output, *check = sys.argv[1:]
sys.dont_write_bytecode = True
wrong: list[str] = []
entries: dict[str, tuple[int, bytes]] = {}


def compiled(path: str, text: bytes) -> None:
    """Add the byte code of one Python file to the archive."""
    try:
        code = compile(text, f"{target}/{path}", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as exc:
        wrong.append("".join(traceback.format_exception_only(exc)))
        return
    except (MemoryError, OverflowError, RecursionError) as exc:  # these name no file
        wrong.append(f"{target}/{path}: " + "".join(traceback.format_exception_only(exc)))
        return
    at, _, base = path.rpartition("/")
    cache = f"{at}/__pycache__" if at else "__pycache__"
    entries[cache] = (0o040755, b"")
    byte_code = _code_to_hash_pyc(code, importlib.util.source_hash(text), checked=False)
    entries[f"{cache}/{base.rpartition('.')[0]}.{sys.implementation.cache_tag}.pyc"] = (0o100644, byte_code)


def take(path: str) -> None:
    """Add one file to the archive, with the byte code if it is a Python file."""
    with open(f"{folder}/{path}", "rb") as file:
        text = file.read()
        mode = os.fstat(file.fileno()).st_mode
    entries[path] = (0o100755 if mode & 0o100 else 0o100644, text)
    if path.endswith(".py") or (path == name and not check):
        compiled(path, text)


def walk(below: str) -> None:
    """Add the files of a folder to the archive."""
    for found in sorted(os.listdir(f"{folder}/{below}")):
        path = f"{below}/{found}" if below else found
        if found == "__pycache__":
            continue
        if os.path.isdir(f"{folder}/{path}"):
            entries.setdefault(path, (0o040755, b""))
            walk(path)
        else:
            take(path)


if what == "tree":
    walk("")
else:
    take(name)
if check:
    os.chdir(folder)
    pid = os.posix_spawn(check[0], [*check, f"{folder}/{name}"], {})
    if os.waitpid(pid, 0)[1]:
        sys.exit(1)
if wrong:
    sys.stderr.write("".join(wrong))
    sys.exit(1)

entries["TRAILER!!!"] = (0, b"")
archive = io.BytesIO()
for number, (path, (mode, data)) in enumerate(entries.items(), start=1):
    raw = path.encode("utf-8", "surrogateescape") + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    archive.write(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
    archive.write(b"\0" * (-archive.tell() % 4))
    archive.write(data)
    archive.write(b"\0" * (-archive.tell() % 4))
with open(output, "wb") as file:
    file.write(archive.getvalue())
