"""The table of environment variables: valid values and errors."""

from __future__ import annotations

import re
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
def test_yes_and_no_are_understood(name: str) -> None:
    """Every X07 spelling of yes turns a switch on; no, blank and unset turn it off."""
    assert all(flag(name, {name: value}) for value in ["1", "true", "TRUE", "yes", "YES", " 1 "])
    assert not any(flag(name, {name: value}) for value in ["", " ", "0", "false", "FALSE", "no", "NO"])
    assert flag(name, {}) is False


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["2", "on", "True", "Yes", "tru", "yes please", "-1", "1\n1"])
def test_an_invalid_switch_is_an_error(name: str, value: str) -> None:
    """Any other value of a switch is an error that names the variable."""
    with pytest.raises(UsageError, match=name):
        check_environment({name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_a_valid_value_is_accepted(name: str, value: str) -> None:
    """Each variable accepts its valid values, ignoring surrounding blanks and case."""
    assert check_environment({name: value}) == ()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_an_error_that_names_its_variable(name: str, value: str) -> None:
    """An invalid value is an error with the variable's name and its valid values."""
    with pytest.raises(UsageError) as caught:
        check_environment({name: value})
    assert name in caught.value.what
    assert name in caught.value.fix
    assert len(str(caught.value)) < 1000


def test_aliases_are_resolved() -> None:
    """Aliases are resolved, and numbers are parsed."""
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
def test_a_misspelt_name_gets_a_suggestion(name: str, meant: str) -> None:
    """A misspelt variable name gives a warning with the nearest valid one."""
    (warning,) = check_environment({name: "whatever", "HOME": "/root"})
    assert name in warning
    assert f"did you mean {meant}?" in warning


def test_an_unknown_name_points_to_the_docs() -> None:
    """An unknown X07_VM_ variable gives a warning that points to the documentation; those of others are ignored."""
    others = {"PATH": "x", "X07_OS_FS": "1", "X07_PYTHON": "python3", "X07_WORLD": "?"}
    assert check_environment(others) == ()
    assert check_environment({"X07_VM_ZZZ": "1"}) == (
        "X07_VM_ZZZ is not a variable of x07-sandbox; see docs/reference/settings.md",
    )


@given(st.dictionaries(st.sampled_from([*VARIABLES, "X07_VM_\x1b[31m", "X07_I_\udc80"]), st.text(max_size=40)))
def test_messages_are_plain_text(environ: dict[str, str]) -> None:
    """Warnings and errors about any environment are printable ASCII."""
    try:
        problems = check_environment(environ)
    except UsageError as exc:
        problems = (str(exc),)
    assert all(line.isascii() and line.isprintable() for line in problems)


def test_the_names_of_backends_are_those_of_the_table_of_backends() -> None:
    """X07_VM_BACKEND accepts exactly the backends of the registry."""
    assert set(variables.BACKENDS.values()) == set(BY_NAME)


def test_every_variable_that_the_source_reads_is_in_the_table() -> None:
    """The source reads no X07 variable that is not in the table."""
    read = {
        name
        for path in SOURCE.rglob("*.py")
        if "guest" not in path.parts
        for name in re.findall(r'"(X07_(?:VM|SANDBOX|I)_[A-Z_]+[A-Z])"', path.read_text(encoding="utf-8"))
    }
    assert {"X07_VM_STATE_DIR", "X07_VM_CACHE_DIR", "X07_VM_REQUIRE_HARDWARE", "X07_VM_MAX_RUNNING"} <= read
    assert read <= VARIABLES.keys()
