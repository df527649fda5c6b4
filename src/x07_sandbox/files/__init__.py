"""Copying of files into a VM, and the changes that come back."""
