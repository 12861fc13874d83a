"""Model x Target -> Artifact: legalize, fuse, emit (L7)."""
