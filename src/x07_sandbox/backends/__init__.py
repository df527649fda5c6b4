"""Ways to start a job: the contract, one folder per backend, selection."""
