"""What is possible on a device: targets from TOML, and the oracle that asks the installed runtime (L3)."""
