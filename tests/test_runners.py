"""The C++ runner before it goes anywhere: what it is compiled with, what goes along, and what is told otherwise."""

from __future__ import annotations

import platform
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from edgeq.errors import RuntimeUnavailableError, UsageError
from edgeq.run.device import runners

HERE = platform.machine()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Path:
    """ONNX Runtime's library on this machine."""
    return runners._library(HERE, runners.MACHINES[HERE], android=False, given="")


@pytest.mark.slow
def test_it_is_compiled_once_for_what_it_is_made_of(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    first = runners.cpp(HERE, android=False).files["edgeq-run"]
    (kept,) = cache.glob("runner/*/edgeq-run")
    assert first == kept and list(kept.parent.iterdir()) == [kept]
    made = kept.stat().st_mtime_ns
    assert runners.cpp(HERE, android=False).files["edgeq-run"] == kept and kept.stat().st_mtime_ns == made
    monkeypatch.setattr(runners, "FLAGS", (*runners.FLAGS, "-std=c++98"))
    with pytest.raises(RuntimeUnavailableError, match=r"g\+\+ can't compile the C\+\+ runner: .*error"):
        runners.cpp(HERE, android=False)


def test_a_missing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailableError, match=rf"a compiler for {HERE}: there is no g\+\+ and no") as caught:
        runners.cpp(HERE, android=False)
    assert "apt-get install g++" in caught.value.hint
    with pytest.raises(RuntimeUnavailableError, match=r"there is no .*-linux-android24-clang") as caught:
        runners.cpp(HERE, android=True, library=str(installed))
    assert "NDK" in caught.value.hint
    with pytest.raises(RuntimeUnavailableError, match=r"can't be compiled for riscv64"):
        runners.cpp("riscv64", android=False)


def test_a_missing_library_is_told() -> None:
    other = next(name for name in runners.MACHINES if name != HERE)
    with pytest.raises(RuntimeUnavailableError, match=f"ONNX Runtime's library for {other}") as caught:
        runners.cpp(other, android=False)
    assert "pip download onnxruntime" in caught.value.hint and f"_{other} -d" in caught.value.hint
    with pytest.raises(RuntimeUnavailableError, match=f"library for Android on {HERE}") as caught:
        runners.cpp(HERE, android=True)
    assert "onnxruntime-android" in caught.value.hint


def test_a_library_for_another_processor_is_refused(tmp_path: Path, installed: Path) -> None:
    other = next(name for name in runners.MACHINES if name != HERE)
    (tmp_path / "text.so").write_text("no library")
    for path in (installed, tmp_path / "text.so"):
        with pytest.raises(UsageError, match=f"is no library for {other}"):
            runners.cpp(other, android=False, library=str(path))
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("onnxruntime/__init__.py", "")
    with pytest.raises(UsageError, match=r"empty.whl' holds no onnxruntime/capi/libonnxruntime.so"):
        runners.cpp(other, android=False, library=str(tmp_path / "empty.whl"))


def test_the_library_is_taken_out_of_archives(cache: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the registries name and fill them; the newest in the cache, once."""
    machine = replace(runners.MACHINES[HERE], abi="arm64-v8a")
    (cache / "onnxruntime").mkdir(parents=True)
    names = {
        f"onnxruntime-1.32.0-cp311-cp311-manylinux_2_28_{HERE}.whl": "onnxruntime/capi/libonnxruntime.so.1.32.0",
        "onnxruntime-android-1.32.0.aar": "jni/arm64-v8a/libonnxruntime.so",
    }
    for name, inside in names.items():
        with zipfile.ZipFile(cache / "onnxruntime" / name, "w") as archive:
            archive.write(installed, inside)
    monkeypatch.setattr(runners.platform, "machine", lambda: "another")  # so that the installed one doesn't count
    for android in (False, True):
        found = runners._library(HERE, machine, android, "")
        assert found.is_relative_to(cache) and found.read_bytes() == installed.read_bytes()
        assert runners._library(HERE, machine, android, "") == found
