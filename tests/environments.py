"""Python environments of their own that tests need: ``python -m tests.environments [TARGET …]`` makes those of all
shipped targets, or of these."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgeq.target.environment import commands, python_in
from edgeq.target.load import list_targets, load_target
from edgeq.target.record import Target


def make(target: Target) -> None:
    """The environment of ``target``, where it has one that isn't there yet."""
    if target.environment and not python_in(target.environment).is_file():
        for command in commands(target.environment, target.packages):
            subprocess.run(command, check=True)


def needed(name: str) -> Target:
    """The target called ``name``; the test is skipped where its environment isn't there."""
    target = load_target(name)
    if not python_in(target.environment).is_file():
        pytest.skip(f"no Python environment {target.environment!r}: make environments")
    return target


if __name__ == "__main__":
    for one in map(load_target, sys.argv[1:]) if sys.argv[1:] else list_targets():
        make(one)
