"""The code of the waiting interpreter (`guest/interpreter`), which has none of x07's modules.

The modules that it imports for itself are removed again before the program starts. Those of a bare interpreter and the
preloaded ones stay.
"""

import marshal
import os
import sys

# Neither `typing` nor `__future__` is imported: the program would find them.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

FOLDER = "/run/start"  # of the module that stops the interpreter; in the program's view until it starts
SCRIPTS = "/x07/in/"
START_FD = 3
STATUS_FD = 4
RULES_FD = 63  # below 64, so that the kernel need not grow the descriptor table
FORK_FD = 62  # a socket, if modules were preloaded: init asks for copies of this process (`_fork_until_started`)
CODE_MAX = 60_000  # bytes of code after -c
_NAME_MAX = 255
PLACEHOLDER = f"{SCRIPTS}program/{'x' * _NAME_MAX}"
# All names in Debian's sitecustomize, which only tries to import a module that no image here has.
_DEBIANS = frozenset({"apport_python_hook", "ImportError", "install"})


def stop(preload: list[str], kernel_code: bytes) -> None:
    """Wait for the start message, then become the program. kernel_code: the marshalled code of the module `kernel`."""
    if preload:
        _import_all(preload)
    system_module = _import_system_sitecustomize()
    known, importers = set(sys.modules), set(sys.path_importer_cache)
    import ctypes

    signals = __import__("_signal")  # `signal` itself imports much more
    kernel: dict[str, Any] = {}
    exec(marshal.loads(kernel_code), kernel)  # noqa: S102, S302 - from our agent
    kernel["landlock_version"]()  # so that the code of a call has run once before a clone needs it
    if "_hashlib" in known:
        import _ssl  # noqa: F401 - for _reseed
    buffers = _script_name_buffers()
    old_env = dict(os.environ)
    os.write(STATUS_FD, b"R")
    if preload:
        _fork_until_started()
    chunks = []
    while chunk := os.read(START_FD, 65536):
        chunks.append(chunk)
    start = marshal.loads(b"".join(chunks))  # noqa: S302 - from our agent
    become, argv, env, cwd, filter_code, rules_fd, token = start
    os.close(START_FD)
    try:
        os.chdir(cwd)
    except (OSError, ValueError) as exc:
        os.write(STATUS_FD, b"0 " + str(exc).encode("utf-8", "backslashreplace")[:1000])
        os._exit(127)
    os.set_inheritable(RULES_FD, False)  # noqa: FBT003
    _restrict(kernel, filter_code, rules_fd)
    if not become:
        for number in (signals.SIGPIPE, signals.SIGXFSZ):  # Python ignores them; the program would inherit that
            signals.signal(number, signals.SIG_DFL)
        _execute(kernel, argv, env, token)
    kernel.clear()
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


def _fork_until_started() -> None:
    """Make a copy of this process at each request of init. Return in each copy, and here once the start message comes.

    A request comes with five descriptors: the standard streams, and those with the numbers START_FD and STATUS_FD. The
    answer is the id of the copy, which is a child of init: its parent ends at once.
    """
    poll, sockets = __import__("select").poll(), __import__("_socket")
    requests = sockets.socket(fileno=FORK_FD)
    room = sockets.CMSG_SPACE(5 * 4)
    for fd in (START_FD, FORK_FD):
        poll.register(fd, 1)  # POLLIN
    while not any(fd == START_FD for fd, _ in poll.poll()):
        request, rights, _, _ = requests.recvmsg(1, room)
        if not request:
            break
        given = memoryview(rights[0][2]).cast("i")
        read, write = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            os.setsid()
            for fd, number in zip(given, (0, 1, 2, START_FD, STATUS_FD), strict=True):
                os.dup2(fd, number)
            identity = b"%d\n" % os.getpid()
            os.write(write, identity)
            os.write(STATUS_FD, identity)
        os.close(write)
        if between:
            os.waitpid(between, 0)
            requests.send(os.read(read, 32))
        for fd in (read, *given):
            os.close(fd)
        if not between:
            break
    requests.close()


