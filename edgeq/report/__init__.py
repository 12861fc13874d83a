"""What a run found out: the record and its views (L0)."""
