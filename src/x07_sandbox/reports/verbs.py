"""The documents of `x07 init`, `policy init`, `image` and `pool`."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from x07_sandbox.images.manifest import ProgramRoot
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.programs.project import ROWS, Status

_TOOLCHAINS: Final = sorted([*(row.name for row in ROWS), "x07"])


class InitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 init --json`: one line, with its keys in this order.

    out: the name of the file in the project's folder.
    """

    schema_version: Literal["x07.sandbox.init.report@0.1.0"] = "x07.sandbox.init.report@0.1.0"
    toolchain: Annotated[str, Meta(extra_json_schema={"enum": _TOOLCHAINS})]
    project_root: str
    out: str
    status: Status


class PolicyInitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of `x07 policy init`: one line, with its keys in this order.

    out: the policy's path, relative to the project's folder if it is inside that folder.
    """

    schema_version: Literal["x07.policy.init.report@0.1.0"] = "x07.policy.init.report@0.1.0"
    template: Annotated[str, Meta(extra_json_schema={"enum": sorted(TEMPLATES)})]
    project_root: str
    out: str
    status: Status
    policy_id: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class BuildReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that was built."""

    schema_version: Literal["x07.sandbox.image.build@0.1.0"] = "x07.sandbox.image.build@0.1.0"
    name: str
    digest: str


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that was loaded, and the container engines that have it now.

    digest: the image id in the engines. image: the digest in `x07 image list`. archive: the file written, or null.
    """

    schema_version: Literal["x07.sandbox.image.load@0.1.0"] = "x07.sandbox.image.load@0.1.0"
    reference: str
    digest: str
    image: str
    engines: tuple[str, ...]
    archive: str | None


class ImageRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image.

    name: empty if the image has no name.
    suite: the Debian suite of its packages; null if its manifest cannot be read.
    arch: its architecture, as uname -m prints it; null as above.
    include: Debian packages beyond the usual ones (`--include`).
    pip: Python packages that were installed from wheels, as "NAME==VERSION".
    program: what a container image says about its programs, if the image was imported; else null.
    current: whether this version of x07 built the image.
    problem, fix: null if the image can be used.
    bytes: the disk space of the files that only this image has. saved_bytes: that of its saved VMs.
    """

    name: str
    digest: str
    suite: str | None
    arch: str | None
    include: tuple[str, ...]
    pip: tuple[str, ...]
    program: ProgramRoot | None
    current: bool
    problem: str | None
    fix: str | None
    bytes: int = 0
    saved_bytes: int = 0


class ListReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The images of this user. bytes: the disk space of all images and saved VMs, with the files that images share."""

    schema_version: Literal["x07.sandbox.image.list@0.1.0"] = "x07.sandbox.image.list@0.1.0"
    images: tuple[ImageRow, ...]
    bytes: int


class RemovedName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A removed name, and the digest of the image that had this name."""

    name: str
    digest: str


class RemoveReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The removed images. bytes: freed disk space. kept: files that could not be removed, each with the reason."""

    schema_version: Literal["x07.sandbox.image.rm@0.1.0"] = "x07.sandbox.image.rm@0.1.0"
    images: tuple[RemovedName, ...]
    bytes: int
    kept: tuple[str, ...]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether an image matches its manifest. problems: the differences as sentences. fix: null if the image is good."""

    schema_version: Literal["x07.sandbox.image.verify@0.1.0"] = "x07.sandbox.image.verify@0.1.0"
    digest: str
    good: bool
    problems: tuple[str, ...]
    fix: str | None


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The status that the pool reports.

    size: how many VMs should be ready.
    ready, running: how many VMs are ready and how many run a program now.
    claimed: how many VMs have been used since the pool started.
    image: digest of the image.
    idle_s: the pool ends after this many seconds without use.
    unused_s: seconds since the last use.
    problem: why no VM can be started now, or null.
    """

    pid: int
    size: int
    ready: int
    running: int
    claimed: int
    image: str
    idle_s: float
    unused_s: float
    problem: str | None


class PoolReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `x07 pool ACTION --json`. pool: null if no pool is running."""

    schema_version: Literal["x07.sandbox.pool@0.1.0"] = "x07.sandbox.pool@0.1.0"
    pool: PoolStatus | None
