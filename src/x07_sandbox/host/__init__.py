"""The host: architecture, paths, clocks, locks, processes."""
