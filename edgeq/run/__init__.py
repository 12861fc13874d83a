"""Running a model anywhere: samples, sessions, timing (L4)."""
