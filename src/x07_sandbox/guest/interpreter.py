"""A Python interpreter that is started before there is a job, and becomes the program when there is one.

It is started with the name of a script that does not exist, and stops in its own start-up, where Python imports
`sitecustomize`: that module is `hook`, which imports what is to be preloaded, and waits for the settings. Then it removes
everything of itself, puts the right script's name where the interpreter will look for it, and lets the start-up go on:
the interpreter reads, compiles and runs the script with nothing of ours on its stack. Or it executes another program.

What cannot be the same as in a fresh start: docs/explanation/design.md, "VM templates".
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
RULES_FD: Final = 63  # below 64 the kernel's table of descriptors need not grow
_NAME_MAX: Final = 255
PLACEHOLDER: Final = f"{SCRIPTS}program/{'x' * _NAME_MAX}"
ARGV: Final = [PYTHON, PLACEHOLDER]
# What the interpreter looks at before it comes to our hook: where the job's differs, it is started afresh.
_EARLY: Final = (
    *("LANG", "LC_ALL", "LC_CTYPE", "LANGUAGE", "TZ", "LOCPATH", "HOME"),
    *("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"),
)
# And the C library, before Python.
_EARLIER: Final = ("PYTHON", "LD_", "GLIBC_", "MALLOC_")
ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/opt/x07",
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
ENV: Final = ENVIRONMENT | {"PYTHONPATH": FOLDER}
# What it looks for there: a user's own modules.
OWN_MODULES: Final = f"{ENVIRONMENT['HOME']}/.local"

# All names in Debian's sitecustomize, which looks for one module, that no image here has, and calls a function of it.
_DEBIANS: Final = frozenset({"apport_python_hook", "ImportError", "install"})


def hook(preload: list[str]) -> str:
    """The source of the module that the interpreter stops in. preload: modules that the program will find imported.

    It has none of our modules, but the code of the functions below, which import what they need and share the names in
    _HOOK and _HOOK_HAS; these are removed at the end.
    """
    codes = {function.__name__: marshal.dumps(function.__code__) for function in _HOOK}
    return f"""import marshal
names = {_HOOK_HAS!r}
for name, code in {codes!r}.items():
    names[name] = type(lambda: 0)(marshal.loads(code), names)
