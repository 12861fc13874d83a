"""The server a browser takes its jobs from (L4): the page, files, jobs out, answers in, for who knows the key."""

from __future__ import annotations

import hmac
import json
import queue
import ssl
import sys
from collections.abc import Mapping
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

POLL_SECONDS = 5.0
PAGE = b"<!doctype html><meta charset=utf-8><title>edgeq</title><script type=module src=/browser.mjs></script>"
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}


class Server(ThreadingHTTPServer):
    """``tls``: encrypts, for browsers of other machines; the handshake is made in the connection's own thread."""

    tls: ssl.SSLContext | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        super().finish_request(self.tls.wrap_socket(request, server_side=True) if self.tls else request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is gone doesn't wait for its answer; one that distrusts the certificate hangs up."""
        if not isinstance(sys.exception(), ConnectionError | ssl.SSLError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The page, its files, and jobs out, answers in."""

    def __init__(
        self, orders: queue.Queue[Any], answers: queue.Queue[Any], roots: Mapping[str, Path],
        settings: Mapping[str, str], key: str, *arguments: Any,
    ) -> None:  # fmt: skip
        self.orders, self.answers, self.roots, self.settings, self.key = orders, answers, roots, settings, key
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not self._knows_key():
            self._send(b"this address is another's", "text/plain", 403)
        elif path == "/":
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
        if not self._knows_key():
            self._send(b"", "text/plain", 403)
            return
        if self.path.startswith("/made/"):
            (self.roots["files"] / Path(self.path).name).write_bytes(body)
        else:
            self.answers.put(json.loads(body))
        self._send(b"", "text/plain", 204)

    def _knows_key(self) -> bool:
        """Whether the browser has the key: in the address it opens, later in the cookie that this sets."""
        cookie = SimpleCookie(self.headers.get("Cookie", "")).get("key")
        given = (urlsplit(self.path).query.removeprefix("key="), cookie.value if cookie else "")
        return any(hmac.compare_digest(one.encode(), self.key.encode()) for one in given)

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
        if status == 200:
            self.send_header("Set-Cookie", f"key={self.key}; HttpOnly; SameSite=Strict")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # threads and precise clocks need isolation
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is the user's."""
