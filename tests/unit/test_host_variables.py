"""The one table of environment variables: what each may hold, and what a slip is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.backends.registry import BY_NAME
from x07_sandbox.errors import UsageError
from x07_sandbox.host import variables
from x07_sandbox.host.variables import VARIABLES, check_environment, flag, number, text

SOURCE = Path(variables.__file__).parents[1]
FLAGS = sorted(name for name, variable in VARIABLES.items() if variable.kind == "flag")

GOOD = {
    "X07_SANDBOX_BACKEND": ["auto", "VM", " native ", "none"],
    "X07_VM_BACKEND": ["qemu", "Firecracker", "container", "apple-container", " vz"],
    "X07_VM_STATE_DIR": ["/a", "/a b/ c"],
    "X07_VM_CACHE_DIR": ["/var/cache/x"],
    "X07_VM_MAX_RUNNING": ["1", " 4096 "],
    "X07_VM_GUEST_IMAGE_DIGEST": ["sha256:" + "0a" * 32],
    "X07_MAX_C_BYTES": ["0", "1048576"],
}
BAD = {
    "X07_SANDBOX_BACKEND": ["vms", "vm,os", "qemu"],
    "X07_VM_BACKEND": ["kvm", "apple", "firecracker_ctr"],
    "X07_VM_STATE_DIR": ["jobs", "./jobs", "~/jobs", " /jobs"],
    "X07_VM_CACHE_DIR": ["cache"],
    "X07_VM_MAX_RUNNING": ["0", "-1", "4097", "two", "1.5", "9" * 5000, "\u0661"],
    "X07_VM_GUEST_IMAGE_DIGEST": ["0a" * 32, "sha256:" + "0A" * 32, "sha256:" + "0a" * 31, "sha512:" + "0a" * 32],
    "X07_MAX_C_BYTES": ["-1", "1k"],
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["1", "true", "TRUE", "yes", "YES", " 1 "])
def test_yes_is_yes(name: str, value: str) -> None:
    """Every spelling of X07's turns a switch on."""
    assert flag(name, {name: value}) is True


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [None, "", " ", "0", "false", "FALSE", "no", "NO"])
def test_no_is_no(name: str, value: str | None) -> None:
    """Unset, blank, and every spelling of no turn a switch off."""
    assert flag(name, {} if value is None else {name: value}) is False


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["2", "on", "True", "Yes", "tru", "yes please", "-1", "1\n1"])
def test_a_slip_in_a_switch_is_an_error(name: str, value: str) -> None:
    """A value that is neither yes nor no is never taken for either, and the error names the variable."""
    with pytest.raises(UsageError, match=name):
        check_environment({name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_a_good_value_is_taken(name: str, value: str) -> None:
    """Each variable takes what its row says, blanks around it and the case of words aside."""
    assert check_environment({name: value}) == ()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_an_error_that_names_its_variable(name: str, value: str) -> None:
    """A value outside the row is refused with the variable's name and with what it may hold."""
    with pytest.raises(UsageError) as caught:
        check_environment({name: value})
    assert name in caught.value.what
    assert name in caught.value.fix
    assert len(str(caught.value)) < 1000


def test_words_have_their_meaning() -> None:
    """Aliases are told as what they stand for, and numbers as numbers."""
    assert text("X07_SANDBOX_BACKEND", {"X07_SANDBOX_BACKEND": "Native"}) == "os"
    assert text("X07_VM_BACKEND", {"X07_VM_BACKEND": "firecracker"}) == "firecracker-ctr"
    assert text("X07_VM_BACKEND", {"X07_VM_BACKEND": "container"}) == "apple-container"
    assert number("X07_VM_MAX_RUNNING", {"X07_VM_MAX_RUNNING": "12"}) == 12
    assert number("X07_VM_MAX_RUNNING", {}) is None
    assert text("X07_VM_BACKEND", {"X07_VM_BACKEND": " "}) is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("X07_VM_STATEDIR", "X07_VM_STATE_DIR"),
        ("X07_SANDBOX_BACKENDS", "X07_SANDBOX_BACKEND"),
        ("X07_I_ACCEPT_WEAK_ISOLATION", "X07_I_ACCEPT_WEAKER_ISOLATION"),
        ("X07_VM_REQUIRE_HARDWARES", "X07_VM_REQUIRE_HARDWARE"),
        ("X07_I_ACCEPT", "X07_I_ACCEPT_WEAKER_ISOLATION"),
        ("X07_VM_STATE", "X07_VM_STATE_DIR"),
    ],
)
def test_a_misspelt_name_is_told_with_the_one_that_was_meant(name: str, meant: str) -> None:
    """A name that begins like ours and is none is a warning with a suggestion."""
    (warning,) = check_environment({name: "whatever", "HOME": "/root"})
    assert name in warning
    assert f"did you mean {meant}?" in warning


def test_a_name_like_none_of_ours_is_told_with_where_they_stand() -> None:
    """A name that begins like ours and resembles none of them is a warning that says where all of them are."""
    assert check_environment({"X07_VM_ZZZ": "1"}) == (
        "X07_VM_ZZZ is not a variable of x07-sandbox; see docs/reference/x07.md",
    )


def test_names_that_are_not_ours_are_nobodys_business() -> None:
    """Other variables are not looked at, X07's own for programs among them."""
    assert check_environment({"PATH": "x", "X07_OS_FS": "1", "X07_PYTHON": "python3", "X07_WORLD": "?"}) == ()


@given(st.dictionaries(st.sampled_from([*VARIABLES, "X07_VM_\x1b[31m", "X07_I_\udc80"]), st.text(max_size=40)))
def test_any_environment_is_answered_in_plain_text(environ: dict[str, str]) -> None:
    """Whatever the environment holds: warnings, or our error, in plain ASCII without control characters."""
    try:
        told = check_environment(environ)
    except UsageError as exc:
        told = (str(exc),)
    assert all(line.isascii() and line.isprintable() for line in told)


def test_the_names_of_backends_are_those_of_the_table_of_backends() -> None:
    """What X07_VM_BACKEND may mean are exactly the backends that there is a row for."""
    assert set(variables.BACKENDS.values()) == set(BY_NAME)


def test_every_variable_that_the_source_reads_is_in_the_table() -> None:
    """No variable with a name of ours is read that the table does not hold."""
    read = {
        name
        for path in SOURCE.rglob("*.py")
        if "guest" not in path.parts
        for name in re.findall(r'"(X07_(?:VM|SANDBOX|I)_[A-Z_]+[A-Z])"', path.read_text(encoding="utf-8"))
    }
    assert {"X07_VM_STATE_DIR", "X07_VM_CACHE_DIR", "X07_VM_REQUIRE_HARDWARE", "X07_VM_MAX_RUNNING"} <= read
    assert read <= VARIABLES.keys()


def test_checking_a_good_environment_costs_no_difflib() -> None:
    """What finds suggestions (difflib) is loaded only for a name that is not known."""
    code = (
        "import sys; from x07_sandbox.host.variables import check_environment as check\n"
        "check({'X07_VM_BACKEND': 'qemu'}); assert 'difflib' not in sys.modules\n"
        "check({'X07_VM_BACKED': 'qemu'}); assert 'difflib' in sys.modules\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("X07_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)
