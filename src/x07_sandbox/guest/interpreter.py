"""A Python interpreter that is started before there is a job, and becomes the program when there is one.

It is started as any is, with a script's name that does not exist, and stops in its own start-up, where Python imports
`sitecustomize`: that module is `hook`, which waits for the orders. Then it takes away everything of itself, puts the
right script's name where the interpreter will look for it, and lets the start-up go on: the interpreter reads, compiles
and runs the script by itself, with nothing of ours on its stack. Or it executes another program, if that is the order.

With modules to preload it imports them before it waits: a program's own import of them takes no time.

What cannot be made the same as in a fresh start: the seed of string hashes, the layout of memory and what the kernel
gave the process at its start (AT_RANDOM: stack canary, pointer guard), which are those of the saved machine,
/proc/self/cmdline and /proc/self/environ, and the CPU time that the start took, by which RLIMIT_CPU is larger.
"""

from __future__ import annotations

import marshal
from typing import Final

from x07_sandbox.guest import restrict

PYTHON: Final = "/usr/bin/python3"
FOLDER: Final = "/run/start"  # in the program's view until it starts
SCRIPTS: Final = "/x07/in/"
START_FD: Final = 3
TOLD_FD: Final = 4
RULES_FD: Final = 63  # below 64 the kernel's table of descriptors need not grow
_NAME_MAX: Final = 255
PLACEHOLDER: Final = f"{SCRIPTS}program/{'x' * _NAME_MAX}"
# What the interpreter looks at before it comes to our hook: where the job's differs, it is started afresh.
_EARLY: Final = ("LANG", "LC_ALL", "LC_CTYPE", "LANGUAGE", "TZ", "LOCPATH", "HOME")
# And the C library, before Python.
_EARLIER: Final = ("PYTHON", "LD_", "GLIBC_", "MALLOC_")
ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/opt/x07", "LANG": "C.UTF-8"}
# What it looks for there: a user's own modules.
OWN_MODULES: Final = f"{ENVIRONMENT['HOME']}/.local"

# All names in Debian's sitecustomize, which looks for one module, that no image here has, and calls a function of it.
_DEBIANS: Final = {"apport_python_hook", "ImportError", "install"}

