"""podman and docker: a job in a container of the host's kernel."""
