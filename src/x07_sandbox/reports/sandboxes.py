"""The documents of `x07 sandbox`."""

from typing import Literal

import msgspec

from x07_sandbox.policy.denials import Denial, Hint, Outcome
from x07_sandbox.sessions.result import Output


class SandboxInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An open sandbox.

    id, name, tags: by which users find it. backend: its backend. image: the digest of its image, or null.
    age_s: seconds since it was opened.
    held: whether it outlives its creator, and others can connect to it. paused: whether it was paused.
    left_s, commands: seconds until its lifetime ends, and how many commands run now; null unless it is held.
    left_out: one denial for each reason why entries of folders were not copied in.
    """

    id: str
    name: str
    tags: dict[str, str]
    backend: str
    image: str | None
    age_s: float
    held: bool
    paused: bool = False
    left_s: float | None
    commands: int | None
    left_out: tuple[Denial, ...] = ()


class SandboxesReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 sandbox list --json`, oldest sandbox first, and of `x07 sandbox create --json`."""

    schema_version: Literal["x07.sandbox.sandboxes@0.1.0"] = "x07.sandbox.sandboxes@0.1.0"
    sandboxes: tuple[SandboxInfo, ...]


class SnapshotRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot.

    id, name: by which it is found; the name may be empty. sandbox: the id of the sandbox that was saved.
    created_unix_ms: when, in milliseconds since 1970. image: the digest of the image. bytes: its size on the disk.
    """

    id: str
    name: str
    sandbox: str
    created_unix_ms: int
    image: str
    bytes: int


class SnapshotsReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 snapshot list|show|rm --json` and of `x07 sandbox snapshot --json`, oldest snapshot first."""

    schema_version: Literal["x07.sandbox.snapshots@0.1.0"] = "x07.sandbox.snapshots@0.1.0"
    snapshots: tuple[SnapshotRow, ...]


class CheckpointReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 sandbox checkpoint --json`. sandbox: its id. checkpoint: the number of the checkpoint."""

    schema_version: Literal["x07.sandbox.checkpoint@0.1.0"] = "x07.sandbox.checkpoint@0.1.0"
    sandbox: str
    checkpoint: int


class CommandDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 sandbox exec --json`.

    sandbox: the id of the sandbox. id: the number of the command in it.
    outcome: how the command ended, in the same words as the outcome of a run; null for a command that was only started.
    reason_code, reason: the reason for the outcome (docs/reference/codes.md), and the same in one sentence.
    x07_exit_code: the exit code of `x07 sandbox exec`. exit_code: the exit status of the command, or null.
    signal: the signal that ended the command, or null. stdout, stderr: what it wrote.
    wall_ms, cpu_ms: elapsed time and CPU time in milliseconds. denials: actions that were denied. hints: what it seems
    to lack, according to its output.
    memory_peak_bytes: the peak memory use of all commands of the sandbox while it ran.
    """

    schema_version: Literal["x07.sandbox.command@0.1.0"] = "x07.sandbox.command@0.1.0"
    sandbox: str
    id: int
    outcome: Outcome | None
    reason_code: str = ""
    reason: str = ""
    x07_exit_code: int = 0
    exit_code: int | None = None
    signal: int | None = None
    stdout: Output | None = None
    stderr: Output | None = None
    wall_ms: float = 0
    cpu_ms: float = 0
    memory_peak_bytes: int = 0
    denials: tuple[Denial, ...] = ()
    hints: tuple[Hint, ...] = ()


class FileRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A file of a sandbox. mode: its permission bits. mtime_s: seconds since 1970. target: of a link, else empty.

    name_base64, target_base64: the exact text in base64, if it is not valid UTF-8; the text is then escaped.
    """

    name: str
    kind: Literal["file", "folder", "link", "other"]
    mode: int
    size: int
    mtime_s: float
    target: str
    name_base64: str = ""
    target_base64: str = ""


class FilesReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 sandbox ls --json`."""

    schema_version: Literal["x07.sandbox.files@0.1.0"] = "x07.sandbox.files@0.1.0"
    files: tuple[FileRow, ...]


class ForwardReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 sandbox forward --json`. address, port: of the host; or the path of a Unix socket, and 0."""

    schema_version: Literal["x07.sandbox.forward@0.1.0"] = "x07.sandbox.forward@0.1.0"
    address: str
    port: int
