"""Shared by all tests: sample sizes, the rule for missing tools, and the check for leaked descriptors."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import signal
import stat
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pytest
from hypothesis import settings
from msgspec.structs import replace

from tests import durations

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.engines import EngineUnderTest
    from x07_sandbox.backends.engines import Name
    from x07_sandbox.images.store import Image

CI = os.environ.get("CI", "") in {"1", "true"}
FULL = os.environ.get("X07_TEST_FULL") == "1"

settings.register_profile("dev", max_examples=25, deadline=None)
# Derandomized: a change must not fail because of examples that its author never saw.
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("deep" if FULL else "ci" if CI else "dev")

# nohup and a script's background jobs ignore these two signals, and every program that a test starts would inherit
# that. A handler is not inherited: a closed terminal ends no tests, and the programs get the default action.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)

# A process in the background would outlive the test whose run started it, and take processor time from others.
os.environ["X07_VM_SAVE_FIRST"] = "1"
# A test may hold one run while it waits for another. There are more slots than workers, so that tests of several
# workers cannot wait for each other for ever.
os.environ.setdefault("X07_VM_MAX_RUNNING", "8")


def _own_settings() -> None:
    """Give all tests settings with room for the saved VMs of all their images, in place of the user's settings.

    With the ordinary limit, each test that saves a VM would remove one that a later test has to save anew. What other
    programs have in the user's folder of settings, such as pip, stays in force. Workers inherit the first one's folder.
    """
    if "X07_TEST_SETTINGS" in os.environ:
        return
    users = Path(os.environ.get("XDG_CONFIG_HOME", "") or Path.home() / ".config")
    folder = Path(tempfile.mkdtemp(prefix="x07-test-settings-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for entry in users.iterdir() if users.is_dir() else ():
        if entry.name != "x07":
            (folder / entry.name).symlink_to(entry.absolute())
    (folder / "x07").mkdir(mode=0o700)
    path = folder / "x07" / "sandbox.toml"
    path.write_text("[disk]\nsaved_vms_mib = 20480\n", encoding="utf-8")
    path.chmod(0o600)
    os.environ["XDG_CONFIG_HOME"] = os.environ["X07_TEST_SETTINGS"] = str(folder)


_own_settings()

MORE_PACKAGES = ("nodejs", "python3-pip", "python3-requests", "redis-tools") if FULL else ()
VZ_HELPER = str(Path(__file__).with_name("vz_helper.py"))
PACKAGES = ("curl", "git", "lua5.4", *MORE_PACKAGES)
LASTING_FDS: set[int] = set()
"""Descriptors that outlive a test on purpose, such as those of the launcher thread: a fixture adds them here."""


T = TypeVar("T")


def sample(cases: Sequence[T], count: int) -> Sequence[T]:
    """Return all *cases* in full runs (X07_TEST_FULL=1), else *count* of them, spread evenly."""
    if FULL or count >= len(cases):
        return cases
    return [cases[number * len(cases) // count] for number in range(count)]


class Need(Protocol):
    """The type of the fixture ``need``."""

    def __call__(self, condition: object, reason: str, *, installable: bool) -> None:
        """Continue if *condition* holds; see ``need`` below."""


def need(condition: object, reason: str, *, installable: bool) -> None:
    """Continue if *condition* holds; otherwise skip the test, or fail it in CI if the prerequisite can be installed.

    installable: apt or pip can install what is missing. scripts/test.sh installs all such prerequisites, so that in CI
    their absence is a fault. A prerequisite that no package provides (KVM, macOS, a kernel feature) always skips.
    """
    if condition:
        return
    if CI and installable:
        pytest.fail(f"missing, and scripts/test.sh should have installed it: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder for this test's job records."""
    place = tmp_path / "home" / "jobs"
    place.parent.mkdir(mode=0o700)
    monkeypatch.setenv("X07_VM_STATE_DIR", str(place))
    return place


@pytest.fixture(scope="session")
def image() -> Image:
    """The default image, current, in the user's ordinary cache, with the VM templates of ordinary runs.

    Building either takes long and may write to standard error, which tests compare.
    """
    from x07_sandbox import SandboxError
    from x07_sandbox.images.build import build_image
    from x07_sandbox.sessions.saving import prepare_clones

    made = build_image(progress=lambda _text: None)
    with contextlib.suppress(SandboxError):  # without templates, runs boot cold
        prepare_clones(made, lambda _text: None)
    return made


@pytest.fixture(scope="session")
def with_packages() -> str:
    """The name of an image with PACKAGES, shared by all tests; one worker builds it."""
    from x07_sandbox import SandboxError
    from x07_sandbox.images.build import build_image

    name = "with-more-packages" if FULL else "with-packages"
    try:
        build_image(name=name, include=PACKAGES, progress=lambda _text: None)
    except SandboxError as exc:
        need(None, f"an image with {', '.join(PACKAGES)}: {exc}", installable=True)
    return name


