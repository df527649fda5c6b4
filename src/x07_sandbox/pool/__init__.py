"""Prepared machines that wait for a run: how they are kept warm, handed out, and used by an executor."""