_HOOK: Final = f"""
import os, sys
if PRELOAD:  # what they print is not the program's
    outputs = os.dup(1), os.dup(2)
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for name in PRELOAD:
        try:
            __import__(name)
        except BaseException as exc:
            os.write({TOLD_FD}, f"0 cannot preload {{name}}: {{exc!r}}".encode("utf-8", "backslashreplace")[:1000])
            os._exit(127)
    for stream in sys.__stdout__, sys.__stderr__, sys.stdout, sys.stderr:
        try:
            stream.flush()
        except Exception:
            pass  # closed, or gone: as the module wanted it
    for number, fd in enumerate(outputs, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.close(null)
# In a fresh clone an import that finds nothing takes milliseconds. So the system's own sitecustomize is imported here,
# if it is the one that Debian has, which looks at nothing of the job; and no user's is looked for where none can be.
finder = sys.modules["_frozen_importlib_external"].PathFinder
path = [folder for folder in sys.path if folder != {FOLDER!r}]
found = finder.find_spec("sitecustomize", path)
theirs = None
code = None if found is None else found.loader.get_code("sitecustomize")
if code and {{*code.co_names}} <= {_DEBIANS!r} and not any(isinstance(const, type(code)) for const in code.co_consts):
    ours = sys.modules.pop("sitecustomize")
    sys.path.remove({FOLDER!r})
    import sitecustomize as theirs
    sys.path.insert(0, {FOLDER!r})
    sys.modules["sitecustomize"] = ours
site = sys.modules["site"]
if site.ENABLE_USER_SITE and finder.find_spec("usercustomize", path) is None:
    look_for_a_users = site.execusercustomize

    def skip_once():
        site.execusercustomize = look_for_a_users

    site.execusercustomize = skip_once
known, importers = set(sys.modules), set(sys.path_importer_cache)
import _signal, ctypes, marshal
take_away, execute = type(lambda: 0)(marshal.loads(LAST_STEPS), {{}})()
if "_hashlib" in known:
    import _ssl

placeholder = {PLACEHOLDER!r}.encode("utf-32-le") + bytes(4)
ctypes.pythonapi._Py_GetConfig.restype = ctypes.c_void_p
config = memoryview(ctypes.string_at(ctypes.pythonapi._Py_GetConfig(), 640)).cast("Q")
memory = os.open("/proc/self/mem", os.O_RDWR)
places = []
for word in set(config):
    try:
        if 65536 < word < 1 << 47:
            # run_filename, and argv, which is a list: its first decides what sys.path begins with.
            for at in word, int.from_bytes(os.pread(memory, 8, word), "little"):
                if 65536 < at < 1 << 47 and os.pread(memory, len(placeholder), at) == placeholder:
                    places.append(memoryview((ctypes.c_char * len(placeholder)).from_address(at)).cast("B"))
    except (OSError, OverflowError):
        pass
os.close(memory)
if not places:
    raise SystemExit("no place for the script's name")
had = dict(os.environ)
os.write({TOLD_FD}, b"R")
orders = []
while piece := os.read({START_FD}, 65536):
    orders.append(piece)
become, argv, env, cwd, filter_code, rules_fd, token = marshal.loads(b"".join(orders))
os.close({START_FD})
os.chdir(cwd)
os.set_inheritable({RULES_FD}, False)
try:
    if filter_code or rules_fd >= 0:
        take_away(filter_code, rules_fd)
except OSError as exc:
    os.write({TOLD_FD}, b"0 " + str(exc).encode())
    os._exit(127)
os.close({RULES_FD})
if not become:
    os.set_inheritable({TOLD_FD}, False)
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores them, and what it executes would too
        _signal.signal(number, _signal.SIG_DFL)
    try:
        execute(argv, env, token)
    except (OSError, ValueError) as exc:  # a number only here: it is the program that could not be executed
        os.write({TOLD_FD}, b"%d %s" % (getattr(exc, "errno", 0) or 0, str(exc).encode("utf-8", "backslashreplace")))
        os._exit(127)
for name in had:
    if name not in env:
        del os.environ[name]
for name, value in env.items():
    if had.get(name) != value:
        os.environ[name] = value
name = argv[1].encode("utf-32-le", "surrogatepass") + bytes(4)
for place in places:
    place[: len(name)] = name
sys.argv[:] = argv[1:]
sys.orig_argv[:] = argv
if {FOLDER!r} in sys.path:  # a preloaded module may have changed it
    sys.path.remove({FOLDER!r})
for module in set(sys.modules) - known:
    del sys.modules[module]
for path in set(sys.path_importer_cache) - importers | {{{FOLDER!r}}}:
    sys.path_importer_cache.pop(path, None)
if PRELOAD:  # what they have drawn is every clone's
    for name in ("random", "numpy.random"):
        if name in sys.modules:
            sys.modules[name].seed()
    if "tempfile" in sys.modules:
        sys.modules["tempfile"]._name_sequence = None
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    if "_hashlib" in known:
        _ssl.RAND_add(os.urandom(32), 32.0)  # OpenSSL's generators take it up when they are asked next
ctypes.set_errno(0)  # of what was refused to us
os.close({TOLD_FD})
if theirs is None:
    del sys.modules["sitecustomize"]
    import sitecustomize  # the system's own, where it has one
else:
    sys.modules["sitecustomize"] = theirs
"""


def hook(preload: list[str]) -> str:
    """The module that the interpreter stops in. preload: modules that the program will find imported."""
    steps = marshal.dumps(restrict.last_steps.__code__)
    return f"PRELOAD = {preload!r}\nLAST_STEPS = {steps!r}\n{_HOOK}"


def argv() -> list[str]:
    """How it is started."""
    return [PYTHON, PLACEHOLDER]


def env() -> dict[str, str]:
    """With which environment."""
    return ENVIRONMENT | {"PYTHONPATH": FOLDER}


def can_become(argv: list[str], env: dict[str, str], *, preload: bool, alone: bool, own_modules: bool) -> bool:
    """Whether it would be the same as a fresh start of that command, but for what stands above.

    preload: it has imported modules, any of which may have looked at any variable, and may have started threads.
    alone: whether there must be no thread yet. own_modules: whether something lies in OWN_MODULES by now.
    """
    return (
        len(argv) > 1
        and argv[0] == PYTHON
        and argv[1].startswith(SCRIPTS)
        and len(argv[1]) <= len(PLACEHOLDER)
        and not any(name.startswith(_EARLIER) for name in env)
        and not own_modules
        and not (preload and alone)
        and (not preload or all(name in ENVIRONMENT or name.startswith("X07_") for name in env))
        and all(env.get(name) == ENVIRONMENT.get(name) for name in _EARLY)
    )
