"""An environment of Harbor that is a sandbox: `harbor run -e x07_sandbox.integrations.harbor:X07Environment ...`.

The agent and the tests are root in a VM that sees the files of the task's container image (`x07 image import`).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shlex
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any, Final

from harbor.environments.base import BaseEnvironment, ExecResult, SandboxBuildFailedError
from harbor.environments.capabilities import EnvironmentCapabilities, EnvironmentResourceCapabilities
from harbor.environments.definition import COMPOSE_FILE_NAME, DOCKERFILE_NAME
from harbor.environments.options import EnvironmentOptions
from harbor.environments.tar_transfer import extract_dir, pack_dir
from harbor.models.task.config import NetworkMode
from pydantic import Field

from x07_sandbox import AsyncSandbox, Sandbox
from x07_sandbox.integrations import errors_of

_PORTS: Final = "80,443"  # Harbor's lists of hosts have no ports
_AS_USER: Final = (
    'user=$(id -nu -- "$1") || exit 126; command -v runuser >/dev/null && exec runuser -u "$user" -- bash -c "$2"; '
    'exec su -s "$(command -v bash)" "$user" -c "$2"'
)


class X07Options(EnvironmentOptions):
    """What `--ek` may set. Other things: see `Sandbox`."""

    image: str | None = Field(None, description="Guest image for all tasks, whatever image they name.")
    public_hosts: list[str] | None = Field(
        None, description="What tasks with a public network may reach, such as pypi.org:443; [] for nothing."
    )
    policy: str | None = Field(None, description="Policy file or built-in:NAME.")
    procs: int | None = Field(None, description="Limit of processes and threads.")
    lifetime_s: float = Field(24 * 3600, description="After this time the sandbox ends.")


class X07Environment(BaseEnvironment):
    """One sandbox for each trial, in which commands are root unless they name a user."""

    options_model = X07Options
    options: X07Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as Harbor has it
        self._sandbox: AsyncSandbox | None = None
        super().__init__(*args, **kwargs)

    @staticmethod
    def type() -> str:
        """Return the name in Harbor's messages."""
        return "x07"

    @property
    def capabilities(self) -> EnvironmentCapabilities:
        """What Harbor may ask for. It refuses all else before the trial."""
        return EnvironmentCapabilities(
            disable_internet=True,
            network_allowlist=True,
            network_allowlist_hostnames=True,
            network_allowlist_ipv4_addresses=True,
            network_allowlist_ipv6_addresses=True,
        )

    @classmethod
    def resource_capabilities(cls) -> EnvironmentResourceCapabilities:
        """Memory is a limit; a number of processors is not."""
        return EnvironmentResourceCapabilities(memory_limit=True)

    @property
    def _image(self) -> str:
        return self.options.image or image_name(self.task_env_config.docker_image or "")

    def _validate_definition(self) -> None:
        """Refuse what a sandbox cannot be, before the trial. Raises SandboxBuildFailedError."""
        wanted = self.task_env_config.docker_image
        if self._host_mounts:
            raise SandboxBuildFailedError("x07 mounts no folders of the host. Leave out --mounts.")
        if (self.environment_dir / COMPOSE_FILE_NAME).exists():
            raise SandboxBuildFailedError("x07 does not run the services of a docker-compose.yaml. Use -e docker.")
        if not wanted and not self.options.image:
            raise SandboxBuildFailedError(
                "x07 does not build a Dockerfile, and the task names no docker_image. Build the image elsewhere, save "
                "it with podman save --format oci-archive -o task.tar IMAGE, run x07 image import task.tar --name "
                "NAME, and add --ek image=NAME."
            )
        if self._image not in Sandbox.images():
            source = f"docker://{wanted}" if wanted and not self.options.image else "SOURCE"
            command = f"x07 image import {shlex.quote(source)} --name {self._image}"
            raise SandboxBuildFailedError(f"There is no guest image {self._image}. Run {command}")
        if self._network_is_public and self.options.public_hosts is None:
            raise SandboxBuildFailedError(
                "The task asks for a public network, and x07 only connects to listed hosts. Say what it may reach, "
                """such as --ek 'public_hosts=["pypi.org:443"]', or --ek 'public_hosts=[]' for nothing."""
            )

    async def start(self, force_build: bool) -> None:  # noqa: FBT001 - as Harbor has it
        """Open the sandbox. Raises SandboxBuildFailedError, SandboxError."""
        if force_build and (self.environment_dir / DOCKERFILE_NAME).exists():
            raise SandboxBuildFailedError("x07 does not build a Dockerfile. Leave out --force-build.")
        memory = self._effective_memory_mb
        self._sandbox = AsyncSandbox(
            image=self._image,
            policy=self.options.policy,
            guest_root=True,
            allow_hosts=self._hosts(),
            memory=None if memory is None else memory << 20,
            procs=self.options.procs,
            lifetime_s=self.options.lifetime_s,
            tags={"harbor": self.session_id},
        )
        try:
            await self._sandbox.open()
            if workdir := self.task_env_config.workdir:
                await self._sandbox.files.mkdir(workdir)
            await self.ensure_dirs(self._mount_targets(writable_only=True))
            await self._upload_environment_dir_after_start()
        except BaseException:
            await self.stop(delete=True)
            raise

    def _hosts(self) -> list[str]:
        if self.network_policy.network_mode == NetworkMode.PUBLIC:
            return self.options.public_hosts or []
        hosts = self.network_policy.allowed_hosts
        return [f"[{host}]:{_PORTS}" if ":" in host else f"{host}:{_PORTS}" for host in hosts]

    async def stop(self, delete: bool) -> None:  # noqa: ARG002, FBT001 - a sandbox ends with its process
        """End the sandbox."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None and sandbox.alive:
            await sandbox.kill()

    @property
    def _open(self) -> AsyncSandbox:
        if self._sandbox is None:
            raise RuntimeError("the environment was not started, or was stopped")
        return self._sandbox

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> ExecResult:
        """Run a command with bash. After a timeout its code is 124."""
        user = self._resolve_user(user)
        argv = ["bash", "-c", command]
        if user is not None and str(user) not in {"root", "0"}:
            argv = ["bash", "-c", _AS_USER, "bash", str(user), command]
        ended = await self._open.exec(
            argv, cwd=cwd or self.task_env_config.workdir, env=self._merge_env(env), timeout_s=timeout_sec
        )
        answer = ExecResult(
            stdout=ended.stdout.decode(errors="replace"), stderr=errors_of(ended), return_code=ended.x07_exit_code
        )
        if (callback := self._output_callback()) is not None:
            await callback(answer.stdout or "", "stdout")
            await callback(answer.stderr or "", "stderr")
        return answer

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        """Copy a file of the host."""
        await self._open.upload(source_path, target_path)

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        """Copy what is in a folder of the host into a folder, which may exist."""
        staged, target = f"/x07-{uuid.uuid4().hex}", shlex.quote(target_dir)
        await self._open.upload(source_dir, staged)
        copy = f"mkdir -p {target} && cp -a {staged}/. {target}; code=$?; rm -rf {staged}; exit $code"
        await self._open.exec(["bash", "-c", copy], check=True)

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        """Copy a file to the host."""
        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder, "file")
            await self._open.download(source_path, staged)
            await asyncio.to_thread(_move, staged, Path(target_path))

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        """Copy what is in a folder to a folder of the host, which may exist, without links that lead out of it."""

        def merge() -> None:
            with tempfile.TemporaryFile() as packed:
                pack_dir(staged, packed, compress=False, include_root=False)
                packed.seek(0)
                extract_dir(packed, target_dir)

        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder, "folder")
            await self._open.download(source_dir, staged)
            await asyncio.to_thread(merge)


def _move(staged: Path, target: Path) -> None:
    """Move a file that was downloaded. Raises IsADirectoryError if it is none."""
    if not staged.is_file():
        raise IsADirectoryError(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(staged, target)


def image_name(reference: str) -> str:
    """Return the name of the guest image for a container image: no two images have the same one."""
    slug = re.sub(r"[^a-z0-9._]+", "-", reference.lower().removeprefix("docker.io/").removeprefix("library/"))
    return f"{slug.strip('-._')[:40]}-{hashlib.sha256(reference.encode()).hexdigest()[:8]}"
