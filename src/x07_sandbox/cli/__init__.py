"""Both commands: one module per verb, rendering, exit codes."""
