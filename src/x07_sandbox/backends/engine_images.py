"""Loading a guest image into container engines."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.engines import CLIENTS, Name, engine
from x07_sandbox.errors import BackendError, HostError, UsageError
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.host.version import __version__
from x07_sandbox.images.archive import write_archive

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

DEFAULT_REFERENCE: Final = f"ghcr.io/x07lang/x07-guest-runner:{__version__}"
# OCI distribution-spec: NAME:TAG, with an optional host in front.
_REFERENCE: Final = re.compile(r"[a-z0-9]+(?:[._:/-]+[a-z0-9]+)*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_REFERENCE_MAX: Final = 255
_LOAD_S: Final = 600.0


def check_reference(reference: str) -> str:
    """Return *reference* if it is a valid image name. Raises UsageError."""
    if len(reference) > _REFERENCE_MAX or not _REFERENCE.fullmatch(reference):
        fix = "Use NAME:TAG in lower case, such as x07-guest-runner:dev"
        why = "container engines do not accept this name"
        raise UsageError(f"cannot use {reference[:80]!r} as an image name", why, fix)
    return reference


def load(
    image: Image, reference: str, names: Sequence[Name], progress: Callable[[str], None], archive: Path | None = None
) -> tuple[str, tuple[Name, ...]]:
    """Load *image* as *reference* into engines. Return its id, and the engines that have it now.

    names: the engines; () for all of this host. archive: a file to write the image to as well. Raises SandboxError.
    """
    engines = [engine(name) for name in names]
    for name in () if names else CLIENTS:
        with contextlib.suppress(HostError, BackendError):
            one = engine(name)
            if not one.call("info").status:  # docker's client may be installed without the engine
                engines.append(one)
    if not engines and archive is None:
        fix = "Install podman or docker.io, or write a file to load elsewhere: --archive FILE"
        raise HostError("cannot load the guest image", "no container engine answers on this host", fix)
    with tempfile.TemporaryDirectory(prefix="archive-", dir=cache_folder("tmp")) as folder:
        file = Path(folder, "image.tar") if archive is None else archive
        try:
            with file.open("wb") as target:
                digest = write_archive(image, reference, target, Path(folder), progress)
        except OSError as exc:
            raise HostError(f"cannot write {file}", exc.strerror or str(exc), "Free disk space") from exc
        for one in engines:
            progress(f"loading the image into {one.name}")
            answer = one.call("load", "--quiet", "--input", str(file.absolute()), timeout_s=_LOAD_S)
            if answer.status:
                fix = f"Check that {one.name} works: {one.name} info"
                raise HostError(f"{one.name} did not load the image", answer.error or f"status {answer.status}", fix)
    return digest, tuple(one.name for one in engines)
