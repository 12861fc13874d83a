"""Tests as a package, so that ``tests.zoo`` names its models and data by import path."""
