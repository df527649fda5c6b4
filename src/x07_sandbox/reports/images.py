"""The documents of `x07 image build`, `list`, `load`, `rm` and `verify`."""

from __future__ import annotations

from typing import Literal

import msgspec


class BuildReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that was built."""

    schema_version: Literal["x07.sandbox.image.build@0.1.0"] = "x07.sandbox.image.build@0.1.0"
    name: str
    digest: str


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was loaded. digest: the image id in the engines. image: its digest in `image list`.

    engines: those that have it now. archive: the file that was written, or null.
    """

    schema_version: Literal["x07.sandbox.image.load@0.1.0"] = "x07.sandbox.image.load@0.1.0"
    reference: str
    digest: str
    image: str
    engines: tuple[str, ...]
    archive: str | None


class ImageRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image. name: empty if it has none. suite: of its packages; null if its manifest cannot be read.

    pip: Python packages from wheels, "NAME==VERSION". current: whether this version built it. problem, fix: null if it
    can be used.
    """

    name: str
    digest: str
    suite: str | None
    pip: tuple[str, ...]
    current: bool
    problem: str | None
    fix: str | None


class ListReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All images."""

    schema_version: Literal["x07.sandbox.image.list@0.1.0"] = "x07.sandbox.image.list@0.1.0"
    images: tuple[ImageRow, ...]


class RemovedName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A removed name, and the digest of its image."""

    name: str
    digest: str


class RemoveReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was removed. bytes: freed disk space. kept: files that could not be removed, and why."""

    schema_version: Literal["x07.sandbox.image.rm@0.1.0"] = "x07.sandbox.image.rm@0.1.0"
    images: tuple[RemovedName, ...]
    bytes: int
    kept: tuple[str, ...]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether an image matches its manifest. problems: a sentence each. fix: what to do; null if it is good."""

    schema_version: Literal["x07.sandbox.image.verify@0.1.0"] = "x07.sandbox.image.verify@0.1.0"
    digest: str
    good: bool
    problems: tuple[str, ...]
    fix: str | None
