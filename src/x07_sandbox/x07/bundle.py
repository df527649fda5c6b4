"""The files of a bundle, and X07's report about it.

A bundle is an executable PATH, the launcher, and a folder PATH.vm. The launcher contains the digest of `bundle.json`,
which contains the digests of all other files, so that each start detects a change. `manifest.json` is X07's own
description of a bundle; `bundle.json` adds what X07's lacks: the digests, and how the program starts.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.documents import prepared, render_json, why_invalid
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.host.settings import __version__
from x07_sandbox.policy.decode import MAX_BYTES as POLICY_MAX_BYTES
from x07_sandbox.programs.toolchains import BY_NAME, Source
from x07_sandbox.sessions.request import sha256_text
from x07_sandbox.x07.runner_report import CompileRunReport, Target

MANIFEST: Final = "manifest.json"
FACTS: Final = "bundle.json"
POLICY: Final = "policy.json"
PAYLOAD: Final = "payload"
START: Final = "start-bundle"  # the internal command that the launcher calls
FILES: Final = (MANIFEST, FACTS, POLICY, PAYLOAD)
_MAX_BYTES: Final = {MANIFEST: settings.MIB, POLICY: POLICY_MAX_BYTES, PAYLOAD: settings.ARTIFACT_MAX_BYTES}
_FACTS_MAX_BYTES: Final = 16 * settings.MIB  # JSON of arguments and variables, which have at most 1 MiB
_NO_DIGEST: Final = f"sha256:{'0' * 64}"
_Document = TypeVar("_Document")
Files = dict[str, bytes]

Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]


class VmManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """X07's description of a bundle. guest_digest: the image that the bundle was made with."""

    schema_version: Literal["x07.vm.bundle.manifest@0.2.0"] = "x07.vm.bundle.manifest@0.2.0"
    backend: str
    guest_image: str
    guest_digest: Digest
    payload: Literal["payload"]
    workdir: Literal["/x07/work"]
    policy: Literal["policy.json"]


class BundleFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a start needs besides X07's manifest.

    launcher: digest of the launcher, with zeros in place of the digest of this document. files: digests by name.
    pinned: whether only the image of the manifest may be used.
    toolchain, source, project: of the program (`Program`). args: used if the caller gives none.
    denied: ports by host that --deny-host denies; null stands for all ports.
    Version 0.1.0 packed programs without a compiler in another way; its other bundles are the same.
    """

    schema_version: Literal["x07.sandbox.bundle@0.1.0", "x07.sandbox.bundle@0.2.0"] = "x07.sandbox.bundle@0.2.0"
    launcher: Digest = _NO_DIGEST
    files: dict[str, Digest] = {}
    pinned: bool
    toolchain: str
    source: Source
    project: bool
    args: tuple[str, ...]
    env: dict[str, str]
    denied: dict[str, set[int] | None]
    cpu_ms: int | None
    max_output_bytes: int | None


class Bundle(NamedTuple):
    """The content of a bundle, checked against its digests."""

    manifest: VmManifest
    facts: BundleFacts
    policy: bytes
    payload: bytes


class BundledPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policies before and after changes by flags, and the names of the variables that the bundle sets."""

    base_policy: str
    effective_policy: str
    embedded_env_keys: tuple[str, ...]


class Guest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The guest that the bundle was made with, and X07's names in a guest."""

    contract: Literal["x07.vm.exec@0.1.0"] = "x07.vm.exec@0.1.0"
    platform: dict[Literal["os", "arch"], str]
    image: dict[Literal["digest", "ref"], str]
    entrypoint: tuple[str, ...] = ("/x07/bundle/payload",)
    workdir: str = "/x07/work"
    mounts: dict[Literal["job_in", "job_out"], str]


class BundleSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The files that were written, and how they run. abi: how the program gets its arguments."""

    out: str
    name: str
    abi: dict[Literal["kind"], Literal["argv_v1"]]
    policy: BundledPolicy
    emit_dir: str | None
    kind: Literal["vm"] = "vm"
    guest: Guest


class BundleReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of `x07 bundle`. report: of the build."""

    schema_version: Literal["x07.bundle.report@0.4.0"] = "x07.bundle.report@0.4.0"
    runner: Literal["os"] = "os"
    world: Literal["run-os-sandboxed"] = "run-os-sandboxed"
    target: Target
    bundle: BundleSection
    report: CompileRunReport


