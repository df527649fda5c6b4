"""Runs in the build VM: checks a script or a tree of them, and puts it into a folder, with byte code.

Arguments: "file" or "tree", the source's folder, the file to start, the folder where the program will be, the output
folder, then the command that checks the file to start (none for Python). Every Python file is byte-compiled. Errors go
to standard error and make the exit status 1.
"""

import sys

del sys.path[0]  # the folder of this script, where the source may be too, under a name like traceback.py

import importlib.util
import os
import traceback
from importlib._bootstrap_external import _code_to_hash_pyc  # type: ignore[attr-defined]  # as py_compile does

what, folder, name, target, output, *check = sys.argv[1:]
sys.dont_write_bytecode = True
wrong: list[str] = []


def put(path: str, data: bytes, mode: int) -> None:
    """Write one file to the output folder."""
    fd = os.open(f"{output}/{path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def compiled(path: str, text: bytes) -> None:
    """Write the byte code of one Python file."""
    try:
        code = compile(text, f"{target}/{path}", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as exc:
        wrong.append("".join(traceback.format_exception_only(exc)))
        return
    except (MemoryError, OverflowError, RecursionError) as exc:  # these name no file
        wrong.append(f"{target}/{path}: " + "".join(traceback.format_exception_only(exc)))
        return
    above, _, base = path.rpartition("/")
    cache = f"{above}/__pycache__" if above else "__pycache__"
    if not os.path.isdir(f"{output}/{cache}"):
        os.mkdir(f"{output}/{cache}")
    byte_code = _code_to_hash_pyc(code, importlib.util.source_hash(text), checked=False)
    put(f"{cache}/{base.rpartition('.')[0]}.{sys.implementation.cache_tag}.pyc", byte_code, 0o644)


def take(path: str) -> None:
    """Copy one file, with the byte code if it is a Python file."""
    with open(f"{folder}/{path}", "rb") as file:
        text = file.read()
        mode = os.fstat(file.fileno()).st_mode
    put(path, text, 0o755 if mode & 0o100 else 0o644)
    if path.endswith(".py") or (path == name and not check):
        compiled(path, text)


def walk(below: str) -> None:
    """Copy the files of a folder."""
    for found in sorted(os.listdir(f"{folder}/{below}")):
        path = f"{below}/{found}" if below else found
        if found == "__pycache__":
            continue
        if os.path.isdir(f"{folder}/{path}"):
            os.mkdir(f"{output}/{path}")
            walk(path)
        else:
            take(path)


os.mkdir(output)
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
