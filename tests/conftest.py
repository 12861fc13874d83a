"""What every test run needs, whoever starts it."""

from __future__ import annotations

import signal

import pytest

from tests import graphs

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_numbers(request: pytest.FixtureRequest) -> None:
    """No test's numbers depend on which tests ran before it."""
    graphs.start_test(request.node.nodeid)


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package is known from an earlier test, or from the user's own."""
    monkeypatch.setenv("EDGEQ_STATE", str(tmp_path_factory.mktemp("state")))
