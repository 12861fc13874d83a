"""Finding what to ship by measuring it (L10)."""
