"""Facts about the host: architecture, paths, clocks, locks, processes."""
