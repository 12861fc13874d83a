"""Pages as a reader meets them: opened in a real Chromium, without a network, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgeq
from edgeq.report import html
from tests import small_net
from tests.test_report import FULL

pytestmark = pytest.mark.slow

DESK, PHONE = 1280, 390  # pixels of width
SECONDS = 180  # until a page is drawn: 41 were seen on two cores with twenty processes, few on idle ones
PAGES = ("report", "advice", "every part")
# Shapes that plotly draws values with, by the figure's id; an empty plot has axes too.
MARKS = {
    "size": ".bars .point path", "coverage": ".bars .point path", "latency": "path.box", "layers": ".bars .point path",
    "values": ".bars .point path", "predicted": ".scatter .point",
}  # fmt: skip
SIZES = "all => all.map((one) => one.getBoundingClientRect()).map((box) => Math.max(box.width, box.height))"
BEYOND = """all => all.filter((one) => !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1)
    .map((one) => one.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package's report, advice, and a report with every part and hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    model, calibration, evaluation = small_net.write(folder, samples=8)
    edgeq.export(model, out=folder / "net.edgeq", calibration=str(calibration), evaluation=str(evaluation), threads=[1])
    edgeq.advise(model, calibration=str(calibration), html=folder / "advice.html")
    (folder / "full.html").write_text(html.render(FULL), encoding="utf-8")
    files = (folder / "net.edgeq" / "report.html", folder / "advice.html", folder / "full.html")
    return dict(zip(PAGES, files, strict=True))


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """``opened(name, width)`` -> the page with its figures drawn; what went wrong in it fails the test at its end."""
    wrong: list[str] = []
    context = browser.new_context(offline=True)
    context.set_default_timeout(SECONDS * 1000)

    def show(name: str, width: int = DESK) -> Any:
        page, address = context.new_page(), pages[name].as_uri()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("request", lambda request: request.url != address and wrong.append(f"request: {request.url}"))
        page.goto(address)
        page.wait_for_function(
            "[...document.querySelectorAll('.chart')].every((one) => one.querySelector('.main-svg'))"
        )
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        return page

    yield show
    context.close()
    assert wrong == []


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_drawn_and_nothing_runs_out_of_the_page(opened: Any, name: str, width: int) -> None:
    page = opened(name, width)
    charts = page.eval_on_selector_all(".chart", "all => all.map((one) => one.id)")
    assert len(charts) >= 2
    for chart in charts:
        sizes = page.eval_on_selector_all(f"#{chart} {MARKS[chart]}", SIZES)
        assert sizes and max(sizes) > 4, f"{chart} shows nothing"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.eval_on_selector_all("body *", BEYOND) == []


@pytest.mark.parametrize("name", PAGES)
def test_tables_sort_by_every_column(opened: Any, name: str) -> None:
    """Up, then down: numbers by size with infinity at an end, words by the alphabet, gaps last either way."""
    page = opened(name)
    sorted_by = """(button) => {
        const head = button.parentElement, column = head.cellIndex, table = head.closest("table");
        button.click();
        return [head.ariaSort, [...table.tBodies[0].rows].map((row) => row.cells[column]).map((cell) =>
            [cell.textContent, cell.classList.contains("number") ? String(Number(cell.dataset.value)) : null])];
    }"""
    columns, buttons = 0, page.query_selector_all("th button")
    for button in buttons:
        for way in ("ascending", "descending"):
            told, cells = button.evaluate(sorted_by)
            assert told == way
            given = [float(value) for text, value in cells if value is not None]
            assert given == sorted(given, reverse=way == "descending")
            filled = [text != "" for text, _ in cells]
            assert filled == sorted(filled, reverse=True)
            columns += len(set(given)) > 1
    assert columns >= 6  # of numbers that differ, each way


def test_the_menu_shows_the_histogram_of_the_tensor_it_names(opened: Any) -> None:
    page = opened("advice", PHONE)
    first = page.inner_html("#values .barlayer")
    menu = page.locator("select")
    names = menu.locator("option").all_text_contents()
    assert {"w0", "image"} <= set(names)
    menu.select_option("image")
    assert page.inner_html("#values .barlayer") != first
    shown = page.evaluate("document.getElementById('values').data.filter((one) => one.visible).map((one) => one.name)")
    assert shown == ["image"]
    page.emulate_media(color_scheme="dark")  # drawn anew, with the same histogram
    tick = "getComputedStyle(document.querySelector('#values .xtick text') ?? document.body)"
    page.wait_for_function(f"{tick}.fill === 'rgb(230, 234, 239)'")
    assert page.evaluate("document.getElementById('values').data.filter((one) => one.visible).length") == 1
