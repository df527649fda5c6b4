"""A backend of deepagents that is a sandbox: `create_deep_agent(model=..., backend=X07Backend(sandbox))`.

The tools of the agent run commands in the sandbox, and read and change its files. They need Python and GNU grep in the
image, as the image `default` has.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from deepagents.backends.protocol import ExecuteResponse, FileDownloadResponse, FileUploadResponse
from deepagents.backends.sandbox import BaseSandbox

from x07_sandbox import SandboxError
from x07_sandbox.integrations import BAD_COMMAND, require_usage, was_stopped

if TYPE_CHECKING:
    from deepagents.backends.protocol import FileOperationError

    from x07_sandbox import Sandbox

OUTPUT_MAX: Final = 4 << 20  # the largest answer of a tool of deepagents: 500 KiB of text, as JSON
TIMEOUT_S: Final = 120


class X07Backend(BaseSandbox):
    """A sandbox as a backend. It is not closed by the agent. timeout_s: of a command for which the agent sets none."""

    def __init__(self, sandbox: Sandbox, *, timeout_s: float = TIMEOUT_S) -> None:
        self._sandbox = sandbox
        self._timeout_s = timeout_s

    @property
    def id(self) -> str:
        """The id of the sandbox."""
        return self._sandbox.id

    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """Run shell commands. Their output and errors come in order, as one text."""
        timeout_s = float(timeout) if timeout else self._timeout_s
        try:
            ended = self._sandbox.shell(
                command, timeout_s=timeout_s, merge=True, max_output_bytes=OUTPUT_MAX, keep="both"
            )
        except SandboxError as exc:
            require_usage(exc)
            return ExecuteResponse(output=f"{exc}\n", exit_code=BAD_COMMAND)
        output = ended.stdout.decode(errors="replace")
        if was_stopped(ended):
            output += f"{ended.reason}\n"
        return ExecuteResponse(output=output, exit_code=ended.x07_exit_code, truncated=ended.truncated)

    def upload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        """Write files, and the folders above them. Answer one by one."""
        return [FileUploadResponse(path=path, error=self._upload(path, data)) for path, data in files]

    def download_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        """Read files. Answer one by one."""
        return [self._download(path) for path in paths]

    def _upload(self, path: str, data: bytes) -> FileOperationError | str | None:
        if not path.startswith("/"):
            return "invalid_path"
        try:
            self._sandbox.files.write(path, data)
        except OSError as exc:
            return _word(exc)
        return None

    def _download(self, path: str) -> FileDownloadResponse:
        if not path.startswith("/"):
            return FileDownloadResponse(path=path, error="invalid_path")
        try:
            return FileDownloadResponse(path=path, content=self._sandbox.files.read(path))
        except OSError as exc:
            return FileDownloadResponse(path=path, error=_word(exc))


def _word(error: OSError) -> FileOperationError | str:
    """Return the word that deepagents has for an error."""
    match error:
        case FileNotFoundError():
            return "file_not_found"
        case PermissionError():
            return "permission_denied"
        case IsADirectoryError():
            return "is_directory"
        case NotADirectoryError():
            return "invalid_path"
        case OSError(errno=errno.EROFS):  # the system is read-only
            return "permission_denied"
        case _:
            return error.strerror or str(error)
