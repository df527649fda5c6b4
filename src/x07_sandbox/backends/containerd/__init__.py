"""The backends that start containers by containerd: `containerd`, and `firecracker-ctr` in virtual machines."""
