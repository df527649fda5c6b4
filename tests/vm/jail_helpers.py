"""The jail seen from outside: a runner as root or as an ordinary user, with a hostile program in QEMU's place."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pwd
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import x07_sandbox
from tests.conftest import need
from tests.vm.conftest import marked
from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.qemu.machine import Paths
from x07_sandbox.backends.qemu.template import template_for
from x07_sandbox.host import settings
from x07_sandbox.host.linux import children_of
from x07_sandbox.host.paths import cache_dir
from x07_sandbox.images.verify import open_image
from x07_sandbox.jail.bwrap import CRIU, SETPRIV
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.guest import ram_class_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from x07_sandbox.images.store import Image

HERE = Path(__file__).parent
SOURCE = HERE / "hostile_vmm.c"
MODES = (
    *("look", "digest", "flood", "garbage", "mute", "exit", "abort"),
    *("hang-up", "hog", "stubborn", "abi"),
)
USERADD, USERDEL = "/usr/sbin/useradd", "/usr/sbin/userdel"
DEPENDENCIES = ("h11", "hpack", "idna", "msgspec", "shtab")
FORMS = ("root", "user")
WITHOUT = " without namespaces"
HOT = " restored"
EACH_FORM = (*FORMS, *(form + WITHOUT for form in FORMS))
_LIMITED = "Max open files 64 64"
_count = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user who runs x07, and what they need.

    command: prefix that makes a command run as this user. folder: readable by the user: binaries, and where
    needed copies of the package and of what it imports. namespaces: whether they are allowed.
    """

    form: str
    uid: int
    home: Path
    command: tuple[str, ...]
    env: dict[str, str]
    folder: Path
    namespaces: bool = True
    hot: bool = False  # whether the VMM is dumped and restored, instead of started

    @property
    def words(self) -> tuple[str, ...]:
        """Return the prefix of a command that this account runs."""
        return (*(() if self.namespaces else (sys.executable, str(HERE / "without_namespaces.py"))), *self.command)

    @property
    def outer(self) -> tuple[str, ...]:
        """The processes of a jail except the VMM itself."""
        return ("supervisor", "monitor", "inner") if self.namespaces else ("supervisor",)

    @property
    def jail(self) -> str:
        """The kind of jail, as a result names it."""
        return f"{'namespaces' if self.namespaces else 'Landlock and seccomp'}, {self.form}; "

    @property
    def cache(self) -> Path:
        """The user's folder of images."""
        return Path(self.env["X07_VM_CACHE_DIR"])

    @property
    def state(self) -> Path:
        """The user's folder of job records."""
        return Path(self.env["X07_VM_STATE_DIR"])

    def hostile(self, mode: str) -> Path:
        """Return the program with that behaviour."""
        return self.folder / f"hostile-{mode}"

    def x07(self, *args: str, stdin: bytes = b"", inside: tuple[str, ...] = ()) -> subprocess.CompletedProcess[bytes]:
        """Run the real command line as this user. inside: words before the command, such as a namespace's."""
        code = "import sys; from x07_sandbox.cli.main import main; sys.exit(main())"
        return subprocess.run(
            [*inside, *self.words, sys.executable, "-B", "-c", code, *args],
            input=stdin,
            capture_output=True,
            env=self.env,
            cwd=self.folder,
            timeout=300,
            check=False,
        )


# --- accounts --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """Make a folder that every user may read, with the hostile program under each of its names."""
    gcc = shutil.which("gcc")
    need(gcc, "gcc is not installed", installable=True)
    assert gcc is not None
    folder = Path(tempfile.mkdtemp(prefix="x07-jail-"))
    try:
        folder.chmod(0o755)
        first = folder / f"hostile-{MODES[0]}"
        subprocess.run(
            [gcc, "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", first, SOURCE], check=True
        )
        for mode in MODES[1:]:
            shutil.copy(first, folder / f"hostile-{mode}")  # no link: each needs its own inode
        yield folder
    finally:
        shutil.rmtree(folder)


