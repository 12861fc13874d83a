"""Model -> facts. Nothing here edits a model (L5)."""
