"""Decisions on network connections, and the egress gate that enforces them."""
