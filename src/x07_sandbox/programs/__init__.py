"""Toolchains and artifacts."""
