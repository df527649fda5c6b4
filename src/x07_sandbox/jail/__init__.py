"""One way to confine a host process."""
