"""Runs of programs, from the request to the result."""
