"""The Python API: runs of programs, and pools."""
