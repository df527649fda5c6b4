"""Sessions with a guest agent, and what is made of them: runs, builds and sandboxes, from the request to the result."""
