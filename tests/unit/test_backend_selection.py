"""Backend selection for every platform, flag and variable, with the platform injected."""

from __future__ import annotations

import argparse
import itertools

import pytest

from x07_sandbox.backends.registry import (
    ACCEPT_FLAG,
    BY_NAME,
    BackendRequest,
    Choice,
    Class,
    Platform,
    select,
    usable_flags,
)
from x07_sandbox.cli.doctor import backends_to_test
from x07_sandbox.errors import RefusedError, SandboxError, UsageError
from x07_sandbox.host.variables import SANDBOX_BACKENDS

LINUX = Platform(system="linux")
MACOS_26 = Platform(system="macos", macos_major=26)
MACOS_12 = Platform(system="macos", macos_major=12)
MACOS_13 = Platform(system="macos", macos_major=13)
OTHER = Platform(system="other")
PLATFORMS = [LINUX, MACOS_26, MACOS_13, MACOS_12, OTHER]
AUTOS: tuple[Class, ...] = ("vm", "none")
QEMU = Choice(backend="qemu")

# For each backend named alone: its result on Linux, macOS 26, 13 and 12, and elsewhere, without acceptance and
# with it. "closed": refused without acceptance; "elsewhere": not for
# this platform.
ON_LINUX, CLOSED = "taken elsewhere elsewhere elsewhere elsewhere", "closed closed closed closed closed"
ON_MACOS_26, ON_MACOS = "elsewhere taken elsewhere elsewhere elsewhere", "elsewhere taken taken elsewhere elsewhere"
VMS = {"firecracker-ctr": ON_LINUX, "apple-container": ON_MACOS_26, "qemu": ON_LINUX, "vz": ON_MACOS}
NAMED = {name: (words, words) for name, words in VMS.items()}
NAMED |= dict.fromkeys(("podman", "docker", "gvisor", "containerd", "os", "none"), (CLOSED, ON_LINUX))
TEXTS = {"closed": "weaker isolation", "elsewhere": "not supported on"}


def answer(platform: Platform, asked: BackendRequest) -> str:
    """Return the outcome of a request as a word of the table above, "contradiction" or "nothing"."""
    try:
        choice = select(platform, asked)
    except UsageError as exc:
        return "contradiction" if "contradict" in str(exc) else str(exc)
    except RefusedError as exc:
        return next((word for word, text in TEXTS.items() if text in f"{exc.what} {exc.why}"), "nothing")
    return "taken" if choice.backend in BY_NAME else "?"


@pytest.mark.parametrize("by", ["backend_flag", "backend_variable"])
@pytest.mark.parametrize("name", NAMED)
def test_a_named_backend_is_taken_or_refused_never_replaced(name: str, by: str) -> None:
    """A named backend is used or refused, never replaced; X07_VM_BACKEND alone selects a VM or a container."""
    closed = NAMED[name][0]
    by_name = closed if by == "backend_variable" and name in {"os", "none"} else NAMED[name][1]
    for accepted, expected in zip((False, True), (closed, by_name), strict=True):
        for platform, word in zip(PLATFORMS, expected.split(), strict=True):
            asked = BackendRequest(**{by: name}, accepted=accepted)  # type: ignore[arg-type] # the names are of texts
            assert answer(platform, asked) == word, (platform, accepted)
            if word == "taken":
                assert select(platform, asked).backend == name


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (BackendRequest(), QEMU),
        (BackendRequest(sandbox_flag="auto"), QEMU),
        (BackendRequest(sandbox_variable="vm"), QEMU),
        (BackendRequest(accepted=True), QEMU),
        (BackendRequest(sandbox_flag="vm", sandbox_variable="os"), QEMU),
        (BackendRequest(backend_flag="qemu", sandbox_variable="none"), QEMU),
        (BackendRequest(backend_flag="qemu", backend_variable="docker"), QEMU),
        (BackendRequest(sandbox_flag="vm", backend_variable="os"), QEMU),
        (BackendRequest(sandbox_flag="os"), "closed"),
        (BackendRequest(sandbox_flag="os", accepted=True), Choice(backend="os")),
        (
            BackendRequest(sandbox_flag="os", backend_variable="qemu", accepted=True),
            Choice(backend="os"),
        ),
        (BackendRequest(sandbox_flag="none", accepted=True), Choice(backend="none")),
        (BackendRequest(sandbox_variable="none"), "closed"),
        (BackendRequest(sandbox_flag="auto", backend_variable="docker"), "closed"),
        (BackendRequest(auto="none"), "closed"),
        (BackendRequest(auto="none", accepted=True), "closed"),
        (BackendRequest(auto="none", sandbox_flag="vm"), QEMU),
    ],
)
def test_the_command_line_comes_before_the_environment(asked: BackendRequest, expected: object) -> None:
    """Flags override variables, variables override the default, and weaker isolation needs acceptance."""
    assert (select(LINUX, asked) if isinstance(expected, Choice) else answer(LINUX, asked)) == expected


def test_a_backend_that_is_not_installed_is_not_tested_unasked() -> None:
    """`x07 conform` without a backend tests the VM backends that can run here."""
    options = argparse.Namespace(sandbox_backend=None, backend=None, i_accept_weaker_isolation=False)
    assert backends_to_test(options, LINUX) == ["qemu"]
    both = Platform(system="linux", installed=frozenset({"firecracker-ctr"}))
    assert backends_to_test(options, both) == ["firecracker-ctr", "qemu"]


