"""The two backends without a virtual machine: a confined process on this host, and an unconfined process."""
