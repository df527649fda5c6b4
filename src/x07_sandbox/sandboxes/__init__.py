"""Sandboxes: the session with a guest agent, and the commands in it."""
