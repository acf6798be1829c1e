"""A client that speaks HTTP byte by byte, and so also what is no HTTP."""

import json
import socket
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 30


@dataclass(frozen=True)
class Answer:
    """What the service said to one request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        document = json.loads(self.body)
        assert document.keys() == {"error"}
        return str(document["error"])


class RawClient:
    """One connection. Every wait ends after PATIENCE_S with an error.

    With `receive_buffer`, the system keeps about so many bytes that were not read yet.
    """

    def __init__(self, url: str, receive_buffer: int | None = None) -> None:
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE_S)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._sent = time.monotonic()
        self.socket.connect((address.hostname, address.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def send(self, *lines: str, body: bytes = b"") -> None:
        """Send a whole head of these lines, and a body."""
        self.send_bytes("\r\n".join([*lines, "", ""]).encode() + body)

    def send_bytes(self, data: bytes) -> None:
        self._sent = time.monotonic()
        self.socket.sendall(data)

    def answer(self, *, to_head: bool = False) -> Answer:
        """Read one answer."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = 0 if to_head else int(headers.get("content-length", 0))
        while len(self._received) < length:
            self._receive()
        body, self._received = self._received[:length], self._received[length:]
        return Answer(int(first.split()[1]), headers, body)

    def seconds_until_closed(self) -> float:
        """Wait until the service closes the connection, having said nothing more.

        Returns:
            Seconds since the last sending began, or the connecting: no fewer than the service waited.
        """
        assert self._received == b""
        assert self.socket.recv(1) == b"", "the service said more"
        return time.monotonic() - self._sent

    def _receive(self) -> None:
        part = self.socket.recv(65536)
        assert part, f"closed after {self._received!r}"
        self._received += part
