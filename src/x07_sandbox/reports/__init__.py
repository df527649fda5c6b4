"""JSON documents: the result of a run, and the reports of other commands."""
