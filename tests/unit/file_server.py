"""A small hub on this machine: a real HTTP server in a thread, whose faults are set by the tests."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@dataclass
class Served:
    """One file of the server, and how it misbehaves.

    ``statuses`` and ``cuts`` hold one entry for each coming answer; after a cut's bytes the connection ends, or, with
    ``pause_s``, the rest follows when the server is told to go on, or after that time.
    """

    data: bytes
    etag: str = ""
    linked: bool = True
    ranges: bool = True
    kind: str = "application/octet-stream"
    redirect: str = ""
    statuses: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    pause_s: float = 0.0

    def __post_init__(self) -> None:
        self.etag = self.etag or hashlib.sha256(self.data).hexdigest()


class Server:
    """Files by path, and the requests that came, each as path and headers."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.go_on = threading.Event()

    def add(self, path: str, served: Served) -> Served:
        self.files[path] = served
        return served

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


def _handler(server_of: list[Server]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return None

        def do_GET(self) -> None:
            server = server_of[0]
            server.requests.append((self.path, dict(self.headers)))
            self.close_connection = True
            served = server.files.get(self.path)
            if served is None:
                return self._refuse(404, {})
            headers = {"ETag": f'"{served.etag}"', "X-Repo-Commit": COMMIT}
            headers |= {"X-Linked-ETag": f'"{served.etag}"'} if served.linked else {}
            if served.statuses and (status := served.statuses.pop(0)) != 200:
                return self._refuse(status, {"Retry-After": "1"})
            if served.redirect:
                return self._refuse(302, {**headers, "Location": served.redirect})
            return self._give(server, served, headers)

        def _give(self, server: Server, served: Served, headers: dict[str, str]) -> None:
            total, start = len(served.data), 0
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if asked and served.ranges:
                start = int(asked[1])
                if start >= total:
                    return self._refuse(416, {**headers, "Content-Range": f"bytes */{total}"})
                headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            self.send_response(206 if start else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", served.kind)
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            end = start + served.cuts.pop(0) if served.cuts else total
            self.wfile.write(served.data[start:end])
            if served.pause_s and end < total:
                self.wfile.flush()
                server.go_on.wait(served.pause_s)
                with suppress(OSError):  # whoever asked may be gone
                    self.wfile.write(served.data[end:])
            return None

        def _refuse(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextmanager
def running() -> Iterator[Server]:
    """The server, on a free port of the loopback interface."""
    held: list[Server] = []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(held))
    httpd.daemon_threads = True
    held.append(Server(f"http://127.0.0.1:{httpd.server_address[1]}"))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield held[0]
    finally:
        held[0].go_on.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join(5)
