"""The error that the agent reports to the host."""

from __future__ import annotations


class JobError(Exception):
    """The job failed: stage, errno (or 0) and message, as args; sent to the host as FAILED."""
