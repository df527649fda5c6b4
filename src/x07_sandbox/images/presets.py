"""Presets of `x07 image build --preset`: named lists of packages for common uses of an image."""

from __future__ import annotations

from typing import Final, NamedTuple

from x07_sandbox.errors import UsageError


class Preset(NamedTuple):
    """A preset. include, pip, preload: see `build_image`. An image does not know the preset that it was built with."""

    name: str
    about: str
    include: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()


_TOOLS: Final = (
    *("git", "curl", "ca-certificates", "ripgrep", "jq", "procps", "less", "nano", "unzip", "zip", "xz-utils", "file"),
    *("tree", "patch", "sqlite3", "python-is-python3", "python3-pip", "python3-venv", "nodejs", "npm"),
)
PRESETS: Final = {
    one.name: one
    for one in (
        Preset(
            "agent",
            "tools that coding agents use: git, curl, ripgrep, jq, sqlite3, Python with pip and venv, Node with npm",
            include=_TOOLS,
        ),
        Preset(
            "data",
            "tables, plots and a notebook's kernel: numpy, pandas, matplotlib, pyarrow, ipykernel; the first three are "
            "imported beforehand",
            pip=("numpy", "pandas", "matplotlib", "pyarrow", "ipykernel"),
            preload=("numpy", "pandas", "matplotlib.pyplot"),
        ),
    )
}


def preset_named(name: str) -> Preset:
    """Return the preset with this name. Raises UsageError."""
    if name not in PRESETS:
        raise UsageError(f"cannot build the preset {name!r}", "there is no such preset", f"Use {' or '.join(PRESETS)}")
    return PRESETS[name]
