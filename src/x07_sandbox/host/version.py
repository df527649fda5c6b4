"""The version of this package, where every room may ask for it."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
