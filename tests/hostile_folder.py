"""A folder whose files report when they are imported or executed, and every variable that could lead to them."""

from __future__ import annotations

import importlib.metadata
import os
import py_compile
import sys
from pathlib import Path
from typing import Final

import x07_sandbox

BIN: Final = Path(sys.executable).parent
# posix is built in, so this works before the first import of a starting interpreter.
_MODULE: Final = """import posix
fd = posix.open({mark!r}, posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND, 0o600)
posix.write(fd, f"module {{__name__}}\\n".encode())
"""
_FUNCTIONS: Final = ("[", "cd", "command", "echo", "printf", "readlink", "test")
_MORE_MODULES: Final = {"x07_sandbox", "x07_front_client", "sitecustomize", "usercustomize"}
_PERL_MODULES: Final = ("hostile", "strict", "warnings", "POSIX")


class HostileFolder:
    """The folder *path*: modules, programs, shell and Perl files that write to the file *mark*."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark = path.with_name(f"{path.name}-was-executed")
        path.mkdir()
        self._add_modules()
        self._add_programs()
        for name in _PERL_MODULES:
            code = f"open(my $mark, '>>', '{self._mark}'); print $mark \"perl {name}\\n\"; close $mark; 1;\n"
            (path / f"{name}.pm").write_text(code)
        (path / "env.sh").write_text(f"echo shell start >>'{self._mark}'\n")

    def _add_modules(self) -> None:
        """Add a module for every top-level name that could be imported, as source and in a cache of compiled files."""
        code = _MODULE.format(mark=str(self._mark))
        names = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
        for name in sorted(filter(str.isidentifier, names | _MORE_MODULES)):
            (self.path / f"{name}.py").write_text(code)
        # Where PYTHONHOME, PYTHONPLATLIBDIR and PYTHONUSERBASE would lead to.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for library in ("lib", "hostile"):
            (self.path / library).mkdir()
            (self.path / library / version).symlink_to("..")
        (self.path / "site-packages").symlink_to(".")
        package = Path(x07_sandbox.__file__)
        sources = (package, package.with_name("errors.py"), package.parent / "cli" / "main.py")
        for source in (*sources, BIN / "x07_front_client.py"):
            compiled = f"{self.path}/compiled{source.with_name(source.stem)}.{sys.implementation.cache_tag}.pyc"
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(self.path / "json.py"), cfile=compiled, invalidation_mode=mode)

    def _add_programs(self) -> None:
        """Add a program for every name in the system's folders."""
        first = self.path / "sh"
        first.write_text(f"#!/bin/bash\necho program \"$0\" >>'{self._mark}'\n")
        first.chmod(0o755)
        for folder in ("/usr/bin", "/usr/sbin", str(BIN)):
            for program in Path(folder).iterdir():
                if not os.path.lexists(self.path / program.name):
                    (self.path / program.name).hardlink_to(first)

    def variables(self) -> dict[str, str]:
        """Return this process's variables, with those that could lead into the folder."""
        here = str(self.path)
        hostile = {
            "BASH_ENV": f"{here}/env.sh",
            "ENV": f"{here}/env.sh",
            "PATH": f":.:{here}:{os.environ['PATH']}:",
            "PERL5LIB": f":{here}",
            "PERL5OPT": "-Mhostile",
            "PERLLIB": here,
            "PYTHONBREAKPOINT": "json.loads",
            "PYTHONHOME": here,
            "PYTHONINSPECT": "1",
            "PYTHONPATH": f":{here}:/nonexistent",
            "PYTHONPLATLIBDIR": "hostile",
            "PYTHONPYCACHEPREFIX": f"{here}/compiled",
            "PYTHONSTARTUP": f"{here}/json.py",
            "PYTHONUSERBASE": here,
            "PYTHONWARNINGS": "ignore::hostile.Warning,ignore::json.Warning",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        functions = {f"BASH_FUNC_{name}%%": f"() {{  echo function {name} >>'{self._mark}'\n}}" for name in _FUNCTIONS}
        return kept | hostile | functions

    def executed(self) -> str:
        """Return what of the folder was imported or executed since the last call."""
        try:
            return self._mark.read_text()
        except FileNotFoundError:
            return ""
        finally:
            self._mark.unlink(missing_ok=True)
