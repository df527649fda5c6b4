"""The commands `x07` and `x07-os-runner`: one module per verb, output and exit codes."""
