"""Running a model anywhere: samples, runners, timing (L4)."""
