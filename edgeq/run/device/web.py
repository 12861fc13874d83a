"""A browser as a Device: a page takes jobs from a server on loopback and runs them in onnxruntime-web (L4).

The page asks for jobs instead of being driven from outside, so that a browser needs nothing but the address; Chromium
is only started here. It works without a network: the runtime comes from the npm package on this machine.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from edgeq.errors import DeviceError, RuntimeUnavailableError, UsageError
from edgeq.ir import io
from edgeq.run.device.record import Device, Facts
from edgeq.run.device.remote import result_of
from edgeq.target.record import CPU

PAGE = b"<!doctype html><meta charset=utf-8><title>edgeq</title><script type=module src=/browser.mjs></script>"
BUILDS = {"wasm": "ort.wasm.min.mjs", "webgpu": "ort.webgpu.min.mjs"}
PROVIDERS = {"wasm": (CPU.name,), "webgpu": ("WebGpuExecutionProvider", CPU.name)}
JSEP = "ort.all."  # prefix of the build that computes wrong integers on WebGPU (seen with 1.30.0)
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS, POLL_SECONDS = 120.0, 5.0
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}


def distribution(given: str = "") -> Path:
    """The folder ``dist`` of onnxruntime-web: as given, in ``EDGEQ_ORT_WEB``, else in edgeq's cache."""
    cache = Path(os.environ.get("EDGEQ_CACHE") or Path.home() / ".cache/edgeq")
    place = Path(given or os.environ.get("EDGEQ_ORT_WEB") or cache / "web/node_modules/onnxruntime-web")
    folder = place if (place / BUILDS["wasm"]).is_file() else place / "dist"
    if not (folder / BUILDS["wasm"]).is_file():
        raise RuntimeUnavailableError(
            f"onnxruntime-web isn't in {str(place)!r}",
            hint=f"npm install --prefix {cache / 'web'} onnxruntime-web, or name its folder in EDGEQ_ORT_WEB",
        )
    return folder


