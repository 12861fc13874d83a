"""A browser as a Device: a page takes jobs from a server on loopback and runs them in onnxruntime-web (L4).

The page asks for jobs instead of being driven from outside, so that a browser needs nothing but the address; Chromium
is only started here. It works without a network: the runtime comes from the npm package on this machine.
"""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from edgeq.errors import DeviceError, RuntimeUnavailableError, UsageError
from edgeq.ir import io
from edgeq.run.device import phone
from edgeq.run.device.pages import POLL_SECONDS, Handler, Server
from edgeq.run.device.record import Device, Facts
from edgeq.run.device.remote import result_of
from edgeq.target.cache import cache_folder
from edgeq.target.record import CPU

BUILDS = {"wasm": "ort.wasm.min.mjs", "webgpu": "ort.webgpu.min.mjs"}
PROVIDERS = {"wasm": (CPU.name,), "webgpu": ("WebGpuExecutionProvider", CPU.name)}
JSEP = "ort.all."  # prefix of the build that computes wrong integers on WebGPU (seen with 1.30.0)
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
BROWSERS = ("chromium", "phone")
START_SECONDS, FIND_SECONDS, LOST_SECONDS = 120.0, 300.0, 900.0  # a phone is found, and lost, by a person


def distribution(given: str = "") -> Path:
    """The folder ``dist`` of onnxruntime-web: as given, in ``EDGEQ_ORT_WEB``, else in edgeq's cache."""
    place = Path(given or os.environ.get("EDGEQ_ORT_WEB") or cache_folder() / "web/node_modules/onnxruntime-web")
    folder = place if (place / BUILDS["wasm"]).is_file() else place / "dist"
    if not (folder / BUILDS["wasm"]).is_file():
        raise RuntimeUnavailableError(
            f"onnxruntime-web isn't in {str(place)!r}",
            hint=f"npm install --prefix {cache_folder() / 'web'} onnxruntime-web, or name its folder in EDGEQ_ORT_WEB",
        )
    return folder


def _runtime(address: str, provider: str, build: str, ort: str) -> Path:
    """The folder of onnxruntime-web, which has the build that is asked for."""
    build = build or BUILDS[provider]
    if build.startswith(JSEP):
        raise UsageError(
            f"{build} is the JSEP build of onnxruntime-web, whose integers are wrong on WebGPU",
            hint=f"use {BUILDS['webgpu']}, or leave build out",
        )
    folder = distribution(ort)
    if not (folder / build).is_file():
        raise UsageError(f"{str(folder)!r} has no {build}", hint=f"leave build out in {address} for {BUILDS[provider]}")
    return folder


class Browser(Device):
    """``provider`` is ``wasm`` or ``webgpu``, ``adapter`` the GPU Chromium shall take. ``browser``: ``chromium`` is
    started here; ``phone`` is any browser that a person opens the address with which is told."""

    def __init__(
        self, address: str, provider: str, *, build: str = "", ort: str = "", adapter: str = "",
        browser: str = BROWSERS[0],
    ) -> None:  # fmt: skip
        self.address = address
        roots = {"ort": _runtime(address, provider, build, ort)}
        if browser not in BROWSERS:
            raise UsageError(f"{address!r} names no browser: {browser!r}", hint=f"use {' or '.join(BROWSERS)}")
        self._orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._jobs = 0
        self._sent: dict[str, str] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        (self._folder / "files").mkdir()
        roots["files"] = self._folder / "files"
        settings = {"build": build or BUILDS[provider], "provider": provider}
        key, host = secrets.token_urlsafe(16), phone.own_address() if browser == "phone" else "127.0.0.1"
        self._chromium: subprocess.Popen[bytes] | None = None
        self._server = Server((host, 0), partial(Handler, self._orders, self._answers, roots, settings, key))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        page = f"{host}:{self._server.server_address[1]}/?key={key}"
        try:
            if browser == "phone":
                self._server.tls, fingerprint = phone.certified(host, self._folder)
                phone.announce(f"https://{page}", fingerprint)
            else:
                self._chromium = self._started(f"http://{page}", adapter)
            self.facts = self._told(self._answer(START_SECONDS if self._chromium else FIND_SECONDS), provider)
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
        answer = self._answer(LOST_SECONDS if self._chromium is None else None)
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
        if self._chromium is not None:
            self._chromium.kill()
            self._chromium.wait()
        self._server.shutdown()
        self._server.server_close()
        self._temporary.cleanup()

    def _started(self, page: str, adapter: str) -> subprocess.Popen[bytes]:
        program = next(filter(None, map(shutil.which, CHROMIUMS)), None)
        if program is None:
            raise RuntimeUnavailableError("no Chromium is installed", hint="install the package chromium")
        flags = ["--headless=new", f"--user-data-dir={self._folder / 'profile'}", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--disable-quic"]  # fmt: skip
        flags += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
        flags += ["--enable-unsafe-webgpu", f"--use-webgpu-adapter={adapter}"] if adapter else []
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
            over = seconds is not None and waited >= seconds
            if self._chromium is None and over:
                raise DeviceError(
                    f"no browser answers at {self.address} for {waited:.0f} s",
                    hint="open the address that was told, keep its page in front, and the phone on the same network",
                )
            if self._chromium is not None and (over or self._chromium.poll() is not None):
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
        return Facts(**found, board=adapter, providers=PROVIDERS[provider], emulator=emulator, shows_graph=False,
                     runner="browser")  # fmt: skip
