"""The error that the agent reports to the host."""

from __future__ import annotations


class JobError(Exception):
    """The job failed. The args are the stage, the errno (or 0) and a message. The host gets them in a FAILED frame."""
