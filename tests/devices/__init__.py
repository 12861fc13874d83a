"""Devices to test on: real ones are rare, so these are built here, emulated (``make devices``)."""
