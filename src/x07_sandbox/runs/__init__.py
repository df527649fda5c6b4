"""Request, build, execute, result: the only room that sees all below it."""
