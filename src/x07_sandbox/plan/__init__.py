"""Pure functions that decide on controls, refusals and outcomes."""
