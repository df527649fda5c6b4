"""The `apple-container` backend: a container in a virtual machine of Apple's `container`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from x07_sandbox.backends.apple.containers import AppleContainers
from x07_sandbox.backends.apple.create import image_labels
from x07_sandbox.backends.base import Availability
from x07_sandbox.backends.container.backend import GAPS, HELD, WithImages
from x07_sandbox.backends.engines import CLIENT_ENV, Client
from x07_sandbox.backends.prerequisites import Need, require
from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.paths import find_program
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import Features

_CLIENT: Final = Need("program", "container", "", "X07_VM_APPLE_CONTAINER_BIN")


class AppleBackend(WithImages):
    """The backend for Apple's `container` on this Mac."""

    name = "apple-container"
    known_gaps: Mapping[str, str] = GAPS | {"root-inside": "in its VM, the program is in a container with few rights"}
    other = "Set X07_VM_APPLE_CONTAINER_BIN to the value that it had when it was started"
    needs = (_CLIENT,)

    @property
    def fix_image(self) -> str:
        """What to do if there is no suitable image."""
        return "Run x07 image load --archive FILE, and then container image load --input FILE"

    def _runtime(self) -> AppleContainers:
        require(self.needs, f"cannot use {self.name}")
        # Not SSH_AUTH_SOCK, which its client would pass on, nor anything else of the caller.
        env = CLIENT_ENV | {key: os.environ[key] for key in ("HOME",) if key in os.environ}
        return AppleContainers(
            client=Client(name=self.name, binary=find_program(_CLIENT.place) or "container", env=env)
        )

    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the digest of an image, and the labels of its variant for this host. Raises ImageError."""
        found = self._runtime().inspect_image(wanted)
        if found is None:
            raise ImageError(f"there is no guest image {wanted}", f"{self.name} does not have it", self.fix_image)
        digest, labels = image_labels(found, host_arch().deb)
        if not digest:
            raise ImageError(f"cannot use the image {wanted}", f"{self.name} reports no digest for it", self.fix_image)
        return digest, labels

    def least_features(self) -> Features:
        """Return the features of a container in a VM."""
        return Features(isolation="vm-hardware", own_kernel=True, can_enforce=HELD)

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - needs no image
        """Return what VMs can limit here. Raises HostError, BackendError if they cannot be used."""
        runtime = self._runtime()
        status = runtime.client.call("system", "status")
        if status.status:
            why = status.error or "its service does not run"
            raise HostError(f"cannot use {self.name}", why, "Start its service: container system start")
        runtime.options()
        return Availability(features=self.least_features(), proof="Apple's container answers")
