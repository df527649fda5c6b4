"""Support for callers of X07, the language: its programs and projects, its protocol and its reports."""