def _import_all(preload: list[str]) -> None:
    """Import the modules with their output discarded."""
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
    # Searches for garbage, as at the end of each program, would write to (and so copy) every page of these objects.
    before = "gc" in sys.modules
    gc = __import__("gc")
    gc.collect()
    gc.freeze()
    if not before:
        del sys.modules["gc"]


def _import_system_sitecustomize() -> "ModuleType | None":
    """Import the system's sitecustomize if it is Debian's, which does not depend on the job.

    Return the module, or None. Without a usercustomize, make Python skip that import, which takes a clone milliseconds.
    """
    import site

    finder = sys.modules["_frozen_importlib_external"].PathFinder
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
    """Return the memory in which the interpreter keeps its script's name: run_filename, then argv (for sys.path)."""
    import ctypes

    placeholder = PLACEHOLDER.encode("utf-32-le") + bytes(4)
    config_of = ctypes.pythonapi._Py_GetConfig  # noqa: SLF001 - there is no other
    config_of.restype = ctypes.c_void_p
    memory = os.open("/proc/self/mem", os.O_RDWR)
    places: tuple[set[int], set[int]] = set(), set()
    for word in set(memoryview(ctypes.string_at(config_of(), 640)).cast("Q")):
        try:
            # argv is a list.
            for found, at in zip(places, (word, int.from_bytes(os.pread(memory, 8, word), "little")), strict=True):
                if os.pread(memory, len(placeholder), at) == placeholder:
                    found.add(at)
        except (OSError, OverflowError):  # not an address
            pass
    os.close(memory)
    if [*map(len, places)] != [1, 1]:
        raise SystemExit("cannot find the script's name in memory")
    return [memoryview((ctypes.c_char * len(placeholder)).from_address(*found)).cast("B") for found in places]


def _restrict(kernel: "dict[str, Any]", filter_code: bytes, rules_fd: int) -> None:
    try:
        if rules_fd >= 0:
            kernel["landlock_restrict"](rules_fd)
        if filter_code:
            kernel["load_filter"](filter_code, audited=True)
    except OSError as exc:
        os.write(STATUS_FD, b"0 " + str(exc).encode())
        os._exit(127)
    os.close(RULES_FD)


def _execute(kernel: "dict[str, Any]", argv: list[str], env: dict[str, str], token: bytes) -> None:
    os.set_inheritable(STATUS_FD, False)  # noqa: FBT003
    try:
        kernel["execute"](argv, env, token)
    except (OSError, ValueError) as exc:  # only execve reports its errno
        os.write(STATUS_FD, b"%d %s" % (getattr(exc, "errno", 0) or 0, str(exc).encode("utf-8", "backslashreplace")))
        os._exit(127)


def _set_environment(old_env: dict[str, str], env: dict[str, str]) -> None:
    for name in old_env:
        if name not in env:
            del os.environ[name]
    for name, value in env.items():
        if old_env.get(name) != value:
            os.environ[name] = value


def _become(argv: list[str], buffers: list[memoryview], known: set[str], importers: set[str]) -> None:
    """Set the script's name. Remove what this hook added: modules not in *known*, path importers not in *importers*."""
    file, words = argv[1], argv[1:]
    if file in {"-c", "-m"}:
        code = argv[2] if file == "-c" else f"import runpy\nrunpy._run_module_as_main({argv[2]!r})\n"
        read, write = os.pipe()  # which holds CODE_MAX bytes
        os.write(write, code.encode("utf-8", "surrogateescape"))
        os.close(write)
        file, words = f"/proc/self/fd/{read}", [file, *argv[3:]]
    for buffer, text in zip(buffers, (file, words[0]), strict=True):
        name = text.encode("utf-32-le", "surrogatepass") + bytes(4)
        buffer[: len(name)] = name
    sys.argv[:] = words
    sys.orig_argv[:] = argv
    if FOLDER in sys.path:  # a preloaded module may have changed it
        sys.path.remove(FOLDER)
    for module in set(sys.modules) - known:
        del sys.modules[module]
    for path in set(sys.path_importer_cache) - importers | {FOLDER}:
        sys.path_importer_cache.pop(path, None)


def _reseed(known: set[str]) -> None:
    """Replace the random state of preloaded modules. Otherwise all clones of a VM would have the same state."""
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
