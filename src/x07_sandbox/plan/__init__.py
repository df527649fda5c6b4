"""Pure answers: controls, refusals, outcomes."""
