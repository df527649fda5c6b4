"""Job records: writing, reading, listing, stopping, sweeping and pruning them."""
