"""The stored id of an image of root's podman: used until the name of an image may have changed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from tests.unit.test_container_commands import WANTED
from tests.unit.test_images_manifest import MANIFEST
from x07_sandbox.backends.engines import engine
from x07_sandbox.backends.podman import EngineBackend, EngineRuntime, names_file
from x07_sandbox.errors import BackendError
from x07_sandbox.images import store
from x07_sandbox.images.store import read_guest_code

if TYPE_CHECKING:
    from pathlib import Path

CONF = "/usr/share/containers/storage.conf"
STORE: dict[str, Any] = {"graphRoot": "/store", "graphDriverName": "overlay", "graphOptions": {}, "configFile": CONF}
HOST: dict[str, Any] = {"security": {"rootless": False}, "serviceIsRemote": False}
FIRST, SECOND = "ab" * 32, "cd" * 32


class Podman:
    """A client that answers like podman. calls: the commands since the last look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = folder / "overlay-images" / "images.json"
        self.names.parent.mkdir()
        self.client = folder / "podman"
        self.client.write_text(
            f'#!/bin/sh\n[ "$1" != --runtime ] || shift 2\necho "$1" >>{folder}/calls\n'
            f"case $1 in info) cat {folder}/info ;; image) cat {folder}/image ;; *) exit 125 ;; esac\n",
            encoding="ascii",
        )
        self.client.chmod(0o755)
        self.answer({"graphRoot": str(folder)})
        self.tag(FIRST)

    def answer(self, store: dict[str, Any]) -> None:
        """Set what `info` says of the store."""
        (self.folder / "info").write_text(json.dumps({"host": HOST, "store": STORE | store}), encoding="ascii")

    def tag(self, image: str, place: str = "") -> None:
        """Give the name to an image, as podman does: with a new file. place: another place of the image."""
        current = store.sealed(replace(MANIFEST, guest_code=read_guest_code().digest))
        made = {"Id": image, "Labels": {f"{store.LABEL}0": store.encode_manifest(current).decode()}}
        made["GraphDriver"] = {"Data": {"UpperDir": f"{place or self.folder}/overlay/layer/diff"}}
        (self.folder / "image").write_text(json.dumps([made]), encoding="ascii")
        (new := self.folder / "new").write_text(image, encoding="ascii")
        new.rename(self.names)

    def calls(self) -> list[str]:
        """Return the commands since the last call of this method."""
        log = self.folder / "calls"
        found = log.read_text(encoding="ascii").split() if log.exists() else []
        log.unlink(missing_ok=True)
        return found


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Podman:
    """A client of root's podman, and no stored results."""
    made = Podman(tmp_path)
    monkeypatch.setenv("X07_VM_PODMAN_BIN", str(made.client))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    return made


def digest(name: str = "x07:1") -> str:
    """Return the id under which the backend finds an image, after the probe of a run."""
    backend = EngineBackend("podman")
    found = backend.find(name)
    backend.probe(found)
    return found.manifest.digest.removeprefix("sha256:")


@pytest.mark.root
def test_the_id_of_an_image_is_stored_until_a_name_changes(podman: Podman) -> None:
    """Root's podman is asked for its limits and an image once, and for the image again after any change of a name."""
    assert (digest(), podman.calls()) == (FIRST, ["info", "image"])
    assert (digest(), podman.calls()) == (FIRST, [])
    assert (digest("x07:2"), podman.calls()) == (FIRST, ["image"])
    podman.tag(SECOND)
    assert (digest(), podman.calls()) == (SECOND, ["image"])
    podman.names.unlink()
    assert [(digest(), podman.calls()) for _ in range(2)] == [(SECOND, ["image"])] * 2


@pytest.mark.root
def test_the_id_of_an_image_is_not_stored_without_the_file_of_names(podman: Podman) -> None:
    """An image is looked up for each run if it is unknown which file changes with the names of images."""
    podman.answer({"graphOptions": {"overlay.imagestore": "/further"}})
    assert (digest(), podman.calls()) == (FIRST, ["info", "image"])
    assert (digest(), podman.calls()) == (FIRST, ["image"])
    podman.answer({"graphRoot": str(podman.folder)})
    podman.client.touch()
    podman.tag(FIRST, "/images")
    assert (digest(), podman.calls()) == (FIRST, ["info", "image"])
    assert (digest(), podman.calls()) == (FIRST, ["image"])


@pytest.mark.root
def test_another_client_or_a_failed_container_makes_the_id_unknown(podman: Podman) -> None:
    """A changed client is asked again, and so is podman after it failed to create a container from a stored id."""
    assert (digest(), podman.calls()) == (FIRST, ["info", "image"])
    with pytest.raises(BackendError, match="cannot create the container"):
        EngineRuntime(client=engine("podman")).create(replace(WANTED, runtime="podman"))
    assert (digest(), podman.calls()) == (FIRST, ["create", "image"])
    podman.client.write_text(podman.client.read_text(encoding="ascii") + "# changed\n", encoding="ascii")
    assert (digest(), podman.calls()) == (FIRST, ["info", "image"])


@pytest.mark.parametrize(
    ("store", "host", "found"),
    [
        ({}, {}, "/store/overlay-images/images.json"),
        ({"graphDriverName": "vfs"}, {}, "/store/vfs-images/images.json"),
        ({"graphOptions": {"overlay.mountopt": "nodev"}}, {}, "/store/overlay-images/images.json"),
        ({"graphOptions": {"overlay.imagestore": "/further"}}, {}, ""),
        ({"graphOptions": None, "configFile": "/home/u/storage.conf"}, {}, ""),
        ({"graphRoot": ""}, {}, ""),
        ({}, {"serviceIsRemote": True}, ""),
    ],
)
def test_the_file_of_names_is_known_for_a_store_alone(store: dict[str, Any], host: dict[str, Any], found: str) -> None:
    """The file of names is that of podman's own store, if podman has no other store and runs on this host."""
    assert names_file({"host": HOST | host, "store": STORE | store}, [CONF]) == found
    assert names_file({}, [CONF]) == ""


def test_a_run_in_a_container_imports_little() -> None:
    """A run in a container does not import what only loads images into engines."""
    show = "import sys; from x07_sandbox.backends import podman; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert not {"dataclasses", "tarfile", "tempfile", "x07_sandbox.images.archive"} & set(done.stdout.split())