_MADE_BY: Final = b" Made by x07 bundle "
# As launchers/x07: no PYTHON variable has an effect. PATH is searched only if the bundle was made on another host.
_LAUNCHER: Final = """#!/bin/sh
# Run the program in the folder of the same name with .vm in a throw-away VM. Made by x07 bundle {version}.
# x07-sandbox refuses to start it if this file or a file in that folder was changed.
unset -f [ printf command
self=$0
case $self in */*) ;; *) self=./$self ;; esac
if [ -h "$self" ]; then self=$(/usr/bin/readlink -f -- "$self"); fi
python={python}
if [ ! -x "$python" ]; then
    tool=$(command -v x07-sandbox) && tool=$(/usr/bin/readlink -f -- "$tool") && python=${{tool%/*}}/python3
fi
if [ -x "$python" ]; then
    exec "$python" -I -c "from x07_sandbox.cli.main import entry; entry()" {start} "$self" {digest} -- "$@"
fi
printf '%s: cannot start: x07-sandbox is not installed. Install it, and add its folder to PATH\\n' "$self" >&2
exit 125
"""


def launcher_text(digest: str = _NO_DIGEST, python: str = sys.executable) -> bytes:
    """Return the launcher of the bundle whose `bundle.json` has this digest. python: the interpreter of x07-sandbox."""
    made = _LAUNCHER.format(version=__version__, python=shlex.quote(python), start=START, digest=digest)
    return made.encode("utf-8", "surrogateescape")


def is_bundle(launcher: Path) -> bool:
    """Return whether *launcher* and its folder are those of a bundle, whole or changed. Raises OSError."""
    folder = folder_of(launcher)
    if any(path.is_symlink() or not path.exists() for path in (launcher, folder)):
        return False
    if {path.name for path in folder.iterdir()} != {*FILES}:
        return False
    with launcher.open("rb") as file:
        head = file.read(settings.MIB)
    return _MADE_BY in head and f" {START} ".encode() in head


def folder_of(launcher: Path) -> Path:
    """Return the folder that belongs to the launcher."""
    return launcher.with_name(f"{launcher.name}.vm")


def render_bundle(manifest: VmManifest, facts: BundleFacts, policy: bytes, payload: bytes) -> tuple[bytes, Files]:
    """Return the launcher, and the files of the folder by name. The digests in *facts* are filled in.

    Raises UsageError for facts that JSON cannot express.
    """
    files = {MANIFEST: render_json(manifest), POLICY: policy, PAYLOAD: payload}
    digests = {name: sha256_text(data) for name, data in files.items()}
    facts = replace(facts, launcher=sha256_text(launcher_text()), files=digests)
    data = render_json(facts)
    if msgspec.json.decode(data, type=prepared(BundleFacts)) != facts:
        why = "an argument or a variable of the program is not UTF-8 text"
        raise UsageError("cannot make a bundle", why, "Change its value")
    return launcher_text(sha256_text(data)), files | {FACTS: data}


def read_bundle(launcher: Path, digest: str) -> Bundle:
    """Read a bundle and check all digests. digest: of `bundle.json`. Raises RefusedError."""
    folder = folder_of(launcher)
    facts = _decoded(_checked(launcher, folder / FACTS, digest, _FACTS_MAX_BYTES), BundleFacts, launcher)
    _checked(launcher, launcher, facts.launcher, settings.MIB, blank=digest)
    toolchain = BY_NAME.get(facts.toolchain)
    if facts.schema_version == "x07.sandbox.bundle@0.1.0" and toolchain is not None and toolchain.packs:
        why = f"an older version of x07-sandbox made it, and packed its {facts.toolchain} program in another way"
        fix = "Make it again with x07 bundle"
        raise RefusedError(f"cannot start the bundle {launcher}", why, fix, code="bundle-changed")
    manifest, policy, payload = (
        _checked(launcher, folder / name, facts.files.get(name, ""), most) for name, most in _MAX_BYTES.items()
    )
    return Bundle(_decoded(manifest, VmManifest, launcher), facts, policy, payload)


def refused(launcher: Path, why: str) -> RefusedError:
    """Return the error for a bundle that was changed."""
    fix = "Restore it from a copy that you trust, or make it again with x07 bundle"
    return RefusedError(f"cannot start the bundle {launcher}", why, fix, code="bundle-changed")


def _checked(launcher: Path, path: Path, digest: str, most: int, *, blank: str = "") -> bytes:
    """Return the content of a file that has this digest after *blank* was replaced by zeros. Raises RefusedError."""
    try:
        data = read_bounded(path, "file", most)
    except UsageError as exc:
        raise refused(launcher, f"{exc.what} ({exc.why})") from exc
    found = sha256_text(data.replace(blank.encode(), _NO_DIGEST.encode()) if blank else data)
    if found != digest:
        raise refused(launcher, f"{path} was changed: its digest is {found}, not {digest}")
    return data


def _decoded(data: bytes, model: type[_Document], launcher: Path) -> _Document:
    """Decode a document whose digest is right; only another version of x07-sandbox can have written it differently."""
    try:
        return msgspec.json.decode(data, type=prepared(model))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise refused(launcher, f"another version of x07-sandbox made it ({why_invalid(exc)})") from exc
