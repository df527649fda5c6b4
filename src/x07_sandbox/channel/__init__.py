"""Frames and connection between host and guest agent; standard library only."""
