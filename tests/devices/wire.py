"""A wire that can be cut: a TCP relay to a board."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Wire:
    """Relays a port of its own to ``port``. ``cut`` breaks what is open and refuses what comes, until ``mend``;
    ``fuse``, a number of bytes towards the board, cuts it by itself for a second once that many have passed."""

    def __init__(self, port: int, fuse: int | None = None) -> None:
        self._to, self._fuse = port, fuse
        self._sockets: list[socket.socket] = []
        self.port = self.sent = 0
        self.mend()

    def cut(self) -> None:
        with suppress(OSError):  # cut already
            self._server.shutdown(socket.SHUT_RDWR)  # closing alone doesn't wake who waits
        self._server.close()
        while self._sockets:
            one = self._sockets.pop()
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def mend(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, args=[self._server], daemon=True).start()

    def close(self) -> None:
        self.cut()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:  # closed
                return
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
