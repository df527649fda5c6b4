"""A clone runs a Python program in a pre-started interpreter, and the program sees no difference."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import sample
from tests.vm.conftest import usual_start
from x07_sandbox import run_program

if TYPE_CHECKING:
    from tests.vm.conftest import Ran, Sandbox

pytestmark = pytest.mark.vm

LOOK = '''
"""A doc string."""
import sys
modules = sorted(sys.modules)
names = sorted(globals())
frame = sys._getframe()
depth = 0
while frame is not None:
    depth, frame = depth + 1, frame.f_back
def both(): pass
import builtins, gc, json, os, resource, signal, site, threading, traceback, warnings
main = sys.modules["__main__"]
try:
    1 / 0
except ZeroDivisionError:
    trace = traceback.format_exc()
print(json.dumps({
    "modules": modules,
    "names": names,
    "depth": depth,
    "stack": traceback.format_stack(),
    "trace": trace,
    "argv": sys.argv,
    "orig_argv": sys.orig_argv,
    "path": sys.path,
    "importers": sorted(sys.path_importer_cache),
    "meta_path": [str(type(finder)) + getattr(finder, "__name__", "") for finder in sys.meta_path],
    "flags": repr(sys.flags),
    "executable": sys.executable,
    "prefix": [sys.prefix, sys.exec_prefix, sys.base_prefix],
    "streams": [[type(s).__name__, s.name, s.mode, s.encoding, s.errors, s.line_buffering] for s in
        (sys.stdin, sys.stdout, sys.stderr)],
    "hooks": [sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__, hasattr(sys, "ps1")],
    "limits": [sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits(), gc.get_threshold()],
    "xoptions": sys._xoptions,
    "warnings": [str(f) for f in warnings.filters],
    "environ": list(os.environ.items()),
    "cwd": os.getcwd(),
    "umask": os.umask(0o22),
    "fds": sorted(os.listdir("/proc/self/fd"))[:-1],
    "signals": {n: str(signal.getsignal(n)) for n in range(1, 65) if n not in (32, 33)},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "main": {
        "name": main.__name__, "file": main.__file__, "doc": main.__doc__, "spec": main.__spec__,
        "cached": getattr(main, "__cached__", "none"), "package": main.__package__,
        "loader": type(main.__loader__).__name__, "loader_path": main.__loader__.path,
        "builtins": main.__builtins__ is builtins,
    },
    "left": sorted(o.__name__ for o in gc.get_objects() if type(o) is type(both) and "/x07/" in o.__code__.co_filename),
    "threads": [t.name for t in threading.enumerate()],
    "site": [site.ENABLE_USER_SITE, site.USER_SITE, site.PREFIXES],
    "customizing": [[f.__name__, f.__module__] for f in (site.execsitecustomize, site.execusercustomize)],
    "customized": sorted((n, str(v).split(" at 0x")[0]) for n, v in vars(sys.modules["sitecustomize"]).items()),
    "rlimits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:7] == "RLIMIT_"},
    "ids": [os.getuid(), os.geteuid(), os.getgid(), os.getgroups(), os.getpid(), os.getppid(), os.getpgid(0)],
    "run": sorted(os.listdir("/run")),
    "program": sorted(os.listdir(os.path.dirname(__file__))),
    "imported_again": [__import__(name).__name__ for name in ("ctypes", "struct", "marshal", "sitecustomize")],
    "ctypes": __import__("ctypes").sizeof(__import__("ctypes").c_long),
    "errno": __import__("ctypes").get_errno(),
}))
sys.exit(3)
'''


WITH_CHILDREN = """
import concurrent.futures, operator
if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        print(pool.submit(operator.add, 1, 2).result())
"""


def clone_and_cold(sandbox: Sandbox, name: str, text: str, *args: str) -> tuple[Ran, Ran]:
    """Run a program in a clone, and in a cold machine with a fresh interpreter."""
    cloned, cold = [sandbox.run_text(name, text, *args, cold=cold, stdin=b"in", cache=True) for cold in (False, True)]
    for one in (cloned, cold):
        assert "run" in one.result.phases, one.reason
    assert cloned.result.phases["run"].start == usual_start()
    assert cold.result.phases["run"].start == "cold"
    return cloned, cold


def test_a_program_sees_what_it_would_in_a_fresh_interpreter(sandbox: Sandbox) -> None:
    """A program in a clone sees what it would in a cold machine's fresh interpreter, and the results are the same."""
    ran = clone_and_cold(sandbox, "look around.py", f"{LOOK}# {os.urandom(8).hex()}\n", "one", "tw\u00f6", "", "-x")
    seen: list[dict[str, Any]] = [json.loads(one.stdout) for one in ran]
    assert seen[0].keys() == seen[1].keys()
    for key in seen[0]:
        assert seen[0][key] == seen[1][key], key
    assert seen[0]["argv"] == ["/x07/in/program/look around.py", "one", "tw\u00f6", "", "-x"]
    assert seen[0]["depth"] == 1
    assert seen[0]["fds"] == ["0", "1", "2"]
    cloned, cold = (one.result for one in ran)
    # tests/vm/test_image_packages.py has a cold build.
    assert [one.phases.keys() - {"run"} for one in (cloned, cold)] == [{"build"}, set()]
    assert cloned.phases["build"].start == usual_start()
    for one in (cloned, cold):
        assert (one.outcome, one.exit_code) == ("failed", 3)
    assert cloned.digests == cold.digests
    assert cloned.controls == cold.controls