class Browser(Device):
    """``provider`` is ``wasm`` or ``webgpu``, ``adapter`` the GPU Chromium shall take."""

    def __init__(self, address: str, provider: str, *, build: str = "", ort: str = "", adapter: str = "") -> None:
        self.address = address
        build = build or BUILDS[provider]
        if build.startswith(JSEP):
            raise UsageError(
                f"{build} is the JSEP build of onnxruntime-web, whose integers are wrong on WebGPU",
                hint=f"use {BUILDS['webgpu']}, or leave build out",
            )
        roots = {"ort": distribution(ort)}
        if not (roots["ort"] / build).is_file():
            raise UsageError(f"{str(roots['ort'])!r} has no {build}", hint=f"leave build out for {BUILDS[provider]}")
        self._orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._jobs = 0
        self._sent: dict[str, str] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        (self._folder / "files").mkdir()
        roots["files"] = self._folder / "files"
        settings = {"build": build, "provider": provider}
        self._server = _Server(("127.0.0.1", 0), partial(_Handler, self._orders, self._answers, roots, settings))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            self._chromium = self._started(adapter)
            self.facts = self._told(self._answer(START_SECONDS), provider)
        except BaseException:
            self.close()
            raise

    def push(self, name: str, path: Path) -> None:
        digest = io.file_digest(path)
        if self._sent.get(name) != digest:
            place = self._folder / "files" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            self._sent[name] = digest

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        self._jobs += 1
        files = {one: self._sent[one] for one in job["files"]}
        self._orders.put({"name": f"job-{self._jobs}", "job": {**job, "files": files}})
        answer = self._answer(None)
        if "bug" in answer:
            raise DeviceError(f"{self.address}: {answer['bug']}", hint="the browser's runtime can't take this model")
        return result_of(self.address, answer)

    def pull(self, name: str, path: Path, digest: str) -> None:
        shutil.copyfile(self._folder / "files" / name, path)
        if io.file_digest(path) != digest:
            raise DeviceError(f"{name} of {self.address} arrives altered: its sha256 differs", hint="run it again")

    def drop(self, names: list[str]) -> None:
        for name in names:
            self._sent.pop(name, None)
            (self._folder / "files" / name).unlink(missing_ok=True)

    def close(self) -> None:
        chromium = getattr(self, "_chromium", None)
        if chromium is not None:
            chromium.kill()
            chromium.wait()
        self._server.shutdown()
        self._server.server_close()
        self._temporary.cleanup()

    def _started(self, adapter: str) -> subprocess.Popen[bytes]:
        program = next(filter(None, map(shutil.which, CHROMIUMS)), None)
        if program is None:
            raise RuntimeUnavailableError("no Chromium is installed", hint="install the package chromium")
        flags = ["--headless=new", f"--user-data-dir={self._folder / 'profile'}", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--disable-quic"]  # fmt: skip
        flags += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
        flags += ["--enable-unsafe-webgpu", f"--use-webgpu-adapter={adapter}"] if adapter else []
        page = f"http://127.0.0.1:{self._server.server_address[1]}/"
        with (self._folder / "log").open("wb") as log:
            return subprocess.Popen([program, *flags, page], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _answer(self, seconds: float | None) -> dict[str, Any]:
        """The next thing the page says. DeviceError when the browser ends, or says nothing for ``seconds``."""
        waited = 0.0
        while True:
            try:
                return self._answers.get(timeout=POLL_SECONDS)
            except queue.Empty:
                waited += POLL_SECONDS
            if self._chromium.poll() is not None or (seconds is not None and waited >= seconds):
                lines = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise DeviceError(
                    f"the browser of {self.address} says nothing: {' | '.join(lines[-3:]) or 'no message'}",
                    hint="start Chromium by hand to see whether it works",
                )

    def _told(self, found: dict[str, Any], provider: str) -> Facts:
        adapter = found.pop("adapter")
        if provider == "webgpu" and not adapter:
            raise RuntimeUnavailableError(
                f"{found['system']} has no WebGPU adapter here",
                hint="a GPU is needed; web://webgpu?adapter=swiftshader takes the one in software",
            )
        found.pop("isolated")
        emulator = "SwiftShader, a GPU in software" if "swiftshader" in adapter.lower() else ""
        return Facts(**found, board=adapter, providers=PROVIDERS[provider], emulator=emulator, shows_graph=False)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is gone doesn't wait for its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """The page, its files, and jobs out, answers in."""

    def __init__(
        self, orders: queue.Queue[Any], answers: queue.Queue[Any], roots: Mapping[str, Path],
        settings: Mapping[str, str], *arguments: Any,
    ) -> None:  # fmt: skip
        self.orders, self.answers, self.roots, self.settings = orders, answers, roots, settings
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(PAGE, "text/html")
        elif path == "/browser.mjs":
            self._send((Path(__file__).parent / "browser.mjs").read_bytes(), "text/javascript")
        elif path == "/settings":
            self._send(json.dumps(self.settings).encode(), "application/json")
        elif path == "/job":
            try:
                self._send(json.dumps(self.orders.get(timeout=POLL_SECONDS)).encode(), "application/json")
            except queue.Empty:
                self._send(b"", "text/plain", 204)
        else:
            self._file(path)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/made/"):
            (self.roots["files"] / Path(self.path).name).write_bytes(body)
        else:
            self.answers.put(json.loads(body))
        self._send(b"", "text/plain", 204)

    def _file(self, path: str) -> None:
        root, _, name = path.strip("/").partition("/")
        folder = self.roots.get(root)
        place = (folder / name).resolve() if folder else None
        if folder is None or place is None or not place.is_relative_to(folder.resolve()) or not place.is_file():
            self._send(b"", "text/plain", 404)
        else:
            self._send(place.read_bytes(), TYPES.get(place.suffix, "application/octet-stream"))

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # threads and precise clocks need isolation
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is the user's."""
