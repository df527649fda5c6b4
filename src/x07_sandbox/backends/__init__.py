"""Backends, which start jobs: their contract, one folder for each, and the selection."""
