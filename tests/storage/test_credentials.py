"""Credentials against a metadata server and a token service on loopback, in a process of their own.

google.auth reads its environment when it is imported. Nothing here leaves this machine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.compute_engine import detect_gce_residency_linux as on_google

from job.storage.locations import open_store
from tests.support import servers
from tests.support.running import ROOT
from tests.support.servers import faulty_proxy, free_port
from tests.support.unreachable import refusing_port, silent_port

TOKEN = "planted-access-token"  # noqa: S105  (it opens nothing)
# Anything under gserviceaccount.com would make google.auth ask Google where the account may be used.
EMAIL = "job@project.test"
ACCOUNT = "/computeMetadata/v1/instance/service-accounts/"
LONG = 600  # seconds, far beyond the patience of these tests: who waits for that long fails
PATIENCE = 60
UNUSABLE = "GOOGLE_APPLICATION_CREDENTIALS: no usable Google credentials"

FIND = """
import logging, sys
from job.storage import credentials
from job import stopping
from job.errors import JobError
logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
stopping.heed()
try:
    with stopping.deferred():
        print("token:", credentials.find(["scope"], float(sys.argv[1])).token)
except (JobError, stopping.Stopped) as error:
    print(error)
    sys.exit(error.exit_code)
"""

USE = """
import sys
from google.cloud import storage
from job.storage import credentials
from job.errors import JobError
from google.auth.compute_engine import detect_gce_residency_linux as on_google

from job.storage.gcs import GcsStore
limit = float(sys.argv[1])
client = storage.Client(None, credentials.find(storage.Client.SCOPE), client_options={"api_endpoint": sys.argv[2]})
store = GcsStore(client, "bucket", "credentials", "TRANSFER_OUTPUT_URI", limit)
print("found", flush=True)
sys.stdin.readline()
try:
    store.put_bytes("x", b"content")
    print(store.read("x"))
except JobError as error:
    print(error)
    sys.exit(error.exit_code)
"""


class Cloud:
    """What a machine in Google's cloud offers: a metadata server; and the service that gives tokens for keys.

    ``planned`` are the statuses of the next answers to those who ask for what ``where`` begins with, and ``forever`` is
    the one of all answers to them; without either it is 200.
    """

    def __init__(self, port: int, planned: Sequence[int] = (), forever: int = 0, where: str = ACCOUNT) -> None:
        self.planned, self.forever, self.where = deque(planned), forever, where
        self.flavor = "Google"
        self.asked: Counter[str] = Counter()
        self.host = f"127.0.0.1:{port}"

    def answer(self, path: str) -> tuple[int, object]:
        self.asked[path] += 1
        if path.startswith(self.where) and (self.forever or self.planned):
            return self.forever or self.planned.popleft(), {"error": "invalid_grant"}
        account = {"email": EMAIL, "scopes": ["scope"], "aliases": ["default"]}
        # Google refreshes what is good for less than four minutes before each use.
        token = {"access_token": TOKEN, "expires_in": 100, "token_type": "Bearer"}
        named = {"?recursive": account, "/token": token, "universe": "googleapis.com", "project-id": "project"}
        return 200, next((value for key, value in named.items() if key in path), {})


@contextmanager
def serving(cloud: Cloud) -> Iterator[Cloud]:
    class Front(servers.Handler):
        def respond(self) -> None:
            self.content()
            self.answer_json(*cloud.answer(self.path), Metadata_Flavor=cloud.flavor)

    with servers.serving(Front, int(cloud.host.rpartition(":")[2])):
        yield cloud


@contextmanager
def child(code: str, home: Path, *arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run code with no environment but this; a home folder of its own has no login of gcloud's."""
    path = os.environ.get("PATH", "")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HOME": str(home)} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    guard = threading.Timer(PATIENCE, process.kill)
    guard.start()
    try:
        yield process
    finally:
        guard.cancel()
        process.kill()
        process.communicate()


