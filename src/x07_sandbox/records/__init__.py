"""Job records, labels, launching and stopping."""
