"""Toolchains, project manifests and the artifact cache."""
