"""Runs in the build VM: checks a script or a tree of them, and packs it as a tree stream.

Arguments: the path of the module channel/trees, "file" or "tree", the source's folder, the file to start, the folder
where the tree will be unpacked, the output, then the command that checks the file to start (none for Python). Every
Python file is byte-compiled. Errors go to standard error and make the exit status 1.
"""

import sys

del sys.path[0]  # the folder of this script, where the source may be too, under a name like traceback.py

import importlib.util
import os
import traceback
from importlib._bootstrap_external import _code_to_hash_pyc  # type: ignore[attr-defined]  # as py_compile does
from importlib.machinery import SourceFileLoader
from types import ModuleType

module, what, folder, name, target, output, *check = sys.argv[1:]
sys.dont_write_bytecode = True
trees = ModuleType("trees")
SourceFileLoader("trees", module).exec_module(trees)
wrong: list[str] = []
records: list[bytes] = []
caches: set[bytes] = set()


def add_folder(path: bytes) -> None:
    """Add a folder to the tree."""
    records.append(trees.Entry(trees.Kind.FOLDER, path, mode=0o755).encoded())


def compiled(path: bytes, text: bytes) -> None:
    """Add the byte code of one Python file to the tree."""
    shown = f"{target}/{os.fsdecode(path)}"
    try:
        code = compile(text, shown, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as exc:
        wrong.append("".join(traceback.format_exception_only(exc)))
        return
    except (MemoryError, OverflowError, RecursionError) as exc:  # these name no file
        wrong.append(f"{shown}: " + "".join(traceback.format_exception_only(exc)))
        return
    above, _, base = path.rpartition(b"/")
    cache = above + b"/__pycache__" if above else b"__pycache__"
    if cache not in caches:
        caches.add(cache)
        add_folder(cache)
    place = b"%s/%s.%s.pyc" % (cache, base.rpartition(b".")[0], sys.implementation.cache_tag.encode())
    byte_code = _code_to_hash_pyc(code, importlib.util.source_hash(text), checked=False)
    records.append(trees.file_record(place, byte_code))


def add_file(path: bytes, fd: int) -> None:
    """Add one file to the tree, with the byte code if it is a Python file."""
    with os.fdopen(fd, "rb") as file:
        text, mode = file.read(), os.fstat(fd).st_mode
    records.append(trees.file_record(path, text, 0o755 if mode & 0o100 else 0o644))
    if path.endswith(b".py") or (path == os.fsencode(name) and not check):
        compiled(path, text)


if what == "tree":
    top = os.open(folder, trees.FOLDER_FLAGS)
    for found in trees.walk(top, wanted=lambda _, path: path.rpartition(b"/")[2] != b"__pycache__"):
        if found.fd < 0:
            add_file(found.name, found.open())
        elif found.name:
            add_folder(found.name)
else:
    add_file(os.fsencode(name), os.open(f"{folder}/{name}", os.O_RDONLY))
if check:
    os.chdir(folder)
    pid = os.posix_spawn(check[0], [*check, f"{folder}/{name}"], {})
    if os.waitpid(pid, 0)[1]:
        sys.exit(1)
if wrong:
    sys.stderr.write("".join(wrong))
    sys.exit(1)
with open(output, "wb") as file:
    file.writelines([*records, trees.Entry(trees.Kind.END, b"").encoded()])
