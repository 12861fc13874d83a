"""A wire that can be cut: a TCP relay to a board."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Wire:
    """Relays a port of its own to ``port``. ``cut`` breaks what is open and refuses what comes, until ``mend``;
    ``fuse``, a number of bytes towards the board, cuts it by itself for a second once that many have passed."""

    def __init__(self, port: int, fuse: int | None = None) -> None:
        self._to, self._fuse, self._open = port, fuse, threading.Event()
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.sent = 0
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._open.clear()
        while self._sockets:
            one = self._sockets.pop()
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def mend(self) -> None:
        self._open.set()

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:  # closed
                return
            if not self._open.is_set():
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._sockets += [near, far]
            threading.Thread(target=self._relay, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._relay, args=(far, near, False), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                sink.sendall(block)
                if counted:
                    self.sent += len(block)
                    if self._fuse is not None and self.sent > self._fuse:
                        self._fuse = None
                        self.cut()
                        threading.Timer(1.0, self.mend).start()
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
