"""One list of behaviours that every backend is held to, and running it."""
