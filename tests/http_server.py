"""A web server over a folder that fails on command, for the tests of remote data."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PIECE = 4096  # bytes written at once
_servers = weakref.WeakSet()


class FailingServer:
    """Serves the files of `folder` at `url`; its attributes may be changed at any time.

    rate: bytes a second of each response. drop_every: each k-th GET ends after `drop_after` bytes of its body.
    error_every: each k-th request is answered with `error`. stall_every: each k-th GET gets no answer. ranges: whether
    Range is obeyed. lengths: whether responses tell their length; else the end of the connection ends them. away_at:
    with this request the server goes away, for `away_s`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rate: float | None = None
        self.drop_every, self.drop_after = 0, 1000
        self.error_every, self.error = 0, 500
        self.stall_every, self.away_at, self.away_s = 0, 0, 1.0
        self.ranges = self.lengths = True
        self.requests: list[str] = []  # method and path, in their order
        self.failures = 0
        self._lock, self._connections = threading.Lock(), set()
        self._released = threading.Event()  # ends the stalls
        self._port, self._server = 0, None
        self.come_back()
        _servers.add(self)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def come_back(self) -> None:
        """Listen, at the port of before."""
        handler = type("Handler", (_Handler,), {"failing": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def go_away(self) -> None:
        """Cut all connections and refuse new ones."""
        self._server.shutdown()
        self._server.server_close()
        self._released.set()
        self._released = threading.Event()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def be_away(self, seconds: float) -> None:
        """Go away now and come back by itself; returns when it is away."""
        self.go_away()
        timer = threading.Timer(seconds, self.come_back)
        timer.daemon = True
        timer.start()

    def happens(self, method: str, path: str) -> str | None:
        """What befalls a request: "error", "drop", "stall" or None."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            number, gets = len(self.requests), sum(request.startswith("GET") for request in self.requests)
            kinds = [("error", self.error_every, number)]
            if method == "GET":
                kinds += [("stall", self.stall_every, gets), ("drop", self.drop_every, gets)]
            if number == self.away_at:
                threading.Thread(target=self.be_away, args=(self.away_s,), daemon=True).start()
                kinds = [("stall", 1, 1)]
            what = next((kind for kind, every, count in kinds if every and count % every == 0), None)
            self.failures += what is not None
            return what


def _leave_to_parent() -> None:
    """Data workers are forked, and would keep connections open that the server ends."""
    for server in list(_servers):
        for inherited in [server._server.socket, *server._connections]:
            descriptor = inherited.detach()
            if descriptor >= 0:
                os.close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # connections that break are the purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    failing: FailingServer

    def setup(self):
        super().setup()
        with self.failing._lock:
            self.failing._connections.add(self.connection)

    def finish(self):
        with self.failing._lock:
            self.failing._connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        what = self.failing.happens(self.command, path)
        if what == "stall":
            self.failing._released.wait(60)
            self.close_connection = True
            return
        file = self.failing.folder / path.lstrip("/")
        if what == "error" or not file.is_file():
            self.send_response(self.failing.error if what == "error" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self._head(file.read_bytes())
        if with_body:
            self._write(body, self.failing.drop_after if what == "drop" else None)

    def _head(self, data: bytes) -> bytes:
        """Send the headers; return the body that belongs to them."""
        wanted, total = self.headers.get("Range"), len(data)
        if wanted and self.failing.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            first = int(first) if first else total - int(last)
            data = data[first : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        if self.failing.lengths:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        return data

    def _write(self, body: bytes, most: int | None) -> None:
        rate, sent = self.failing.rate, 0
        while sent < len(body):
            stop = min(sent + _PIECE, len(body) if most is None else most)
            self.wfile.write(body[sent:stop])
            if rate:
                time.sleep((stop - sent) / rate)
            sent = stop
            if sent == most:
                break
        if most is not None and sent < len(body):
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