def copy_image(image: Image, cache: Path) -> Path:
    """Copy an image to another cache, by its digest and as the default; return its folder."""
    images = cache / "images"
    target = images / image.digest.removeprefix("sha256:")
    for folder in (cache, images, images / "names"):
        folder.mkdir(mode=0o700, exist_ok=True)
    if not target.exists():
        shutil.copytree(image.folder, target)  # copies, not links: tests modify them
        target.chmod(0o700)
    name = images / "names" / "default"
    name.write_text(f"{target.name}\n", encoding="ascii")
    name.chmod(0o600)
    return target


@contextlib.contextmanager
def temporary_user() -> Iterator[pwd.struct_passwd]:
    """Create an ordinary user, and remove the user with all their processes and files on exit."""
    need(Path(USERADD).exists(), "useradd is not installed", installable=True)
    name = f"x07t{os.getpid()}n{next(_count)}"
    subprocess.run([USERADD, "--create-home", "--shell", "/bin/sh", name], check=True, capture_output=True)
    found = pwd.getpwnam(name)
    try:
        yield found
    finally:
        # podman leaves a process, with which the user would stay. As this user, kill -1 reaches no other process.
        kill = ["/bin/sh", "-c", "kill -KILL -1"]
        subprocess.run(kill, user=found.pw_uid, group=found.pw_gid, extra_groups=[], check=False, capture_output=True)
        subprocess.run([USERDEL, "--remove", name], check=False, capture_output=True)
        for folder in (found.pw_dir, f"/tmp/storage-run-{found.pw_uid}"):  # noqa: S108 - podman's
            shutil.rmtree(folder, ignore_errors=True)


def own_tree(path: Path, uid: int) -> None:
    """Give a folder and its content to a user and the group of that number, as useradd makes it."""
    os.chown(path, uid, uid)
    for found in path.rglob("*"):
        os.chown(found, uid, uid, follow_symlinks=False)


def _environment(home: Path, python_path: list[Path]) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        "X07_VM_CACHE_DIR": str(home / ".cache" / "x07-sandbox"),
        "X07_VM_STATE_DIR": str(home / ".x07" / "vm" / "jobs"),
        "X07_VM_SAVE_FIRST": "1",
    }


def _packages() -> Path:
    import msgspec

    return Path(msgspec.__file__).parent.parent


def _other_account(found: pwd.struct_passwd, folder: Path, image: Image) -> Account:
    """Return an ordinary user with a home, an image and all they need to run x07."""
    home = Path(found.pw_dir)
    home.chmod(0o700)
    (home / ".cache").mkdir(mode=0o700)
    copy_image(image, home / ".cache" / "x07-sandbox")
    _copy_templates(image, home / ".cache" / "x07-sandbox" / "templates")
    own_tree(home, found.pw_uid)
    ids = ("--reuid", str(found.pw_uid), "--regid", str(found.pw_gid), "--clear-groups", "--inh-caps=-all")
    command = (SETPRIV, *ids, "--")
    # The files of root's environment may lie below /root: the user gets copies of those they cannot read.
    source = folder / "src"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(x07_sandbox.__file__).parent, source / "x07_sandbox", ignore=skip)
    shutil.copy(HERE / "jail_driver.py", folder)
    packages = _packages()
    asks = [*command, sys.executable, "-I", "-c", f"import sys; sys.path = {[str(packages)]!r}; import msgspec"]
    if subprocess.run(asks, check=False, capture_output=True, cwd="/").returncode != 0:
        need(
            subprocess.run([*command, sys.executable, "-c", ""], check=False, cwd="/").returncode == 0,
            f"an ordinary user cannot run {sys.executable}",
            installable=False,
        )
        for name in DEPENDENCIES:
            shutil.copytree(packages / name, folder / "packages" / name, ignore=skip)
        packages = folder / "packages"
    env = _environment(home, [source, packages])
    return Account(form="user", uid=found.pw_uid, home=home, command=command, env=env, folder=folder)


def _copy_templates(image: Image, target: Path) -> None:
    """Copy the saved VMs for builds and runs, which takes less than saving them; that for connections is left out."""
    target.mkdir(mode=0o700)
    with open_image(image) as opened:
        ram = [ram_class_bytes(size) for size in (settings.BUILD_MEM_BYTES, default_policy().limits.mem_bytes)]
        kinds = (
            MachineKind(image=opened, ram_bytes=ram[0], runtime="build"),
            MachineKind(image=opened, ram_bytes=ram[1]),
        )
        found = [template_for(kind, kvm=kvm).folder for kind in kinds for kvm in (False, True)]
    for folder in found:
        if folder.is_dir():
            subprocess.run(["/bin/cp", "-a", "--sparse=always", folder, target], check=True)


