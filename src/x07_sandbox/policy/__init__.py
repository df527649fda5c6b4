"""The policy document, and what follows from it: controls, confinement, denials, hints and outcomes. No I/O."""
