"""Code that runs inside the guest: the agent, init and confinement. It uses only the standard library."""
