"""The modules that one `x07 run` imports: each costs time at every start, so each must be in these lists.

Also the number of garbage collections, which take time too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import pytest

from x07_sandbox.host import paths

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("state")]

OURS: Final = """
backends.base backends.jailed backends.prerequisites backends.qemu.backend backends.qemu.hot
backends.qemu.instance backends.qemu.machine backends.qemu.saved backends.qemu.start backends.qemu.template
backends.registry
channel.connection channel.contents channel.link channel.messages channel.streams
cli.console cli.main cli.parser cli.run
errors
host.arch host.documents host.linux host.locks host.paths host.processes host.settings
host.variables host.verdicts host.waiting
images.store images.verify
jail.bwrap jail.forms jail.resources jail.seccomp
options
policy.controls policy.decode policy.denials policy.features policy.guest policy.model policy.outcomes
programs.artifacts programs.toolchains
records.admission records.runs
sessions.execution sessions.job sessions.prepare sessions.request sessions.result sessions.run sessions.session
sessions.specs sessions.transfers
"""
# Beyond what a bare interpreter has. Absent because costly: dataclasses (with inspect, ast, dis), asyncio, logging,
# tempfile, shutil, random, http, ssl.
OTHERS: Final = """
argparse array collections contextlib copyreg datetime decimal encodings enum errno fcntl fnmatch functools genericpath
gettext glob grp hashlib heapq importlib itertools json keyword locale math msgspec ntpath numbers operator os pathlib
posixpath pwd queue re reprlib resource select selectors signal socket stat struct subprocess textwrap threading types
typing unicodedata urllib uuid warnings weakref
"""

SHOW: Final = """
import gc, json, sys
before = set(sys.modules)
sys.path[:0] = sys.argv[1:3]
from x07_sandbox.cli.main import main
gc.collect()
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
code = main(["run", sys.argv[3]])
sys.stdout.write(json.dumps([sorted(set(sys.modules) - before), len(collections)]))
sys.exit(code)
"""


def test_a_run_imports_only_listed_modules(image: Image, tmp_path: Path) -> None:
    """A warm `x07 run` imports only the listed modules and never collects garbage."""
    assert image.digest
    program = tmp_path / "quiet.py"
    program.write_text("pass\n")
    site = tmp_path / "site"
    site.mkdir()
    # msgspec alone: in a developer's environment it imports optional packages that lie beside it.
    (site / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    source = Path(paths.__file__).parents[2]
    argv = [sys.executable, "-I", "-S", "-c", SHOW, *map(str, (source, site, program))]
    env = os.environ | {"XDG_CONFIG_HOME": str(tmp_path)}  # few users have settings
    subprocess.run(argv, env=env, capture_output=True, check=True, stdin=subprocess.DEVNULL)  # builds it
    done = subprocess.run(argv, env=env, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    found, collections = json.loads(done.stdout)
    assert collections == 0
    packages = {name.rpartition(".")[0] for name in OURS.split()} | {"backends"}
    ours = {name.removeprefix("x07_sandbox.") for name in found if name.startswith("x07_sandbox.")} - packages
    assert sorted(ours) == sorted(OURS.split())
    others = {name.partition(".")[0] for name in found} - {"x07_sandbox"}
    assert sorted(name for name in others if not name.startswith("_") and name not in OTHERS.split()) == []
