"""What only callers of X07 need: its programs and projects, its protocol, its reports."""