def _own_account(form: str, home: Path, folder: Path) -> Account:
    """Return the current user, with the existing image and a separate folder for records."""
    shutil.copy(HERE / "jail_driver.py", folder)
    env = _environment(home, [Path(x07_sandbox.__file__).parent.parent, _packages()])
    env["X07_VM_CACHE_DIR"] = str(cache_dir())
    return Account(form=form, uid=os.geteuid(), home=home, command=(), env=env, folder=folder)


@pytest.fixture(scope="session", name="accounts")
def accounts_fixture(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Account]]:
    """The accounts that this session can have: both as root, otherwise only its own."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(public_folder())
        home = tmp_path_factory.mktemp("home")
        home.chmod(0o700)
        if os.geteuid() != 0:
            yield {"user": _own_account("user", home, folder)}
            return
        found = stack.enter_context(temporary_user())
        yield {"root": _own_account("root", home, folder), "user": _other_account(found, folder, image)}


@pytest.fixture(scope="session", params=FORMS, name="account")
def account_fixture(request: pytest.FixtureRequest, accounts: dict[str, Account]) -> Account:
    """Root and an ordinary user in turn."""
    need(request.param in accounts, "needs to be root", installable=False)
    return accounts[request.param]


@pytest.fixture(scope="session", params=EACH_FORM, name="each_form")
def each_form_fixture(request: pytest.FixtureRequest, accounts: dict[str, Account]) -> Account:
    """Both in turn, each with either kind of jail."""
    form = request.param.removesuffix(WITHOUT)
    need(form in accounts, "needs to be root", installable=False)
    return replace(accounts[form], namespaces=form == request.param)


@pytest.fixture(scope="session", params=[*EACH_FORM, *(form + HOT for form in FORMS)], name="any_form")
def any_form_fixture(request: pytest.FixtureRequest, accounts: dict[str, Account]) -> Account:
    """Both in turn, each with either kind of jail, and with a restored VMM."""
    form, hot = request.param.removesuffix(WITHOUT).removesuffix(HOT), request.param.endswith(HOT)
    need(form in accounts, "needs to be root", installable=False)
    need(not hot or os.access(CRIU, os.X_OK), "criu is not installed", installable=True)
    return replace(accounts[form], namespaces=not request.param.endswith(WITHOUT), hot=hot)


@pytest.fixture(scope="session", name="ordinary")
def ordinary_fixture(accounts: dict[str, Account]) -> Account:
    """The ordinary user."""
    return accounts["user"]


# --- the runner ------------------------------------------------------------------------------------------------------


class Runner:
    """jail_driver.py as a separate process, which ends, with its machine, when the `with` ends."""

    def __init__(self, account: Account, *, may_fail: bool = False, **order: Any) -> None:  # noqa: ANN401 - JSON
        self._expect = ("started", "refused") if may_fail else ("started",)
        self.account = account
        self.order = order | {"binary": str(account.hostile(order.pop("mode"))), "hot": account.hot}
        self.started: dict[str, Any] = {}
        self._buffer = b""

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [
                *self.account.words,
                sys.executable,
                "-B",
                self.account.folder / "jail_driver.py",
                json.dumps(self.order),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=self.account.env,
            cwd=self.account.folder,
        )
        try:
            self.started = self.hear(*self._expect)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_args: object) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.process.wait()
        self._errors.close()

    def say(self, word: str) -> None:
        """Send a word, so that the runner continues."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def hear(self, *events: str, timeout_s: float = 90) -> dict[str, Any]:
        """Return the runner's next message, which must be one of *events*."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while b"\n" not in self._buffer:
            assert poll.poll(max(0, deadline - time.monotonic()) * 1000), f"no {events} within {timeout_s} s"
            chunk = os.read(fd, 1 << 20)
            if not chunk:
                self._errors.seek(0)
                pytest.fail(f"the runner ended before {events}: {self._errors.read().decode()[-2000:]}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        assert message["event"] in events, message
        return message

    @property
    def supervisor(self) -> int:
        """The jail's first process, a child of the runner."""
        return int(self.started["supervisor"])

    @property
    def monitor(self) -> int:
        """Bubblewrap's outer process, if there is one."""
        (pid,) = children_of(self.supervisor)
        return pid

    @property
    def inner(self) -> int:
        """The first process inside the jail."""
        return int(self.started["inner"])

    def vmm(self) -> int:
        """The program in QEMU's place, once it runs."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = children_of(self.inner) if self.account.namespaces else [self.inner]
            for pid in found:
                with contextlib.suppress(OSError):  # criu has other processes first
                    if Path(f"/proc/{pid}/exe").readlink() == Path(self.order["binary"]):
                        return pid
            select.select([], [], [], 0.01)  # no event announces another process's exec
        pytest.fail("the program did not start")

    def wait_at_the_gate(self) -> None:
        """Wait until the jail is complete and only the program's start is missing."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            made = Path(f"/proc/{self.inner}", "mountinfo" if self.account.namespaces else "limits")
            if (Paths().root if self.account.namespaces else _LIMITED) in " ".join(
                made.read_text(encoding="utf-8").split()
            ):
                return
            select.select([], [], [], 0.01)  # no event announces another process's mounts
        pytest.fail("the jail was not made")

    def processes(self) -> dict[str, int]:
        """Return all processes of the jail, once the program runs."""
        return {name: getattr(self, name) for name in self.account.outer} | {"vmm": self.vmm()}

    def image_files(self) -> list[str]:
        """Return where the program finds the image's parts."""
        return list(self.started["image_files"])

    def pidfds(self, stack: contextlib.ExitStack) -> list[int]:
        """Return one pidfd for each process of the jail."""
        fds = [os.pidfd_open(pid) for pid in self.processes().values()]
        for fd in fds:
            stack.callback(os.close, fd)
        return fds

    def left(self) -> list[str]:
        """Return the remains of this job on the host."""
        folder = Path(self.started["folder"])
        owner = json.loads((folder / "owner.json").read_bytes())
        found = [f"process {pid}" for pid in marked(owner["instance"])]
        return found + [f"group {group}" for group in owner["cgroups"] if Path(group).exists()]


