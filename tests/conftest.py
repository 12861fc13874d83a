"""What every test run needs, whoever starts it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from tests import graphs

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test is held to a clock: the machine may be busy.
hypothesis.settings.register_profile("edgeq", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("edgeq")


@pytest.fixture(autouse=True)
def _own_numbers(request: pytest.FixtureRequest) -> None:
    """No test's numbers depend on which tests ran before it."""
    graphs.start_test(request.node.nodeid)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; in CI, where there must be one, a test fails without it."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no Chromium: make browser")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package is known from an earlier test, or from the user's own."""
    monkeypatch.setenv("EDGEQ_STATE", str(tmp_path_factory.mktemp("state")))
