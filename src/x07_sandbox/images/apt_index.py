"""The host's apt package lists: known package names and versions.

On a host without package lists, nothing is looked up: mmdebstrap downloads lists, and reports unknown packages.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from x07_sandbox.errors import UsageError
from x07_sandbox.images import commands, sources

NEAR_MAX = 3
_NEAR = 0.75
_PYTHON = "python3-"


def write_sources(work: Path, suite: str, deb_arch: str, note: Callable[[str], None]) -> Path:
    """Write the apt sources of an image to a file in *work*, and return the file's path. Raises ImageError."""
    file = work / "build.sources"
    found = sources.host_sources(suite, deb_arch, note=note)
    file.write_text("\n".join(source.stanza() for source in found))
    return file


def check_known(file: Path, include: Sequence[str], suite: str) -> None:
    """Raise UsageError for the first package that no source in *file* has. The error suggests similar names."""
    known = package_names(file) if include else frozenset()
    if not known:
        return
    missing = (name for name in include if name not in known and not _has_provider(file, name))
    if name := next(missing, None):
        near = near_names(name, known)
        fixes = [f"Use one of these: {', '.join(near)}"] if near else ["Find it with apt-cache search"]
        fixes += [f"For the PyPI package, use --pip {name}"] if f"{_PYTHON}{name}" in known else []
        fixes.append("If it is new, run apt-get update")
        why = f"Debian {suite} has no package with this name"
        raise UsageError(f"cannot add {name!r} to an image", why, ". ".join(fixes))


def package_names(file: Path) -> frozenset[str]:
    """Return all package names in the host's lists for the sources in *file*. Return none if the host has no lists."""
    return frozenset(_cache(file, "pkgnames").split())


def versions(file: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages in *names* that the host's package lists contain."""
    wanted = [name for name in names if name in package_names(file)]
    if not wanted:
        return {}
    stanzas = sources.parse_deb822(_cache(file, "show", "--no-all-versions", *wanted))
    return {stanza["Package"]: stanza["Version"] for stanza in stanzas if {"Package", "Version"} <= stanza.keys()}


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the names in *known* that are closest to *name*, the most likely first."""
    known = set(known)
    likely = [each for each in (f"{_PYTHON}{name}", f"lib{name}-dev", f"lib{name}") if each in known]
    # Comparing all 70,000 names would be slow.
    similar = [each for each in known if abs(len(each) - len(name)) <= 2 and each[0] == name[0]]  # noqa: PLR2004
    near = likely + difflib.get_close_matches(name, sorted(similar), NEAR_MAX, _NEAR)
    return list(dict.fromkeys(near + near_projects(name, known, prefix=_PYTHON)))[:NEAR_MAX]


def near_projects(name: str, known: Iterable[str], *, prefix: str = "") -> list[str]:
    """Return the Python projects packaged in Debian that are closest to *name*, each with *prefix* before it."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    projects = sorted(each.removeprefix(_PYTHON) for each in known if each.startswith(_PYTHON))
    near = difflib.get_close_matches(name, projects, NEAR_MAX, _NEAR)
    return [prefix + each for each in sorted(near, key=lambda each: each[0] != name[0])]


def _has_provider(file: Path, name: str) -> bool:
    """Return whether *name* is a virtual package that another package provides."""
    return bool(_cache(file, "showpkg", name).partition("Reverse Provides:")[2].strip())


def _cache(file: Path, *words: str) -> str:
    options = [
        f"Dir::Etc::sourcelist={file}",
        "Dir::Etc::sourceparts=/dev/null",
        "Dir::State::status=/dev/null",  # ignore the packages installed on this host
        "Dir::Cache::pkgcache=",  # no cache: the sources differ from the host's
        "Dir::Cache::srcpkgcache=",
    ]
    argv = [commands.tool("apt-cache"), "-q", *(word for option in options for word in ("-o", option)), *words]
    return commands.capture(argv).decode(errors="replace")
