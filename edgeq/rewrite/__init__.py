"""(Model, facts) -> Model, never in place: a file an idea (L6)."""
