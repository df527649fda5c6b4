"""Ways to confine a host process."""
