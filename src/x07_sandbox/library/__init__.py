"""Running programs from Python."""
