"""Files that go into a machine, as copies, and come out of it as changes."""