@pytest.mark.parametrize("wanted", ["vm", "os", "none"])
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("of", ["flag", "variable"])
def test_a_contradiction_is_an_error(wanted: str, name: str, of: str) -> None:
    """A sandbox class and a backend that contradict each other are a usage error with a working combination."""
    asked = BackendRequest(**{f"sandbox_{of}": wanted, f"backend_{of}": name}, accepted=True)  # type: ignore[arg-type] # texts
    contradicts = BY_NAME[name].sandbox_class != wanted
    assert (answer(LINUX, asked) == "contradiction") is contradicts
    if contradicts:
        with pytest.raises(UsageError, match="--sandbox-backend" if of == "flag" else "X07_SANDBOX_BACKEND") as caught:
            select(LINUX, asked)
        by_flag, by_variable = "--sandbox-backend vm --backend qemu", "X07_SANDBOX_BACKEND=vm and X07_VM_BACKEND=qemu"
        assert f"Use {by_flag if of == 'flag' else by_variable}" in caught.value.fix


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        (BackendRequest(sandbox_flag="os"), "add --i-accept-weaker-isolation"),
        (BackendRequest(backend_flag="os"), "add --i-accept-weaker-isolation"),
        (
            BackendRequest(backend_variable="none", accepted=True),
            "add --sandbox-backend none --i-accept-weaker-isolation",
        ),
        (BackendRequest(backend_flag="podman"), "add --i-accept-weaker-isolation"),
        (BackendRequest(backend_variable="docker", flags=()), "set X07_I_ACCEPT_WEAKER_ISOLATION=1"),
        (
            BackendRequest(backend_variable="os", flags=()),
            "set X07_SANDBOX_BACKEND=os and X07_I_ACCEPT_WEAKER_ISOLATION=1",
        ),
    ],
)
def test_one_refusal_names_all_that_weaker_isolation_needs(asked: BackendRequest, fix: str) -> None:
    """The refusal of a weaker backend names every flag or variable that would allow it."""
    with pytest.raises(RefusedError) as caught:
        select(LINUX, asked)
    assert f"or {fix}" in caught.value.fix


@pytest.mark.parametrize("platform", PLATFORMS, ids=str)
def test_no_combination_gives_less_than_a_virtual_machine_unasked(platform: Platform) -> None:
    """No combination of flags and variables selects less than a VM unless it is named and accepted."""
    words: list[str | None] = [None, *sorted(set(SANDBOX_BACKENDS.values()))]
    names: list[str | None] = [None, *BY_NAME]
    for sandbox_flag, sandbox_variable, backend_flag, backend_variable in itertools.product(words, words, names, names):
        for auto, accepted in itertools.product(AUTOS, (False, True)):
            asked = BackendRequest(
                accepted=accepted,
                sandbox_flag=sandbox_flag,
                sandbox_variable=sandbox_variable,
                backend_flag=backend_flag,
                backend_variable=backend_variable,
                auto=auto,
            )
            try:
                choice = select(platform, asked)
            except SandboxError as exc:
                if isinstance(exc, RefusedError):
                    _names_what_works(platform, exc)
                continue
            row = BY_NAME[choice.backend]
            assert row.runs_on(platform)
            named = {
                sandbox_flag,
                sandbox_variable,
                backend_flag,
                *({backend_variable} if row.sandbox_class == "vm" else ()),
            }
            assert not row.weaker or (accepted and {row.sandbox_class, row.name} & named)
            assert backend_flag in {None, choice.backend}


def _names_what_works(platform: Platform, exc: RefusedError) -> None:
    """Check that a refusal names flags that work here, or the platform they work on."""
    here = usable_flags(platform)
    words = here or usable_flags(LINUX)
    assert " ".join(words) in exc.fix
    assert here or "on Linux" in exc.fix
    given = dict(zip(words[::2], words[1::2], strict=True))
    asked = BackendRequest(sandbox_flag=given["--sandbox-backend"], backend_flag=given["--backend"])
    assert select(platform if here else LINUX, asked).backend == given["--backend"]
    # Acceptance is proposed only where it would help.
    assert ACCEPT_FLAG not in exc.fix or any(row.weaker for row in BY_NAME.values())


def test_the_order_on_each_platform_is_that_of_the_design() -> None:
    """`auto` prefers firecracker-ctr, if installed, to qemu on Linux, and apple-container to vz on macOS 26."""

    def order(platform: Platform) -> list[str]:
        return [row.name for row in BY_NAME.values() if row.auto and row.runs_on(platform)]

    assert order(LINUX) == ["firecracker-ctr", "qemu"]
    assert order(MACOS_26) == ["apple-container", "vz"]
    assert order(MACOS_13) == ["vz"]
    assert order(MACOS_12) == []
    assert select(MACOS_13, BackendRequest()) == Choice(backend="vz")
    assert select(MACOS_26, BackendRequest()) == Choice(backend="apple-container")
    assert order(OTHER) == []
    installed = Platform(system="linux", installed=frozenset({"firecracker-ctr"}))
    assert select(installed, BackendRequest()) == Choice(backend="firecracker-ctr")