names["_stop"]({preload!r})
names.clear()
"""


# What follows runs in the interpreter that waits.


def _stop(preload: list[str]) -> None:
    """Wait for the settings, and carry them out."""
    import os
    import sys

    if preload:
        _import_all(preload)
    theirs = _import_theirs()
    known, importers = set(sys.modules), set(sys.path_importer_cache)
    import ctypes
    import marshal

    signals = __import__("_signal")  # which `signal` wraps, and imports much for
    restrict_self, execute = exec_functions()
    if "_hashlib" in known:
        import _ssl  # noqa: F401 - _new_secrets has it then
    places = _places_of_the_script()
    had = dict(os.environ)
    os.write(STATUS_FD, b"R")
    settings = []
    while piece := os.read(START_FD, 65536):
        settings.append(piece)
    become, argv, env, cwd, filter_code, rules_fd, token = marshal.loads(b"".join(settings))  # noqa: S302 - the agent's
    os.close(START_FD)
    os.chdir(cwd)
    os.set_inheritable(RULES_FD, False)  # noqa: FBT003 - it takes no names
    if filter_code or rules_fd >= 0:
        _restrict(restrict_self, filter_code, rules_fd)
    os.close(RULES_FD)
    if not become:
        for number in (signals.SIGPIPE, signals.SIGXFSZ):  # Python ignores them, and what it executes would too
            signals.signal(number, signals.SIG_DFL)
        _execute(execute, argv, env, token)
    _set_environment(had, env)
    _become(argv, places, known, importers)
    if preload:
        _new_secrets(known)
    ctypes.set_errno(0)  # of what was refused to us
    os.close(STATUS_FD)
    if theirs is None:
        del sys.modules["sitecustomize"]
        __import__("sitecustomize")  # the system's own, where it has one
    else:
        sys.modules["sitecustomize"] = theirs


def _import_all(preload: list[str]) -> None:
    """Import what is to be preloaded; what that prints is not the program's."""
    import os
    import sys

    outputs = os.dup(1), os.dup(2)
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    clock = __import__("time").monotonic  # built in
    for name in preload:
        began = clock()
        try:
            __import__(name)
        except BaseException as exc:  # noqa: BLE001 - whatever a module does
            os.write(STATUS_FD, f"0 cannot preload {name}: {exc!r}".encode("utf-8", "backslashreplace")[:1000])
            os._exit(127)
        os.write(STATUS_FD, f"M{name} {clock() - began:.1f}\n".encode())
    for stream in sys.__stdout__, sys.__stderr__, sys.stdout, sys.stderr:
        try:  # noqa: SIM105 - contextlib would be one more module
            stream.flush()  # type: ignore[union-attr]
        except Exception:  # noqa: BLE001, S110 - closed, or gone: as the module wanted it
            pass
    for number, fd in enumerate(outputs, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.close(null)


def _import_theirs() -> Any:  # noqa: ANN401 - a module
    """Import the system's own sitecustomize if it is Debian's, which looks at nothing of the job; it, or None.

    And have none of the user's looked for where there is none: a failing import costs a fresh clone milliseconds.
    """
    import site
    import sys

    finder: Any = sys.modules["_frozen_importlib_external"].PathFinder
    path = [folder for folder in sys.path if folder != FOLDER]
    found = finder.find_spec("sitecustomize", path)
    theirs = None
    code = None if found is None else found.loader.get_code("sitecustomize")
    if code and {*code.co_names} <= _DEBIANS and not any(isinstance(const, type(code)) for const in code.co_consts):
        ours = sys.modules.pop("sitecustomize")
        sys.path.remove(FOLDER)
        theirs = __import__("sitecustomize")
        sys.path.insert(0, FOLDER)
        sys.modules["sitecustomize"] = ours
    if site.ENABLE_USER_SITE and finder.find_spec("usercustomize", path) is None:
        look_for_a_users = site.execusercustomize

        def skip_once() -> None:
            vars(site)["execusercustomize"] = look_for_a_users

        vars(site)["execusercustomize"] = skip_once
    return theirs


def _places_of_the_script() -> list[memoryview]:
    """Where the interpreter has its script's name: run_filename, and argv, whose first decides how sys.path begins."""
    import ctypes
    import os

    placeholder = PLACEHOLDER.encode("utf-32-le") + bytes(4)
    config_of = ctypes.pythonapi._Py_GetConfig  # noqa: SLF001 - there is no other
    config_of.restype = ctypes.c_void_p
    memory = os.open("/proc/self/mem", os.O_RDWR)
    places = []
    for word in set(memoryview(ctypes.string_at(config_of(), 640)).cast("Q")):
        try:
            # argv is a list.
            for at in word, int.from_bytes(os.pread(memory, 8, word), "little"):
                if os.pread(memory, len(placeholder), at) == placeholder:
                    found = (ctypes.c_char * len(placeholder)).from_address(at)
                    places.append(memoryview(found).cast("B"))
        except (OSError, OverflowError):  # no address
            pass
    os.close(memory)
    if not places:
        raise SystemExit("no place for the script's name")
    return places


def _restrict(restrict_self: Callable[..., None], filter_code: bytes, rules_fd: int) -> None:
    """Put this process under a filter, and under Landlock's rules, as exec_functions has it."""
    import os

    try:
        restrict_self(filter_code, rules_fd)
    except OSError as exc:
        os.write(STATUS_FD, b"0 " + str(exc).encode())
        os._exit(127)


def _execute(execute: Callable[..., NoReturn], argv: list[str], env: dict[str, str], token: bytes) -> NoReturn:
    """Execute another program."""
    import os

    os.set_inheritable(STATUS_FD, False)  # noqa: FBT003 - it takes no names
    try:
        execute(argv, env, token)
    except (OSError, ValueError) as exc:  # a number only here: it is the program that could not be executed
        os.write(STATUS_FD, b"%d %s" % (getattr(exc, "errno", 0) or 0, str(exc).encode("utf-8", "backslashreplace")))
        os._exit(127)


def _set_environment(had: dict[str, str], env: dict[str, str]) -> None:
    import os

    for name in had:
        if name not in env:
            del os.environ[name]
    for name, value in env.items():
        if had.get(name) != value:
            os.environ[name] = value


def _become(argv: list[str], places: list[memoryview], known: set[str], importers: set[str]) -> None:
    """Take away what is ours, and let it be that script's. known, importers: what was there before us."""
    import sys

    name = argv[1].encode("utf-32-le", "surrogatepass") + bytes(4)
    for place in places:
        place[: len(name)] = name
    sys.argv[:] = argv[1:]
    sys.orig_argv[:] = argv
    if FOLDER in sys.path:  # a preloaded module may have changed it
        sys.path.remove(FOLDER)
    for module in set(sys.modules) - known:
        del sys.modules[module]
    for path in set(sys.path_importer_cache) - importers | {FOLDER}:
        sys.path_importer_cache.pop(path, None)


def _new_secrets(known: set[str]) -> None:
    """What preloaded modules have drawn is every clone's."""
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

        _ssl.RAND_add(os.urandom(32), 32.0)  # OpenSSL's generators take it up when they are asked next


_HOOK: Final = (
    *(_stop, _import_all, _import_theirs, _places_of_the_script, _restrict, _execute, _set_environment, _become),
    *(_new_secrets, exec_functions),
)
_HOOK_HAS: Final = {
    name: globals()[name] for name in ("START_FD", "STATUS_FD", "RULES_FD", "FOLDER", "PLACEHOLDER", "_DEBIANS")
}

# What follows runs in the agent.


def can_become(argv: list[str], env: dict[str, str], *, preload: bool, alone: bool, own_modules: bool) -> bool:
    """Whether it would be as good as a fresh start of that command.

    preload: it has imported modules, which may have looked at any variable, and started threads. alone: whether there
    must be no thread yet. own_modules: whether something lies in OWN_MODULES by now.
    """
    return (
        len(argv) > 1
        and argv[0] == PYTHON
        and argv[1].startswith(SCRIPTS)
        and len(argv[1]) <= len(PLACEHOLDER)
        and not any(name.startswith(_EARLIER) and name not in _EARLY for name in env)
        and not own_modules
        and not (preload and alone)
        and (not preload or all(name in ENVIRONMENT or name.startswith("X07_") for name in env))
        and all(env.get(name) == ENVIRONMENT.get(name) for name in _EARLY)
    )
