"""Debian package names are checked against the host's package lists before a build."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from x07_sandbox.errors import UsageError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.images import sources

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Need

KNOWN = ("python3-numpy", "python3-numpydoc", "python3-sunpy", "nodejs", "libfoo-dev", "zip")


def test_near_names_are_found() -> None:
    """A mistyped package name, or a Python project's name, suggests the Debian package."""
    assert sources.near_names("numpy", KNOWN)[0] == "python3-numpy"
    assert sources.near_names("nodejss", KNOWN) == ["nodejs"]
    assert sources.near_names("foo", KNOWN) == ["libfoo-dev"]
    assert sources.near_names("qqqqqqqq", KNOWN) == []
    assert sources.near_projects("Nunpy", KNOWN)[0] == "numpy"


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Path:
    """The sources file of an image whose package lists this host has."""
    file = sources.write_sources(
        tmp_path_factory.mktemp("lists"), sources.release_codename(), host_arch().deb, lambda _note: None
    )
    need(bool(sources.package_names(file)), "package lists of this host (apt-get update)", installable=False)
    return file


def test_an_unknown_package_is_named_at_once(lists: Path) -> None:
    """An unknown package is refused before the build, with a suggestion; known and virtual ones are accepted."""
    sources.check_known(lists, ["zip", "awk"], "trixie")
    with pytest.raises(UsageError, match="no package with this name") as caught:
        sources.check_known(lists, ["zip", "numpy"], "trixie")
    assert "python3-numpy" in caught.value.fix
    assert "--pip numpy" in caught.value.fix


def test_the_versions_of_a_new_image_are_known(lists: Path) -> None:
    """The Python version of a new image is known before the build."""
    found = sources.versions(lists, ("python3", "no-such-package"))
    assert sorted(found) == ["python3"]
    assert found["python3"].startswith("3.")


def test_a_host_without_lists_refuses_nothing(tmp_path: Path) -> None:
    """A host without package lists leaves the check to the build."""
    file = tmp_path / "build.sources"
    file.write_text("Types: deb\nURIs: http://x.invalid/debian\nSuites: sid\nComponents: main\n")
    sources.check_known(file, ["no-such-package"], "sid")
    assert sources.versions(file, ["python3"]) == {}
