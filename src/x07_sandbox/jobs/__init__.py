"""Job records, labels, launching, stopping."""
