"""Container images for tests, as OCI layouts and docker archives, made of entries of tar archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """An entry of a layer. kind: as of tarfile."""

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o755
    link: str = ""
    uid: int = 0
    gid: int = 0


def layer(*entries: Entry) -> bytes:
    """Return a layer, uncompressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for one in entries:
            info = tarfile.TarInfo(one.name)
            info.type, info.mode, info.linkname, info.size = one.kind, one.mode, one.link, len(one.content)
            info.uid, info.gid = one.uid, one.gid
            archive.addfile(info, io.BytesIO(one.content))
    return out.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _config(layers: tuple[bytes, ...], settings: dict[str, Any], arch: str) -> bytes:
    rootfs = {"type": "layers", "diff_ids": list(map(_digest, layers))}
    return json.dumps({"architecture": arch, "os": "linux", "config": settings, "rootfs": rootfs}).encode()


def layout(folder: Path, *layers: bytes, arch: str = "amd64", zipped: bool = True, **settings: Any) -> Path:  # noqa: ANN401 - of many types
    """Write an OCI layout. settings: of its configuration, such as Env."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        (blobs / _digest(data).removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": _digest(data), "size": len(data)}

    config = put(_config(layers, settings, arch), "config.v1+json")
    packed = [put(gzip.compress(one, mtime=0) if zipped else one, "layer.v1.tar+gzip") for one in layers]
    manifest = {"schemaVersion": 2, "config": config, "layers": packed}
    index = {"schemaVersion": 2, "manifests": [put(json.dumps(manifest).encode(), "manifest.v1+json")]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def docker_archive(path: Path, *layers: bytes, **settings: Any) -> Path:  # noqa: ANN401 - as above
    """Write an archive as of `docker save`."""
    config = _config(layers, settings, "amd64")
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": ["a:b"], "Layers": names}]
    files = {
        "config.json": config,
        "manifest.json": json.dumps(manifest).encode(),
        **dict(zip(names, layers, strict=True)),
    }
    path.write_bytes(layer(*(Entry(name, data) for name, data in files.items())))
    return path


def archived(folder: Path, path: Path) -> Path:
    """Write a layout as an archive."""
    with tarfile.open(path, "w") as archive:
        for one in sorted(folder.rglob("*")):
            archive.add(one, one.relative_to(folder), recursive=False)
    return path
