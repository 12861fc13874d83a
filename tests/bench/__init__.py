"""Benchmarks against the peers, run by hand: ratios measured in one run on one machine, never compared across runs."""