def at(cloud: Cloud) -> dict[str, str]:
    return {"GCE_METADATA_HOST": cloud.host, "GCE_METADATA_IP": cloud.host}


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"{words!r} was never said: {''.join(lines)}")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate("\n")
    return process.returncode, out


def found(home: Path, limit: float = LONG, **environment: str) -> tuple[int, str]:
    with child(FIND, home, limit, **environment) as process:
        return ended(process)


def refused_at_once(home: Path, words: str, **environment: str) -> str:
    """Check that no credentials are found, with these words and without waiting; return all that was said."""
    code, said = found(home, **environment)
    assert code == 78
    assert words in said
    assert "job.storage.credentials: " not in said
    return said


def test_a_metadata_server_that_refuses_connections_at_first_is_waited_for(tmp_path: Path) -> None:
    cloud = Cloud(free_port())
    with child(FIND, tmp_path, LONG, **at(cloud)) as process:
        said = read_until(process, "waiting up to")
        with serving(cloud):
            code, rest = ended(process)
    assert (code, rest.count(f"token: {TOKEN}\n")) == (0, 1)
    assert (
        said.count("job.storage.credentials: no Google credentials yet: waiting up to 600 s for the machine's metadata")
        == 1
    )
    assert "waiting" not in rest


@pytest.mark.parametrize("where", ["/", ACCOUNT])
@pytest.mark.parametrize("status", [404, 500, 503])
def test_a_metadata_server_that_has_no_account_at_first_is_waited_for(status: int, where: str, tmp_path: Path) -> None:
    with serving(Cloud(free_port(), [status], where=where)) as cloud:
        code, said = found(tmp_path, **at(cloud))
    assert (code, said.count(f"token: {TOKEN}\n")) == (0, 1)
    assert not cloud.planned
    # google.auth by itself asks again for an account where the status says that this may help
    assert said.count("job.storage.credentials: ") == (where == "/" or status == 404)


def test_a_metadata_server_that_never_has_a_token_ends_as_missing_credentials(tmp_path: Path) -> None:
    with serving(Cloud(free_port(), forever=404)) as cloud:
        code, said = found(tmp_path, 3, **at(cloud))
    assert code == 78
    assert f"{UNUSABLE} (waited 3 s for the machine's" in said
    assert said.count("job.storage.credentials: ") == 1


def test_no_time_is_lost_waiting_on_a_machine_of_another_cloud(tmp_path: Path) -> None:
    with serving(Cloud(free_port())) as cloud:
        cloud.flavor = "Other"
        refused_at_once(tmp_path, f"{UNUSABLE} (Your default", **at(cloud))
    assert cloud.asked["/"]


def test_no_time_is_lost_waiting_where_nothing_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        host = f"127.0.0.1:{deaf.getsockname()[1]}"
        code, said = found(tmp_path, GCE_METADATA_HOST=host, GCE_METADATA_IP=host, GCE_METADATA_TIMEOUT="1")
    # a machine whose firmware says that it is Google's has a metadata server, however late
    assert (code == 78, "job.storage.credentials: " in said) == ((False, True) if on_google() else (True, False))


def test_no_time_is_lost_waiting_where_the_user_says_that_there_is_no_cloud(tmp_path: Path) -> None:
    refused_at_once(tmp_path, f"{UNUSABLE} (Your default", NO_GCE_CHECK="true")


def test_a_stop_is_heeded_while_waiting(tmp_path: Path) -> None:
    cloud = Cloud(free_port())
    with child(FIND, tmp_path, LONG, **at(cloud)) as process:
        read_until(process, "waiting up to")
        process.send_signal(signal.SIGTERM)
        code, _ = ended(process)
    assert code == 143


def key_file(cloud: Cloud) -> str:
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return json.dumps(
        {
            "type": "service_account",
            "client_email": EMAIL,
            "private_key": key.decode(),
            "token_uri": f"http://{cloud.host}/token",
        }
    )


