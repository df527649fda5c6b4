"""firecracker-containerd: jobs in microVMs of Firecracker, started through containerd."""
