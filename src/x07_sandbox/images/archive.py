"""A guest image as an archive for podman, docker and ctr: OCI layout (image-spec 1.1) and docker's manifest.json.

The archive has two layers: the root file system, shared by all images with the same base, and x07's own code. The
archive is reproducible, and so is the image id (the config's digest).
"""

import hashlib
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from x07_sandbox.channel.egress import RESOLV_CONF
from x07_sandbox.errors import ImageError
from x07_sandbox.host.arch import ARCHES
from x07_sandbox.images import tar
from x07_sandbox.images.commands import remove_tree, unpack_root
from x07_sandbox.images.store import AGENT, ENTRY, LABEL, Image
from x07_sandbox.policy.decode import canonical_json

_LABEL_MAX: Final = 4000  # containerd refuses a label of more than 4096 bytes with its name
_CREATED: Final = "2025-01-01T00:00:00Z"  # commands.EPOCH
_HEADER: Final = 110
_FOLDERS: Final = ("x07", "opt/x07", "run", "tmp", "dev", "proc", "sys", "usr/lib/x07")
_LINKS: Final = {"etc/machine-id": "/run/x07/machine-id"}


def write_archive(image: Image, reference: str, target: IO[bytes], work: Path, progress: Callable[[str], None]) -> str:
    """Write an archive of *image*, tagged *reference* (NAME:TAG). Return the image id, "sha256:<hex>".

    work: an empty folder. Raises SandboxError, OSError.
    """
    progress("unpacking the root file system")
    root = unpack_root(work, image.folder / image.manifest.parts.root.file)
    progress("making the layers")
    layers = [_layer(work / "root.tar", root), _agent_layer(work / "agent.tar", image)]
    remove_tree(root)
    config = canonical_json(_config(image, [digest for digest, _ in layers]))
    config_digest = _sha256(config)
    manifest = canonical_json(_manifest(config_digest, len(config), layers))
    index = canonical_json(_index(_sha256(manifest), len(manifest), reference))
    docker = [{"Config": _blob(config_digest), "RepoTags": [reference], "Layers": [_blob(d) for d, _ in layers]}]
    progress("writing the archive")
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for digest, data in sorted(((config_digest, config), (_sha256(manifest), manifest))):
            tar.add_bytes(archive, _blob(digest), data)
        for digest, path in sorted(layers):
            with path.open("rb") as layer:
                archive.addfile(tar.entry(_blob(digest), size=path.stat().st_size), layer)
        tar.add_bytes(archive, "index.json", index)
        tar.add_bytes(archive, "manifest.json", canonical_json(docker))
        tar.add_bytes(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    return f"sha256:{config_digest}"


def add_agent(image: Image, root: Path) -> None:
    """Add what the second layer contains to the unpacked files of an image. Raises ImageError, OSError."""
    with tempfile.TemporaryFile() as layer:
        _write_agent_layer(layer, image)
        layer.seek(0)
        with tarfile.open(fileobj=layer) as archive:
            for name in _LINKS:
                (root / name).unlink(missing_ok=True)
            archive.extractall(root, filter="tar")


def agent_of(image: Image) -> bytes:
    """Return the agent's zip from the image's initramfs. Raises ImageError."""
    data = (image.folder / image.manifest.parts.initrd.file).read_bytes()
    at = 0
    while data[at : at + 6] == b"070701":
        size, name_size = (int(data[at + field : at + field + 8], 16) for field in (54, 94))
        name = data[at + _HEADER : at + _HEADER + name_size - 1]
        start = at + _HEADER + name_size
        start += -start % 4
        if name == b"agent.zip":
            return data[start : start + size]
        at = start + size + -(start + size) % 4
    raise ImageError("cannot use the guest image", "its initramfs contains no agent", "Run x07 image build")


def _layer(path: Path, root: Path) -> tuple[str, Path]:
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        tar.add_tree(archive, root, exact_modes=True)
    return _digest_of(path), path


def _agent_layer(path: Path, image: Image) -> tuple[str, Path]:
    with path.open("wb") as file:
        _write_agent_layer(file, image)
    return _digest_of(path), path


def _write_agent_layer(file: IO[bytes], image: Image) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in sorted(_FOLDERS):
            archive.addfile(tar.entry(name, tarfile.DIRTYPE, 0o755))
        for name, link in sorted(_LINKS.items()):
            archive.addfile(tar.entry(name, tarfile.SYMTYPE, 0o777, link=link))
        tar.add_bytes(archive, AGENT.removeprefix("/"), agent_of(image))
        tar.add_bytes(archive, "etc/resolv.conf", RESOLV_CONF.encode())  # for runtimes that cannot mount one


def _config(image: Image, layers: list[str]) -> dict[str, Any]:
    text = canonical_json(msgspec.to_builtins(image.manifest)).decode()
    parts = [text[at : at + _LABEL_MAX] for at in range(0, len(text), _LABEL_MAX)]
    labels = {f"{LABEL}{number}": part for number, part in enumerate(parts)}
    return {
        "architecture": ARCHES[image.manifest.arch].deb,
        "os": "linux",
        "created": _CREATED,
        "config": {"Entrypoint": ENTRY, "Env": ["PATH=/usr/bin:/bin"], "Labels": labels, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in layers]},
        "history": [{"created": _CREATED, "created_by": "x07-sandbox"} for _ in layers],
    }


def _manifest(config: str, size: int, layers: list[tuple[str, Path]]) -> dict[str, Any]:
    kind = "application/vnd.oci.image"
    return {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": {"mediaType": f"{kind}.config.v1+json", "digest": f"sha256:{config}", "size": size},
        "layers": [
            {"mediaType": f"{kind}.layer.v1.tar", "digest": f"sha256:{digest}", "size": path.stat().st_size}
            for digest, path in layers
        ],
    }


def _index(manifest: str, size: int, reference: str) -> dict[str, Any]:
    kind = "application/vnd.oci.image"
    names = {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference.rpartition(":")[2]}
    entry = {"mediaType": f"{kind}.manifest.v1+json", "digest": f"sha256:{manifest}", "size": size}
    return {"schemaVersion": 2, "mediaType": f"{kind}.index.v1+json", "manifests": [{**entry, "annotations": names}]}


def _blob(digest: str) -> str:
    return f"blobs/sha256/{digest}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