def test_a_credentials_file_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    with (
        serving(Cloud(free_port())) as cloud,
        child(FIND, tmp_path, LONG, GOOGLE_APPLICATION_CREDENTIALS=str(file)) as process,
    ):
        said = read_until(process, "waiting up to")
        (tmp_path / "new").write_text(key_file(cloud))
        (tmp_path / "new").rename(file)
        code, rest = ended(process)
    assert (code, rest.count(f"token: {TOKEN}\n")) == (0, 1)
    assert f"waiting up to 600 s for the file {file}" in said


def test_a_credentials_file_that_never_comes_is_named(tmp_path: Path) -> None:
    code, said = found(tmp_path, 2, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "absent.json"))
    assert code == 78
    assert f"(waited 2 s for the file {tmp_path}/absent.json)" in said


@pytest.mark.parametrize("content", ["", "secret", "[]", "{}", '{"type": "service_account", "private_key": "secret"}'])
def test_a_malformed_credentials_file_is_refused_at_once_and_not_quoted(content: str, tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text(content)
    said = refused_at_once(tmp_path, UNUSABLE, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"))
    assert "secret" not in said


def test_a_folder_in_place_of_a_credentials_file_is_refused_at_once(tmp_path: Path) -> None:
    refused_at_once(tmp_path, "(IsADirectoryError)", GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path))


def test_a_key_that_was_revoked_is_refused_at_once(tmp_path: Path) -> None:
    with serving(Cloud(free_port(), forever=400, where="/token")) as cloud:
        (tmp_path / "key.json").write_text(key_file(cloud))
        refused_at_once(tmp_path, "invalid_grant", GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"))
    assert cloud.asked == {"/token": 1}


def test_a_token_service_out_of_reach_is_worth_a_later_try(tmp_path: Path) -> None:
    with refusing_port() as port:
        (tmp_path / "key.json").write_text(key_file(Cloud(port)))
        code, said = found(tmp_path, 3, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"))
    assert code == 74
    assert "no answer from the service that gives tokens within 3 s" in said


def test_a_token_service_that_is_silent_is_worth_a_later_try(tmp_path: Path) -> None:
    with silent_port() as port:
        (tmp_path / "key.json").write_text(key_file(Cloud(port)))
        code, said = found(tmp_path, 3, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"))
    assert code == 74
    assert "no answer from the service that gives tokens within 3 s" in said


def test_requests_carry_the_token_and_outlast_a_short_absence_of_the_metadata_server(
    server: str, tmp_path: Path
) -> None:
    with serving(Cloud(free_port())) as cloud, faulty_proxy(server) as proxy:
        proxy.authorization = f"Bearer {TOKEN}"
        with child(USE, tmp_path, 30, proxy.url, **at(cloud)) as process:
            read_until(process, "found")
            cloud.planned.extend([404, 404, 404])
            code, said = ended(process)
    assert (code, said.count("b'content'\n")) == (0, 1)
    assert "storage: RefreshError; trying again" in said
    assert not cloud.planned


def test_a_metadata_server_that_went_away_for_good_is_worth_a_later_try(server: str, tmp_path: Path) -> None:
    with (
        serving(Cloud(free_port())) as cloud,
        child(USE, tmp_path, 2, server, **at(cloud)) as process,
    ):
        read_until(process, "found")
        before = cloud.asked.total()
        cloud.forever = 404
        code, said = ended(process)
    assert code == 74
    assert "could not write within 2 s (RefreshError)" in said
    assert cloud.asked.total() > before + 1


def test_a_token_that_storage_does_not_accept_is_a_wrong_setting(server: str, tmp_path: Path) -> None:
    with serving(Cloud(free_port())) as cloud, faulty_proxy(server) as proxy:
        proxy.authorization = "Bearer another"
        with child(USE, tmp_path, LONG, proxy.url, **at(cloud)) as process:
            code, said = ended(process)
    assert code == 78
    assert "(HTTP 401)" in said


def test_an_emulator_needs_no_credentials(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    assert open_store("gs://bucket/nothing", "TRANSFER_OUTPUT_URI", LONG).read("x") is None
    assert not caplog.records
