"""Which connections a policy allows: decided here without I/O. No other room decides about hosts."""
