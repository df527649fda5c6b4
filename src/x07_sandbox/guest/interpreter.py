"""A Python interpreter that is started before the job, and becomes the program when the job arrives.

The interpreter is started with a placeholder as script name, and stops in its start-up, where Python imports
`sitecustomize`. That module comes from `hook`. It imports the preloaded modules and waits for the start message. Then
it removes itself, writes the real script name where the interpreter will read it, and returns, so that the script runs
with none of x07's code on the stack. If the program is not a suitable Python script, the module executes the program
instead.

Differences from a fresh start: docs/explanation/design.md, "Saved VMs".
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from typing import Any, Final, NoReturn

from x07_sandbox.guest.restrict import exec_functions

PYTHON: Final = "/usr/bin/python3"
FOLDER: Final = "/run/start"  # in the program's view until it starts
SCRIPTS: Final = "/x07/in/"
START_FD: Final = 3
STATUS_FD: Final = 4
RULES_FD: Final = 63  # below 64, so that the kernel need not grow the descriptor table
_NAME_MAX: Final = 255
PLACEHOLDER: Final = f"{SCRIPTS}program/{'x' * _NAME_MAX}"
ARGV: Final = [PYTHON, PLACEHOLDER]
# Variables that the interpreter reads before our hook runs: if the job's differ, a fresh interpreter is started.
_EARLY: Final = (
    *("LANG", "LC_ALL", "LC_CTYPE", "LANGUAGE", "TZ", "LOCPATH", "HOME"),
    *("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"),
)
_EARLY_PREFIXES: Final = ("PYTHON", "LD_", "GLIBC_", "MALLOC_")
ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/opt/x07",
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
ENV: Final = ENVIRONMENT | {"PYTHONPATH": FOLDER}
OWN_MODULES: Final = f"{ENVIRONMENT['HOME']}/.local"  # the user site-packages

# All names in Debian's sitecustomize, which only tries to import a module that no image here has.
_DEBIANS: Final = frozenset({"apport_python_hook", "ImportError", "install"})


def hook(preload: list[str]) -> str:
    """Return the source of a `sitecustomize` module that imports the modules *preload*.

    That module cannot import x07's modules, so it contains the functions in _HOOK and the globals in _HOOK_GLOBALS.
    """
    codes = {function.__name__: marshal.dumps(function.__code__) for function in _HOOK}
    return f"""import marshal
names = {_HOOK_GLOBALS!r}
for name, code in {codes!r}.items():
    names[name] = type(lambda: 0)(marshal.loads(code), names)
names["_stop"]({preload!r})
names.clear()
"""


# The following functions run in the waiting interpreter.


def _stop(preload: list[str]) -> None:
    """Wait for the start message, then become the program."""
    import os
    import sys

    if preload:
        _import_all(preload)
    system_module = _import_system_sitecustomize()
    known, importers = set(sys.modules), set(sys.path_importer_cache)
    import ctypes
    import marshal

    signals = __import__("_signal")  # `signal` itself imports much more
    restrict_self, execute = exec_functions()
    if "_hashlib" in known:
        import _ssl  # noqa: F401 - for _reseed
    buffers = _script_name_buffers()
    old_env = dict(os.environ)
    os.write(STATUS_FD, b"R")
    chunks = []
    while chunk := os.read(START_FD, 65536):
        chunks.append(chunk)
    start = marshal.loads(b"".join(chunks))  # noqa: S302 - from our agent
    become, argv, env, cwd, filter_code, rules_fd, token = start
    os.close(START_FD)
    os.chdir(cwd)
    os.set_inheritable(RULES_FD, False)  # noqa: FBT003
    if filter_code or rules_fd >= 0:
        _restrict(restrict_self, filter_code, rules_fd)
    os.close(RULES_FD)
    if not become:
        for number in (signals.SIGPIPE, signals.SIGXFSZ):  # Python ignores them; the program would inherit that
            signals.signal(number, signals.SIG_DFL)
        _execute(execute, argv, env, token)
    _set_environment(old_env, env)
    _become(argv, buffers, known, importers)
    if preload:
        _reseed(known)
    ctypes.set_errno(0)
    os.close(STATUS_FD)
    if system_module is None:
        del sys.modules["sitecustomize"]
        __import__("sitecustomize")  # the system's own, if any
    else:
        sys.modules["sitecustomize"] = system_module


def _import_all(preload: list[str]) -> None:
    """Import the modules with their output discarded."""
    import os
    import sys

    outputs = os.dup(1), os.dup(2)
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    clock = __import__("time").monotonic  # built in
    for name in preload:
        begin = clock()
        try:
            __import__(name)
        except BaseException as exc:  # noqa: BLE001 - a module may raise anything
            os.write(STATUS_FD, f"0 cannot preload {name}: {exc!r}".encode("utf-8", "backslashreplace")[:1000])
            os._exit(127)
        os.write(STATUS_FD, f"M{name} {clock() - begin:.1f}\n".encode())
    for stream in sys.__stdout__, sys.__stderr__, sys.stdout, sys.stderr:
        try:  # noqa: SIM105 - contextlib would be one more module
            stream.flush()  # type: ignore[union-attr]
        except Exception:  # noqa: BLE001, S110 - a module may have closed or replaced it
            pass
    for number, fd in enumerate(outputs, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.close(null)


def _import_system_sitecustomize() -> Any:  # noqa: ANN401 - a module
    """Import the system's sitecustomize if it is Debian's, which does not depend on the job.

    Return the module, or None. Without a usercustomize, make Python skip that import, which takes a clone milliseconds.
    """
    import site
    import sys

    finder: Any = sys.modules["_frozen_importlib_external"].PathFinder
    path = [folder for folder in sys.path if folder != FOLDER]
    found = finder.find_spec("sitecustomize", path)
    system_module = None
    code = None if found is None else found.loader.get_code("sitecustomize")
    if code and {*code.co_names} <= _DEBIANS and not any(isinstance(const, type(code)) for const in code.co_consts):
        ours = sys.modules.pop("sitecustomize")
        sys.path.remove(FOLDER)
        system_module = __import__("sitecustomize")
        sys.path.insert(0, FOLDER)
        sys.modules["sitecustomize"] = ours
    if site.ENABLE_USER_SITE and finder.find_spec("usercustomize", path) is None:
        original = site.execusercustomize

        def skip_once() -> None:
            vars(site)["execusercustomize"] = original

        vars(site)["execusercustomize"] = skip_once
    return system_module


def _script_name_buffers() -> list[memoryview]:
    """Return the memory in which the interpreter keeps its script's name: run_filename, and argv (for sys.path)."""
    import ctypes
    import os

    placeholder = PLACEHOLDER.encode("utf-32-le") + bytes(4)
    config_of = ctypes.pythonapi._Py_GetConfig  # noqa: SLF001 - there is no other
    config_of.restype = ctypes.c_void_p
    memory = os.open("/proc/self/mem", os.O_RDWR)
    buffers = []
    for word in set(memoryview(ctypes.string_at(config_of(), 640)).cast("Q")):
        try:
            # argv is a list.
            for at in word, int.from_bytes(os.pread(memory, 8, word), "little"):
                if os.pread(memory, len(placeholder), at) == placeholder:
                    found = (ctypes.c_char * len(placeholder)).from_address(at)
                    buffers.append(memoryview(found).cast("B"))
        except (OSError, OverflowError):  # not an address
            pass
    os.close(memory)
    if not buffers:
        raise SystemExit("cannot find the script's name in memory")
    return buffers


