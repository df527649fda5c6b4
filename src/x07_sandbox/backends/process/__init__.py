"""The two backends without a virtual machine: a confined process of this host, and an unconfined one."""
