"""What may be removed of state and cache, and its removal."""
