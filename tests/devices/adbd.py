"""An Android debug daemon of our own, over TCP, whose device is a board: the real ``adb`` talks to it as to a phone.

It speaks what edgeq needs of the protocol (connections, authentication up to the question on the phone's screen, shells
with separate errors and exit status) and runs commands in the board's namespaces. The board is a Debian with glibc:
what is special to Android's userland isn't emulated.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from tests.devices.arm64 import Board

VERSION, MAX_BYTES = 0x01000000, 1 << 18  # of the protocol that sends check sums; of a packet
BANNER = b"device::ro.product.name=edgeq;ro.product.model=qemu;ro.product.device=board;features=%s\0"
FEATURES = b"shell_v2,cmd"
TOKEN = 1  # kind of an AUTH packet that asks for a signature
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)


class Adbd:
    """``authorized``: whether the owner of the phone has pressed OK; ``features``: what it says it can."""

    def __init__(self, board: Board, *, authorized: bool = True, features: bytes = FEATURES) -> None:
        self.board, self.authorized, self.banner = board, authorized, BANNER % features
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"adb://{self.serial}"

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=_Transport(self, connection).serve, daemon=True).start()


@contextmanager
def adbd(board: Board, **how: bool | bytes) -> Iterator[Adbd]:
    """A daemon until the context ends."""
    daemon = Adbd(board, **how)  # type: ignore[arg-type]
    try:
        yield daemon
    finally:
        daemon.close()


class _Transport:
    """A connection of an adb server: packets of many shells in turn."""

    def __init__(self, daemon: Adbd, connection: socket.socket) -> None:
        self.daemon, self._socket, self._sending = daemon, connection, threading.Lock()
        self._shells: dict[int, _Shell] = {}

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        header = struct.pack("<6I", number, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self._sending, suppress(OSError):  # who is gone needs no answer
            self._socket.sendall(header + data)

    def serve(self) -> None:
        with suppress(OSError, EOFError), self._socket.makefile("rb") as source:
            while True:
                command, first, second, size = struct.unpack("<4s3I", _exactly(source, 24)[:16])
                self._take(command, first, second, _exactly(source, size))
        for shell in self._shells.values():
            shell.hang_up()

    def _take(self, command: bytes, theirs: int, ours: int, data: bytes) -> None:
        if command == b"CNXN" and self.daemon.authorized:
            self.send(b"CNXN", VERSION, MAX_BYTES, self.daemon.banner)
        elif command in (b"CNXN", b"AUTH"):  # whatever it signs, until the owner agrees
            self.send(b"AUTH", TOKEN, 0, os.urandom(20))
        elif command == b"OPEN":
            number = len(self._shells) + 1
            self._shells[number] = _Shell(self, number, theirs, data.rstrip(b"\0").decode())
        elif command == b"WRTE":
            self._shells[ours].feed(data)
            self.send(b"OKAY", ours, theirs)
        elif command == b"OKAY":
            self._shells[ours].ready.release()
        elif command == b"CLSE" and ours in self._shells:
            self._shells[ours].hang_up()


class _Shell:
    """A command on the board: its input comes, its output, errors and exit status go in packets."""

    def __init__(self, transport: _Transport, ours: int, theirs: int, service: str) -> None:
        self._transport, self._ours, self._theirs = transport, ours, theirs
        self.ready, self._gone, self._given = threading.Semaphore(0), False, b""
        self._writing = threading.Lock()
        how, _, command = service.partition(":")
        assert how.startswith("shell,v2"), f"the daemon can't do {service!r}"
        self._process = subprocess.Popen(
            ["nsenter", f"--target={transport.daemon.board.inside}", "--mount", "--pid", "--root", "--wd", "/bin/sh",
             "-c", command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=transport.daemon.board.environment,
        )  # fmt: skip
        threading.Thread(target=self._serve, daemon=True).start()

    def feed(self, data: bytes) -> None:
        self._given += data
        assert self._process.stdin
        while len(self._given) >= 5 and len(self._given) >= 5 + (size := struct.unpack_from("<I", self._given, 1)[0]):
            kind, body, self._given = self._given[0], self._given[5 : 5 + size], self._given[5 + size :]
            with suppress(OSError):  # a command need not read its input
                if kind == STDIN:
                    self._process.stdin.write(body)
                    self._process.stdin.flush()
                elif kind == CLOSE_STDIN:
                    self._process.stdin.close()

    def hang_up(self) -> None:
        """The other end is gone: no more input, and no one to write to."""
        self._gone = True
        self.ready.release()
        assert self._process.stdin
        with suppress(OSError):
            self._process.stdin.close()

    def _serve(self) -> None:
        process = self._process
        self._transport.send(b"OKAY", self._ours, self._theirs)
        assert process.stdout and process.stderr
        errors = threading.Thread(target=self._pump, args=(process.stderr, STDERR), daemon=True)
        errors.start()
        self._pump(process.stdout, STDOUT)
        errors.join()
        self._write(EXIT, bytes([process.wait() & 255]))
        self._transport.send(b"CLSE", self._ours, self._theirs)

    def _pump(self, source: IO[bytes], kind: int) -> None:
        for data in iter(lambda: os.read(source.fileno(), MAX_BYTES // 2), b""):
            self._write(kind, data)

    def _write(self, kind: int, data: bytes) -> None:
        with self._writing:
            if not self._gone:
                self._transport.send(b"WRTE", self._ours, self._theirs, struct.pack("<BI", kind, len(data)) + data)
                self.ready.acquire()


def _exactly(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data
