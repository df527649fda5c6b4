"""The macOS backend: a virtual machine of Apple's Virtualization framework, started by our helper program."""
