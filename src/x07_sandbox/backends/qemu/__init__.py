"""The embedded Linux backend: QEMU, with hardware virtualisation or with emulation."""