def _restrict(restrict_self: Callable[..., None], filter_code: bytes, rules_fd: int) -> None:
    import os

    try:
        restrict_self(filter_code, rules_fd)
    except OSError as exc:
        os.write(STATUS_FD, b"0 " + str(exc).encode())
        os._exit(127)


def _execute(execute: Callable[..., NoReturn], argv: list[str], env: dict[str, str], token: bytes) -> NoReturn:
    import os

    os.set_inheritable(STATUS_FD, False)  # noqa: FBT003
    try:
        execute(argv, env, token)
    except (OSError, ValueError) as exc:  # only execve reports its errno
        os.write(STATUS_FD, b"%d %s" % (getattr(exc, "errno", 0) or 0, str(exc).encode("utf-8", "backslashreplace")))
        os._exit(127)


def _set_environment(old_env: dict[str, str], env: dict[str, str]) -> None:
    import os

    for name in old_env:
        if name not in env:
            del os.environ[name]
    for name, value in env.items():
        if old_env.get(name) != value:
            os.environ[name] = value


def _become(argv: list[str], buffers: list[memoryview], known: set[str], importers: set[str]) -> None:
    """Set the script's name. Remove what this hook added: modules not in *known*, path importers not in *importers*."""
    import sys

    name = argv[1].encode("utf-32-le", "surrogatepass") + bytes(4)
    for buffer in buffers:
        buffer[: len(name)] = name
    sys.argv[:] = argv[1:]
    sys.orig_argv[:] = argv
    if FOLDER in sys.path:  # a preloaded module may have changed it
        sys.path.remove(FOLDER)
    for module in set(sys.modules) - known:
        del sys.modules[module]
    for path in set(sys.path_importer_cache) - importers | {FOLDER}:
        sys.path_importer_cache.pop(path, None)


def _reseed(known: set[str]) -> None:
    """Replace the random state of preloaded modules. Otherwise all clones of a VM would have the same state."""
    import os
    import sys

    for name in ("random", "numpy.random"):
        if name in sys.modules:
            sys.modules[name].seed()
    if "tempfile" in sys.modules:
        vars(sys.modules["tempfile"])["_name_sequence"] = None
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    if "_hashlib" in known:
        import _ssl

        _ssl.RAND_add(os.urandom(32), 32.0)  # OpenSSL uses it at the next request


_HOOK: Final = (
    *(_stop, _import_all, _import_system_sitecustomize, _script_name_buffers, _restrict, _execute, _set_environment),
    *(_become, _reseed, exec_functions),
)
_HOOK_GLOBALS: Final = {
    name: globals()[name] for name in ("START_FD", "STATUS_FD", "RULES_FD", "FOLDER", "PLACEHOLDER", "_DEBIANS")
}

# The following function runs in the agent.


def can_become(argv: list[str], env: dict[str, str], *, preload: bool, alone: bool, own_modules: bool) -> bool:
    """Return whether the waiting interpreter is equivalent to a fresh start of this command.

    preload: whether modules were imported, which may have read variables and started threads. alone: whether the
    policy allows no threads. own_modules: whether the program has user site-packages.
    """
    return (
        len(argv) > 1
        and argv[0] == PYTHON
        and argv[1].startswith(SCRIPTS)
        and len(argv[1]) <= len(PLACEHOLDER)
        and not any(name.startswith(_EARLY_PREFIXES) and name not in _EARLY for name in env)
        and not own_modules
        and not (preload and alone)
        and (not preload or all(name in ENVIRONMENT or name.startswith("X07_") for name in env))
        and all(env.get(name) == ENVIRONMENT.get(name) for name in _EARLY)
    )
