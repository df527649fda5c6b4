"""Benchmarks of runs, compared with the time that QEMU itself needs and with other tools."""
