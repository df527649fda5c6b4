"""What `x07 image build`, `list`, `load`, `rm` and `verify` print with --json.

`x07 image inspect` prints the image's manifest.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class BuildReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that is there now."""

    schema_version: Literal["x07.sandbox.image.build@0.1.0"] = "x07.sandbox.image.build@0.1.0"
    name: str
    digest: str


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `x07 image load` has loaded. digest: the image id, by which engines know it. image: that of `image list`.

    engines: those that have it. archive: the file that was written, null for none.
    """

    schema_version: Literal["x07.sandbox.image.load@0.1.0"] = "x07.sandbox.image.load@0.1.0"
    reference: str
    digest: str
    image: str
    engines: tuple[str, ...]
    archive: str | None


class ImageRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image. name: empty for none. suite: of its packages; null where its manifest cannot be read.

    pip: Python packages from wheels, "NAME==VERSION". current: whether this version made it. problem, fix: null where
    it can be used as it is.
    """

    name: str
    digest: str
    suite: str | None
    pip: tuple[str, ...]
    current: bool
    problem: str | None
    fix: str | None


class ListReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All images that are here."""

    schema_version: Literal["x07.sandbox.image.list@0.1.0"] = "x07.sandbox.image.list@0.1.0"
    images: tuple[ImageRow, ...]


class RemovedName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name that leads to no image any more, and the image that it led to."""

    name: str
    digest: str


class RemoveReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `x07 image rm` did. bytes: what the disk got back. kept: files that could not be removed, and why."""

    schema_version: Literal["x07.sandbox.image.rm@0.1.0"] = "x07.sandbox.image.rm@0.1.0"
    images: tuple[RemovedName, ...]
    bytes: int
    kept: tuple[str, ...]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether an image is what its manifest says. problems: a sentence each. fix: what to do; null if it is good."""

    schema_version: Literal["x07.sandbox.image.verify@0.1.0"] = "x07.sandbox.image.verify@0.1.0"
    digest: str
    good: bool
    problems: tuple[str, ...]
    fix: str | None
