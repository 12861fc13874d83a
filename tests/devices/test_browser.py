"""Chromium as a device: WebAssembly and WebGPU compute what the CPU does, what is wrong there is refused by name."""

from __future__ import annotations

import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgeq import examine
from edgeq.cli import main
from edgeq.errors import DeviceError, ModelError, RuntimeUnavailableError, UsageError
from edgeq.ir import io
from edgeq.packaging import PACKAGES
from edgeq.report.codec import from_json
from edgeq.run.device import measure, open_device, web
from edgeq.run.record import Feed
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig
from tests import packaged, small_net
from tests.devices.models import integer, noise, zoo
from tests.graphs import graph, normal

GPU = "web://webgpu?adapter=swiftshader"
Net = tuple[TimedConfig, list[Feed], Path]


@pytest.fixture(autouse=True, scope="module")
def _browser() -> None:
    """Skips where there is no browser or no onnxruntime-web; in CI, where they must be, fails."""
    try:
        web.distribution()
        lacking = "" if any(map(shutil.which, web.CHROMIUMS)) else "no Chromium"
    except RuntimeUnavailableError as error:
        lacking = error.message
    if lacking:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{lacking} (make devices)")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    """small_net in integers, two samples, the float file."""
    folder = tmp_path_factory.mktemp("net")
    model, calibration, _ = small_net.write(folder)
    return integer(str(model), str(calibration), "web-wasm", folder)


def farthest(address: str, net: Net) -> float:
    """The largest ``noise`` of an output there against the CPU's of this machine."""
    config, feeds, _ = net
    here = open_session(config.path)
    with open_device(address) as device:
        runs = list(measure.outputs(device, TimedConfig("int8", config.path), feeds))
    ours = [run_session(here, feed) for feed in feeds]
    return max(noise(found[key], own[key]) for (_, found), own in zip(runs, ours, strict=True) for key in own)


@pytest.mark.slow
def test_webassembly_computes_integers_to_the_bit(net: Net) -> None:
    assert farthest("web://wasm", net) == 0


@pytest.mark.slow
def test_webgpu_computes_what_the_cpu_does(net: Net) -> None:
    """Within what quantization itself does: on a GPU sums are rounded in another order, so a code may be the next."""
    config, feeds, reference = net
    here, exact = open_session(config.path), open_session(reference)
    own = noise(run_session(here, feeds[0])["logits"], run_session(exact, feeds[0])["logits"])
    assert farthest(GPU, (config, feeds[:1], reference)) < own


@pytest.mark.slow
def test_the_build_with_wrong_integers_is_refused_and_really_wrong(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"ort\.all\.min\.mjs is the JSEP build"):
        open_device(f"{GPU}&build=ort.all.min.mjs")
    monkeypatch.setattr(web, "JSEP", "nothing")
    config, feeds, reference = net
    assert farthest(f"{GPU}&build=ort.all.min.mjs", (config, feeds[:1], reference)) > 0.1