def ended(pidfds: list[int], timeout_s: float) -> bool:
    """Wait that long; return whether all those processes have ended."""
    deadline = time.monotonic() + timeout_s
    for fd in pidfds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            return False
    return True


# --- /proc -----------------------------------------------------------------------------------------------------------


def status(pid: int) -> dict[str, str]:
    """Return /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def all_pids() -> list[int]:
    """Return every process of this machine."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - numbers


def descriptors(pid: int) -> dict[int, str]:
    """Return the target of each descriptor of a process."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(link.name)] = os.readlink(link)  # noqa: PTH115 - no path
    return found


# --- the hostile program's findings ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One attempt of the program. err: 0 if it worked."""

    probe: str
    arg: str
    err: int
    value: int


def parse(text: str) -> list[Finding]:
    """Parse the findings."""
    return [Finding(**json.loads(line)) for line in text.splitlines()]


@dataclass(slots=True)
class Look:
    """A job's findings about its jail, and its state seen from outside.

    statuses, links: by name of the process ("supervisor", "monitor", "inner", "vmm"), for this job and for a second
    one. own: the files that the jail holds for the program. touched: the host's files that were changed.
    """

    account: Account
    findings: list[Finding]
    started: dict[str, Any]
    statuses: list[dict[str, dict[str, str]]]
    links: list[dict[str, dict[int, str]]]
    paths: list[str]
    own: set[str]
    touched: list[str]
    image: tuple[os.stat_result, os.stat_result]
    reached: list[str] = field(default_factory=list)

    def of(self, *probes: str) -> list[Finding]:
        """Return all findings of these probes; each has at least one."""
        found = [finding for finding in self.findings if finding.probe in probes]
        assert {finding.probe for finding in found} == set(probes)
        return found

    def worked(self, *probes: str) -> list[Finding]:
        """Return the findings that worked."""
        return [finding for finding in self.of(*probes) if finding.err == 0]
