"""The `gvisor` backend: gVisor's runtime `runsc`, without a container engine."""
