"""podman and docker: jobs in containers, which use the host's kernel."""
