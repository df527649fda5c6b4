"""What the agent cannot do, as told to the host."""

from __future__ import annotations


class JobError(Exception):
    """The job cannot be carried out: stage, errno, message; told to the host as FAILED."""
