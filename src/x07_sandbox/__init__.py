"""Run a program that nobody trusts inside a throw-away virtual machine."""

__version__ = "0.1.0.dev0"