@pytest.mark.slow
def test_a_package_is_measured_in_a_browser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    from edgeq.validator import validate

    monkeypatch.setattr(examine, "measure", partial(validate, max_seconds=0.5))
    model, _, evaluation = small_net.write(tmp_path)
    package = PACKAGES["dir"](packaged.classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    words = ["validate", str(package), "-c", str(evaluation), "--reference", str(model), "--on", "web://wasm"]
    assert main([*words, "--threads", "1", "--sustained", "1", "--divergence", "--json", "-q"]) == 0
    report = from_json(capsys.readouterr().out)
    assert report.check("sustained_ratio").value > 0 and len(report.sustained["windows"]) == 12
    assert [notice.message for notice in report.notices if notice.code == "no-energy"] == [
        "web://wasm tells no energy: a browser shows no energy"
    ]
    assert report.check("diverging_nodes").value == 0
    assert report.check("golden").value == 0 and report.check("top1_drop").value == 0
    assert report.check("load_ms").value > 0 and report.latency["artifact"]["1"]["p99_ms"] > 0
    assert report.environment["device"]["system"].startswith("HeadlessChrome/")
    assert "peak_memory_bytes" not in {check.name for check in report.checks}, "a page doesn't know it"


@pytest.mark.slow
def test_failures_in_a_browser_are_told(tmp_path: Path, net: Net) -> None:
    config, feeds, _ = net
    with open_device("web://wasm") as device:
        io.write(graph("(float[n] x) => (float[n] y) { y = Odd(x) }"), tmp_path / "odd.onnx")
        with pytest.raises(ModelError, match="odd can't be loaded"):
            measure.measure_memory(device, TimedConfig("odd", tmp_path / "odd.onnx"), {"x": normal(2)}, repeats=1)
        with pytest.raises(ModelError, match="int8 fails while running"):
            list(measure.outputs(device, config, [{"image": normal(1, 3, 5, 5)}]))
        (model,) = device._folder.glob("files/*/int8.onnx")  # type: ignore[attr-defined]
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
        with pytest.raises(DeviceError, match=r"int8\.onnx isn't what was sent"):
            list(measure.outputs(device, config, feeds))
        device._chromium.kill()  # type: ignore[attr-defined]
        with pytest.raises(DeviceError, match="says nothing"):
            list(measure.outputs(device, config, feeds))


@pytest.mark.slow
def test_a_browser_that_a_person_opens_computes_the_same_and_strangers_get_nothing(
    net: Net, browser: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The person is this test, the phone a Chromium of its own that accepts the certificate as a person would."""
    config, feeds, _ = net
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_device, "web://wasm?browser=phone")
        told = ""
        while "SHA-256" not in told and not opening.done():
            told += capfd.readouterr().err
            time.sleep(0.1)
        (url,) = re.findall(r"https://\S+", told)
        own = browser.new_context(ignore_https_errors=True)
        stranger = browser.new_context(ignore_https_errors=True)
        try:
            assert stranger.request.get(url.partition("?")[0]).status == 403
            assert stranger.request.get(f"{url}x").status == 403
            with pytest.raises(Exception, match="ERR_CERT_AUTHORITY_INVALID"):
                browser.new_page().goto(url)
            own.new_page().goto(url)
            with opening.result(60) as device:
                assert device.facts.emulator == ""
                runs = pool.submit(lambda: list(measure.outputs(device, config, feeds)))
                while not runs.done():
                    own.pages[0].wait_for_timeout(100)
                here = open_session(config.path)
                for (_, found), feed in zip(runs.result(), feeds, strict=True):
                    ours = run_session(here, feed)
                    assert max(noise(found[key], ours[key]) for key in ours) == 0
                own.close()
                monkeypatch.setattr(web, "LOST_SECONDS", 1.0)
                with pytest.raises(DeviceError, match="no browser answers at web://wasm"):
                    list(measure.outputs(device, config, feeds))
        finally:
            stranger.close()
    with pytest.raises(UsageError, match="names no browser: 'lynx'"):
        open_device("web://wasm?browser=lynx")


@pytest.mark.slow
def test_without_the_runtime_it_is_told_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEQ_ORT_WEB", str(tmp_path))
    with pytest.raises(RuntimeUnavailableError, match="npm install") as caught:
        open_device("web://wasm")
    assert "onnxruntime-web isn't in" in caught.value.message
    with pytest.raises(UsageError, match="web://wasm or web://webgpu"):
        open_device("web://webgl")


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["OCRcls", "MAGIKA"])
def test_zoo_models_compute_the_same_in_a_browser(name: str, tmp_path: Path) -> None:
    config, feeds, reference = zoo(name, "web-wasm", tmp_path)
    feeds = feeds[:1]  # the GPU is software
    assert farthest("web://wasm", (config, feeds, reference)) < 1e-6
    here, exact = open_session(config.path), open_session(reference)
    errors = [
        noise(own, run_session(exact, feed)[key]) for feed in feeds for key, own in run_session(here, feed).items()
    ]
    assert farthest(GPU, (config, feeds, reference)) <= max(*errors, 1e-3)
