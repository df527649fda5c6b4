"""Listing and removal of unused state and cache files."""