@pytest.fixture(scope="session")
def podman(need: Need, shared: Path) -> Iterator[EngineUnderTest]:
    """A real podman with its own store, loaded with our image."""
    yield from _engine("podman", need, shared)


@pytest.fixture(scope="session")
def docker(need: Need, shared: Path) -> Iterator[EngineUnderTest]:
    """A real dockerd on its own socket, loaded with our image."""
    yield from _engine("docker", need, shared)


@pytest.fixture(scope="session")
def containerd(need: Need, shared: Path) -> Iterator[EngineUnderTest]:
    """A real containerd on its own socket, with our image."""
    from tests.engines import archive_in, missing, running_containerd

    reason = missing("containerd")
    need(not reason, reason, installable=os.geteuid() == 0)
    with running_containerd(archive_in(shared)) as found:
        yield found


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers share."""
    place = tmp_path_factory.getbasetemp()
    return place.parent if "PYTEST_XDIST_WORKER" in os.environ else place


@pytest.fixture(scope="session")
def vz_stand_in(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The variables for the vz backend with a stand-in for its helper (tests/vz_helper.py), and a bundle of the image.

    The bundle has the image's own kernel: an ELF file on x86_64, which QEMU starts and no Mac.
    """
    from x07_sandbox.images import vz_bundle

    bundle = tmp_path_factory.mktemp("vz") / "guest.bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vz_bundle, "check_kernel", lambda *_words: None)
        vz_bundle.make_bundle(image, bundle)
    return {"X07_VM_VZ_HELPER_BIN": VZ_HELPER, "X07_VM_VZ_GUEST_BUNDLE": str(bundle)}


@contextlib.contextmanager
def vz_on_linux(variables: Mapping[str, str]) -> Iterator[None]:
    """Let flags and variables select the vz backend in this process, with the stand-in for its helper."""
    from x07_sandbox.backends.registry import BY_NAME

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BY_NAME, "vz", replace(BY_NAME["vz"], linux=True))
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def _engine(name: Name, need: Need, shared: Path) -> Iterator[EngineUnderTest]:
    from tests.engines import archive_in, missing, running

    reason = missing(name)
    need(not reason, reason, installable=os.geteuid() == 0)
    with running(name, archive_in(shared)) as found:
        yield found


def overwrite(path: Path, data: bytes | None = None) -> None:
    """Write *data* to the start of a file, or flip one byte in its middle; mode and times stay the same.

    Only ctime, which no call can set, reveals the change.
    """
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        if data is None:
            file.seek(before.st_size // 2)
            data = bytes([file.read(1)[0] ^ 1])
            file.seek(before.st_size // 2)
        file.write(data)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --record-durations."""
    parser.addoption("--record-durations", action="store_true", help="rewrite tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    """Record the time of files if asked, in the process to which workers report."""
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start slow files first, so that the last ones are short and no worker idles; skip what only full runs do."""
    durations.sort_by_file(items)
    for item in items:
        if not FULL and (mark := item.get_closest_marker("full")):
            item.add_marker(pytest.mark.skip(f"full sizes only: {mark.args[0]}"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # noqa: ANN401 - of xdist, without types
    """Give each worker whole groups of tests."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    class Groups(LoadFileScheduling):  # type: ignore[misc]
        """Groups of tests by `durations.group_of`."""

        def _split_scope(self, nodeid: str) -> str:
            return durations.group_of(nodeid)

    return Groups(config, log)


@pytest.fixture(scope="session", name="need")
def _need() -> Need:
    return need


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether the tests run in full size (scripts/test.sh --full)."""
    return FULL


def open_fds() -> dict[int, str]:
    """Return every open descriptor of this process and its target, without the listing's own."""
    found: dict[int, str] = {}
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 a name here is a number, no path
        try:
            found[int(name)] = os.readlink(f"/dev/fd/{name}")  # noqa: PTH115 its target is no path either
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail the test if it leaves a descriptor open, or replaces one that was open before it."""
    before = open_fds()
    yield
    leaked = _leaked(before)
    if leaked:
        gc.collect()  # descriptors held by garbage only: Python's ResourceWarning, which is an error here, reports them
        leaked = _leaked(before)
    assert not leaked, f"the test left descriptors open: {leaked}"


@pytest.fixture(autouse=True, scope="module")
def no_shims() -> Iterator[None]:
    """Fail the last test of a file if the file leaves a process of a container that containerd no longer ends."""
    yield
    engines = sys.modules.get("tests.engines")  # a file that starts no container does not import it
    assert engines is None or engines.shims_left() == []


def _leaked(before: dict[int, str]) -> dict[int, str]:
    return {fd: target for fd, target in open_fds().items() if fd not in LASTING_FDS and before.get(fd) != target}
