"""The form web, opened in a real Chromium: it runs, answers as Python does, works without a network, refuses damage."""

from __future__ import annotations

import io as bytes_io
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from edgeq.cli import main
from edgeq.packaging import PACKAGES, create_key, loader, read_public, verify_package
from edgeq.packaging.directory import combined
from edgeq.run.preprocess import INTERPOLATIONS, Preprocessing
from tests.packaged import classifier, picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """node_modules with onnxruntime-web, installed from a package's own package.json."""
    if shutil.which("npm") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no npm: make browser")
    folder = tmp_path_factory.mktemp("npm")
    out = PACKAGES["web"](classifier(folder / "made"), folder / "web")
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"], cwd=out, check=True
    )
    return out / "node_modules"


class _Server(ThreadingHTTPServer):
    daemon_threads = True


@pytest.fixture
def served(tmp_path: Path, runtime: Path) -> Iterator[Any]:
    """``served(package)`` -> the folder of the form web and its address; ``served.server`` can be stopped."""
    servers: list[_Server] = []

    def serve(package: Any) -> tuple[Path, str]:
        out = PACKAGES["web"](package, tmp_path / f"web{len(servers)}")
        (out / "node_modules").symlink_to(runtime)
        handler = partial(_Quiet, directory=str(out))
        servers.append(_Server(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return out, f"http://localhost:{servers[-1].server_port}/"

    serve.servers = servers  # type: ignore[attr-defined]
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map: ClassVar = {  # type: ignore[misc]
        **SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm",
    }  # fmt: skip

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


def _status(page: Any) -> str:
    page.wait_for_function("document.getElementById('status').className")
    return str(page.inner_text("#status"))


def test_the_page_checks_itself_and_answers_as_python_does(served: Any, page: Any, tmp_path: Path) -> None:
    package = classifier(tmp_path / "made")
    out, address = served(package)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("request", lambda request: request.url.startswith((address, "blob:", "data:")) or wrong.append(request.url))
    page.goto(address)
    assert _status(page) == "Checked: every digest and the golden runs. Running 'cpu'."
    stored = bytes_io.BytesIO()
    Image.fromarray(picture()).save(stored, "PNG")
    page.set_input_files("#file", {"name": "one.png", "mimeType": "image/png", "buffer": stored.getvalue()})
    page.wait_for_function("document.querySelectorAll('#answers tr').length")
    (expected,) = loader.pipeline(out / "package")(picture())
    found = [row.split("\t") for row in page.inner_text("#answers").splitlines()]
    assert found == [[row["label"], f"{row['score']:.3f}"] for row in expected]
    assert "The picture stayed on this device" in _status(page)
    assert wrong == []


def test_it_works_without_a_network(served: Any, page: Any, tmp_path: Path) -> None:
    _, address = served(classifier(tmp_path / "made"))
    page.goto(address)
    assert "Checked" in _status(page)
    page.evaluate("navigator.serviceWorker.ready.then(() => true)")
    served.servers[0].shutdown()
    served.servers[0].server_close()
    page.goto(address)
    assert "Checked" in _status(page)


@pytest.mark.parametrize("victim", ["model.onnx", "golden.bin", "manifest.json"])
def test_a_flipped_byte_is_refused_on_screen(served: Any, page: Any, tmp_path: Path, victim: str) -> None:
    out, address = served(classifier(tmp_path / "made"))
    path = out / "package" / victim
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    page.goto(address)
    assert _status(page).startswith(f"Refused: {victim} is altered")
    assert page.evaluate("document.getElementById('status').className") == "bad"
    assert page.is_hidden("#tools")


def test_variants_fall_back_and_a_result_is_remembered(served: Any, page: Any, tmp_path: Path) -> None:
    package = classifier(tmp_path / "made")
    target = {**package.report.target, "name": "npu", "provider": "QNNExecutionProvider"}
    _, address = served(combined([replace(package, report=replace(package.report, target=target)), package]))
    for _ in range(2):
        page.goto(address)
        assert "Running 'cpu'. 'npu' isn't used: browsers have no QNNExecutionProvider" in _status(page)
    runs = page.evaluate("Object.values(localStorage).map((text) => JSON.parse(text).variant)")
    assert runs == ["cpu"]


def test_other_results_and_other_keys_are_refused(served: Any, page: Any, tmp_path: Path) -> None:
    create_key(tmp_path / "team.pem")
    trusted = read_public(tmp_path / "team.pem.pub")
    package = classifier(tmp_path / "made")
    outputs = tuple({"logits": one["logits"] + np.float32(1)} for one in package.golden.outputs)
    _, address = served(replace(package, golden=replace(package.golden, outputs=outputs)))
    page.goto(address)
    assert "'logits' differs from golden sample 0 by more than 0.001" in _status(page)
    _, address = served(replace(package, key=tmp_path / "team.pem"))
    page.goto(address)
    assert "Checked" in _status(page)
    load = """async (key) => { const ort = await import("./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs");
        const { load } = await import("./edgeq.mjs");
        return load({ ort, trust: Uint8Array.from(key) }).then((model) => model.variant, (fault) => fault.message); }"""
    assert page.evaluate(load, list(trusted)) == "cpu"
    assert "no signature" in page.evaluate(load, list(trusted[::-1]))


def test_pictures_become_the_same_bits_in_javascript(served: Any, page: Any, tmp_path: Path) -> None:
    _, address = served(classifier(tmp_path / "made"))
    page.goto(address)
    script = """async ([pixels, height, width, how]) => { const { preprocess } = await import("./pictures.mjs");
        const data = new Uint8ClampedArray(height * width * 4).fill(255);
        pixels.forEach((value, i) => { data[Math.trunc(i / 3) * 4 + i % 3] = value; });
        const made = preprocess({ data, height, width }, how);
        return [Array.from(made.data), made.dims, made.dtype]; }"""
    random = np.random.default_rng(0)
    for trial in range(40):
        height, width = (int(side) for side in random.integers(1, 40, 2))
        pixels = picture(height, width, seed=trial)
        channels = ["RGB", "BGR", "L"][trial % 3]
        how = Preprocessing(
            resize=[None, int(random.integers(1, 30)), (int(random.integers(1, 30)), int(random.integers(1, 30)))][
                trial // 3 % 3
            ],
            crop=None if trial % 2 else (int(random.integers(1, 40)), int(random.integers(1, 40))),
            interpolation=sorted(INTERPOLATIONS)[trial % 6],
            mean=(0.4,) if channels == "L" else (0.4, 0.5, 0.6),
            std=(0.2,) if channels == "L" else (0.2, 0.3, 0.1),
            layout="NCHW" if trial % 5 else "NHWC",
            channels=channels,
        )
        if trial % 7 == 3:
            how = replace(how, scale=1.0, mean=(0.0,), std=(1.0,), dtype="uint8")
        values, dims, dtype = page.evaluate(script, [pixels.ravel().tolist(), height, width, how.to_dict()])
        expected = loader.preprocess(pixels, how.to_dict())
        np.testing.assert_array_equal(np.array(values, dtype).reshape(dims), expected, str(how), strict=True)


def test_the_command_line_writes_and_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = PACKAGES["dir"](classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    out = tmp_path / "web"
    assert main(["package", str(folder), "--form", "web", "-o", str(out)]) == 0
    assert json.loads((out / "package.json").read_text())["name"] == "net"
    verify_package(out)
    assert main(["package", str(out), "-o", str(tmp_path / "back")]) == 0
    assert main(["package", str(folder), "--form", "web", "-o", str(out), "--force"]) == 0
