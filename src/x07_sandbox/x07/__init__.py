"""What only X07's callers need: its programs and projects, its protocol, its reports."""
