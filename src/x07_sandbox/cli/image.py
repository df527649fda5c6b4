"""`x07 image`: build, list, inspect and verify guest images."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from x07_sandbox.cli.console import Progress, say
from x07_sandbox.errors import SandboxError
from x07_sandbox.images.build import build_image
from x07_sandbox.images.store import find_image, image_is_current, list_images
from x07_sandbox.images.verify import verify_image
from x07_sandbox.runs.prepare import prepare_templates

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

_EXAMPLES = """examples:
  x07 image build                                make or renew the image `default`
  x07 image build --name science --include python3-numpy,python3-pandas
  x07 image verify                               read every byte again and compare
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb and its own verbs."""
    parser = verbs.add_parser(
        "image",
        help=help,
        description="Guest images: what programs run on. Made from this host's own package sources.",
        epilog=_EXAMPLES,
    )
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    build = inner.add_parser("build", help="make an image, or renew it when our guest code has changed")
    build.add_argument("--name", default="default", help="its name (default: default)")
    build.add_argument("--include", action="append", default=[], metavar="PKG,...", help="further Debian packages")
    build.add_argument("--fresh", action="store_true", help="fetch all packages again, to take in updates")
    build.set_defaults(carry_out=_build)
    listing = inner.add_parser("list", help="the images that are here")
    listing.set_defaults(carry_out=_list)
    inspect = inner.add_parser("inspect", help="the manifest of an image")
    verify = inner.add_parser("verify", help="read every byte of an image and compare with its manifest")
    for sub, action in ((inspect, _inspect), (verify, _verify)):
        sub.add_argument("image", nargs="?", metavar="NAME|DIGEST", help="which one (default: default)")
        sub.set_defaults(carry_out=action)
    for sub in (build, listing, verify):
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")


def build_with_progress(name: str, include: list[str], *, fresh: bool = False) -> Image:
    """Build an image, telling the user how far it is."""
    progress = Progress(f"image {name}")
    image = build_image(name=name, include=include, progress=progress, fresh=fresh)
    try:
        prepare_templates(image, progress)
    except SandboxError as exc:  # the image is good all the same; a run says it again
        progress.done(f"no VM templates: {exc}")
    progress.done(f"ready: {image.digest}")
    return image


def _build(options: argparse.Namespace) -> int:
    include = sorted({package.strip() for chunk in options.include for package in chunk.split(",") if package.strip()})
    image = build_with_progress(options.name, include, fresh=options.fresh)
    if options.json:
        _print({"name": image.name, "digest": image.digest})
    return 0


def _list(options: argparse.Namespace) -> int:
    rows = [
        {"name": image.name, "digest": image.digest, "suite": image.manifest.suite, "current": image_is_current(image)}
        for image in list_images()
    ]
    if options.json:
        _print({"images": rows})
        return 0
    if not rows:
        say("no images yet: run x07 image build")
    for row in rows:
        note = "" if row["current"] else "  (of another version of x07-sandbox: run x07 image build)"
        sys.stdout.write(f"{row['name'] or '-':<16} {row['digest']}  {row['suite']}{note}\n")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    image = find_image(options.image)
    sys.stdout.write((image.folder / "manifest.json").read_text(encoding="utf-8"))
    return 0


def _verify(options: argparse.Namespace) -> int:
    image = find_image(options.image)
    problems = verify_image(image)
    if options.json:
        _print({"digest": image.digest, "good": not problems, "problems": problems})
    elif problems:
        for problem in problems:
            say(problem)
        say("the image is damaged: run x07 image build --fresh")
    else:
        sys.stdout.write(f"{image.digest} is what its manifest says\n")
    return 1 if problems else 0


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
