"""Machines that are started in advance and wait for a run."""