FRESH = {"PYTHONVERBOSE": ""}  # has no effect, but Python reads it at start-up


@pytest.mark.parametrize(
    "text",
    sample(
        [
            "def f():\n    raise ValueError('a\\u00e9')\nf()\n",
            "import sys\nsys.exit(7)\n",
            "import sys\nsys.exit('words')\n",
            "print(1)\nraise SystemExit\n",
            "raise KeyboardInterrupt\n",
            "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n",
            "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhile True: pass\n",
            "import atexit\natexit.register(print, 'at exit')\nprint(input())\n",
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n",
            "import os\nos._exit(3)\n",
            "import warnings\nwarnings.warn('look', stacklevel=1)\nwarnings.warn('look', stacklevel=9)\n",
            "import sys\nsys.stdout.write('no newline')\nsys.stderr.write('err')\n",
            "f = lambda: f()\nf()\n",
            WITH_CHILDREN,
        ],
        3,
    ),
)
def test_a_program_ends_as_in_a_fresh_interpreter(sandbox: Sandbox, text: str) -> None:
    """A program in a clone has the output, traceback, exit code and signal of a fresh interpreter."""
    # Both run in a clone; the first test compares with a cold machine.
    ran = [sandbox.run_text("prog.py", text, cache=True, stdin=b"in", env=env) for env in ({}, FRESH)]
    for one in ran:
        assert one.outcome in {"ok", "failed", "signalled"}, one.reason
    found = [(one.outcome, one.result.exit_code, one.result.signal, one.stdout, one.stderr) for one in ran]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    sample(
        [
            ("HOME", "/tmp", "print(__import__('site').getuserbase())"),  # noqa: S108 - the guest's own
            ("LD_PRELOAD", "libanl.so.1", "print('libanl.so.1' in open('/proc/self/maps').read())"),
            ("PYTHONOPTIMIZE", "1", "print(__debug__)"),
            ("LC_ALL", "C", "print(__import__('locale').setlocale(0))"),
        ],
        2,
    ),
)
def test_a_startup_variable_takes_effect_in_a_clone(sandbox: Sandbox, name: str, value: str, shown: str) -> None:
    """Variables for the loader, the C library and Python's start-up take effect in a clone."""
    program = sandbox.work / "shown.py"
    program.write_text(shown + "\n")
    seen = []
    for env in ({}, {name: value}):
        result = run_program(program, env=env)
        assert result.outcome == "ok", result.reason
        assert result.phases["run"].start in {usual_start(), "pool"}
        seen.append(result.stdout.text)
    assert seen[0] != seen[1]


def test_a_users_own_modules_are_found(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in a clone finds modules in the user's .local, as a fresh interpreter does."""
    monkeypatch.chdir(sandbox.work)
    for minor in range(11, 20):
        own = sandbox.work / f".local/lib/python3.{minor}/site-packages/ours.py"
        own.parent.mkdir(parents=True)
        own.write_text("print('found')\n")
    policy = {"fs.read_roots": [".local"], "fs.deny_hidden": False}
    for env in ({}, FRESH):
        ran = sandbox.run_text("prog.py", "import ours\n", cache=True, policy=policy, env=env)
        assert (ran.outcome, ran.stdout) == ("ok", b"found\n"), ran.stderr
