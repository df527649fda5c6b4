"""Code that runs inside the guest: agent, init, confinement; standard library only."""
