"""Prepared machines that wait: kept warm, handed out, and made into an executor."""
