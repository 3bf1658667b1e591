"""Secrets are planted wherever a run meets them, and looked for in everything that it writes."""

from __future__ import annotations

import base64
import gzip
import io
import json
import signal
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.support.kills import SAVED_OFTEN, Moment, ended, moments, run_folder
from tests.support.running import Finished, completed, run_job
from tests.support.servers import faulty_proxy, gcs_server, stored

# Each secret is told apart by what follows, so that a leak says where it came from.
MARK = "Pl4ntedS3cret"


def secret(name: str) -> str:
    return f"{MARK}{name}X"


def planted(folder: Path) -> dict[str, str]:
    """Return an environment full of secrets that a sound run never uses; the key file is written to ``folder``."""
    key = folder / "service-account.json"
    key.write_text(
        json.dumps(
            {
                "type": "service_account",
                "project_id": "project",
                "private_key_id": secret("KeyId"),
                "private_key": f"-----BEGIN PRIVATE KEY-----\n{secret('PrivateKey')}\n-----END PRIVATE KEY-----\n",
                "client_email": "job@project.iam.gserviceaccount.com",
                "client_secret": secret("ClientSecret"),
                "token_uri": f"http://127.0.0.1:9/token?code={secret('TokenUri')}",
            }
        )
    )
    return {
        "GOOGLE_APPLICATION_CREDENTIALS": str(key),
        "AWS_ACCESS_KEY_ID": f"AKIA{secret('AwsId')}",
        "AWS_SECRET_ACCESS_KEY": secret("AwsKey"),
        "AWS_SESSION_TOKEN": secret("AwsSession"),
        "HF_TOKEN": f"hf_{secret('HfToken')}",
        "HUGGING_FACE_HUB_TOKEN": f"hf_{secret('HubToken')}",
        "KAGGLE_KEY": secret("Kaggle"),
        "WANDB_API_KEY": secret("Wandb"),
        "GITHUB_TOKEN": f"ghp_{secret('Github')}",
        "DATABASE_URL": f"postgres://user:{secret('Database')}@db.internal/experiments",
        "PIP_INDEX_URL": f"https://user:{secret('PipIndex')}@registry.internal/simple",
        "AIP_TENSORBOARD_LOG_DIR": "",
    }


def forms(text: str) -> Iterable[bytes]:
    """Yield what ``text`` looks like in a file: plain, in UTF-16, and in base64 at each of its three offsets."""
    yield text.encode()
    yield text.encode("utf-16-le")
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + text.encode())
        # without the characters that depend on what stands before and after
        yield encoded[4 if offset else 0 : len(encoded) - 4]


def leaks(content: bytes, depth: int = 0) -> list[str]:
    """Return the surroundings of every planted secret in ``content``, and in the archive that it may be."""
    found = []
    for form in forms(MARK):
        at = content.find(form)
        if at >= 0:
            found.append(repr(content[max(0, at - 60) : at + 60]))
    if depth < 3 and content[:2] == b"\x1f\x8b":
        found += leaks(gzip.decompress(content), depth + 1)
    if depth < 3 and zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                found += leaks(name.encode()) + leaks(archive.read(name), depth + 1)
    return found


def leaks_below(folder: Path) -> dict[str, list[str]]:
    """Return what :func:`leaks` finds in the names and contents of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files, f"nothing was written to {folder}: there is nothing to search"
    found = {str(path): leaks(path.read_bytes()) + leaks(path.name.encode()) for path in files}
    return {path: places for path, places in found.items() if places}


def assert_silent(process: Finished) -> None:
    """Check that standard output and standard error hold no secret, and no upload session."""
    assert process.errors.strip(), "it said nothing: there is nothing to search"
    assert leaks(process.errors.encode()) == [], process.errors
    assert "upload_id=" not in process.errors


def stored_without_secrets(server: str, bucket: str) -> list[str]:
    """Check that neither name nor content of any object in a bucket holds a secret; return the names."""
    with urllib.request.urlopen(f"{server}/storage/v1/b/{bucket}/o") as answer:  # noqa: S310
        names = [item["name"] for item in json.load(answer).get("items", [])]
    found = {name: leaks(stored(server, bucket, name)) + leaks(name.encode()) for name in names}
    assert {name: places for name, places in found.items() if places} == {}
    return names


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b"\0\1" + secret("Plain").encode() + b"\xff"),
        lambda file: file.write_text(json.dumps({"a": secret("Json")}), encoding="utf-16-le"),
        lambda file: file.write_bytes(b"x" + base64.b64encode(b"ab" + secret("Base64").encode() + b"tail")),
        lambda file: file.write_bytes(base64.b64encode(b"a" + secret("Base64").encode() + b"tail")),
        lambda file: file.write_bytes(base64.b64encode(secret("Base64").encode() + b"tail")),
        lambda file: np.savez(file.open("wb"), record=np.frombuffer(secret("Array").encode(), np.uint8)),
        lambda file: np.savez_compressed(file.open("wb"), record=np.frombuffer(secret("Array").encode(), np.uint8)),
        lambda file: file.write_bytes(gzip.compress(secret("Gzip").encode())),
        lambda file: file.with_name(secret("Name")).write_bytes(b"x"),
    ],
    ids=["plain", "utf-16", "base64 2", "base64 1", "base64 0", "array", "compressed array", "gzip", "name"],
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_search_finds_what_was_planted(tmp_path: Path, write: object) -> None:
    (tmp_path / "innocent").write_bytes(b"nothing to see")
    assert leaks_below(tmp_path) == {}
    assert callable(write)
    write(tmp_path / "guilty")
    assert len(leaks_below(tmp_path)) == 1


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Every place that a run writes to, below one folder."""
    written = tmp_path / "written"
    for name in ("home", "tmp"):
        (written / name).mkdir(parents=True)
    return {
        "HOME": str(written / "home"),
        "TMPDIR": str(written / "tmp"),
        "KERAS_HOME": str(written / "home" / "keras"),
        "TRANSFER_CACHE_DIR": str(written / "cache"),
        "TRANSFER_OUTPUT_URI": str(written / "output"),
    }


@pytest.fixture
def secretive(tiny: dict[str, str], places: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a sound run of two arms, with secrets all about it."""
    return tiny | SAVED_OFTEN | places | planted(tmp_path) | {"TRANSFER_ARMS": "scratch,frozen", "TRANSFER_EPOCHS": "6"}


def test_a_successful_run_and_its_checkpoints_hold_no_secret(
    secretive: dict[str, str], server: str, tmp_path: Path
) -> None:
    host = urlsplit(server).netloc
    # as wget names what it fetched from a signed address
    signed = tmp_path / f"mobilenet.weights.h5?X-Goog-Signature={secret('Signature')}"
    signed.symlink_to(secretive["TRANSFER_WEIGHTS"])
    environment = secretive | {
        "TRANSFER_WEIGHTS": str(signed),
        "STORAGE_EMULATOR_HOST": f"http://user:{secret('Emulator')}@{host}",
        "AIP_MODEL_DIR": "gs://bucket/model",
        "TRANSFER_CHECKPOINT_URI": "gs://bucket/checkpoints",
    }
    order = moments(["scratch 1", "frozen 1"])
    stop = ended(environment, Moment("training", "scratch 1"), order, signal.SIGTERM, delay=0.3)
    assert stop is not None
    assert stop.process.code == 143, stop.process.errors
    assert_silent(stop.process)
    assert leaks_below(tmp_path / "written") == {}
    kept = stored_without_secrets(server, "bucket")
    assert any(name.endswith(".ckpt") for name in kept), kept

    assert_silent(completed(environment))
    assert leaks_below(tmp_path / "written") == {}
    kept = stored_without_secrets(server, "bucket")
    assert "model/saved_model.pb" in kept
    assert not any(name.endswith(".ckpt") for name in kept), kept
    assert_silent(completed(environment, "verify", str(run_folder(tmp_path / "written" / "output"))))


# Secrets in settings that are refused: each with what must be named instead.
REFUSED: Mapping[str, str] = {
    "TRANSFER_WEIGHTS": f"gs://bucket/w.h5?X-Goog-Signature={secret('Weights')}",
    "TRANSFER_OUTPUT_URI": f"https://user:{secret('Output')}@example.com/out?sig={secret('Query')}",
    "TRANSFER_DATASET": f"s3://{secret('Access')}:{secret('Dataset')}@bucket/data#{secret('Fragment')}",
    "TRANSFER_DATA_DIR": f"gs://user:{secret('DataDir')}@bucket/data",
    "TRANSFER_CHECKPOINT_URI": f"gs://bucket/c?access_token={secret('Checkpoint')}",
    "TRANSFER_CACHE_DIR": f"https://user:{secret('Cache')}@host/cache",
    "AIP_MODEL_DIR": f"gs://bucket/m?sig={secret('Model')}",
    "TRANSFER_API_KEY": secret("ApiKey"),
    "TRANSFER_HF_TOKEN": f"hf_{secret('Token')}",
    "TRANSFER_PASSWORD": secret("Password"),
    "TRANSFER_MIRROR": f"https://user:{secret('Mirror')}@host/path",
}


def refused(environment: dict[str, str], *arguments: str) -> str:
    """Run the job, which must be refused without a secret; return what it printed."""
    process = run_job(environment, *arguments)
    assert process.code == 78, process.errors
    assert_silent(process)
    return process.errors


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_refused_settings_are_named_without_their_secrets(
    secretive: dict[str, str], tmp_path: Path, verb: str, log_format: str
) -> None:
    errors = refused(secretive | dict(REFUSED) | {"TRANSFER_LOG_FORMAT": log_format}, verb)
    for variable in REFUSED:
        assert f"{variable}: " in errors, errors
    assert not (tmp_path / "written" / "output").exists()


def test_verify_of_a_signed_address_names_it_without_the_signature(places: dict[str, str]) -> None:
    address = f"https://user:{secret('User')}@host/run?sig={secret('Verify')}"
    refused(places, "verify", address)


def test_a_key_file_that_cannot_be_used_is_named_and_not_quoted(secretive: dict[str, str]) -> None:
    assert "GOOGLE_APPLICATION_CREDENTIALS" in refused(secretive, "verify", "gs://bucket/run")
    key = Path(secretive["GOOGLE_APPLICATION_CREDENTIALS"])
    key.write_text(f"{secret('NoJson')} is not JSON")
    refused(secretive, "verify", "gs://bucket/run")


@pytest.fixture
def private_server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    with gcs_server(tmp_path / "buckets") as url:
        yield url


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(None, id="unsteady", marks=pytest.mark.slow),
        pytest.param(403, id="forbidden", marks=pytest.mark.slow),
        pytest.param(400, id="bad request", marks=pytest.mark.slow),
    ],
)
def test_storage_errors_hold_no_secret(
    secretive: dict[str, str], private_server: str, tmp_path: Path, status: int | None
) -> None:
    with faulty_proxy(private_server) as proxy:
        environment = secretive | {
            "STORAGE_EMULATOR_HOST": f"http://user:{secret('Proxy')}@{urlsplit(proxy.url).netloc}",
            "TRANSFER_OUTPUT_URI": "gs://bucket/output",
            "TRANSFER_ARMS": "frozen",
            "TRANSFER_EPOCHS": "2",
        }
        proxy.status = status
        if status is None:
            for fault in ("refuse", "drop", "cut_answer", "cut_download"):
                proxy.plan(fault, 3)
        process = run_job(environment)
    assert process.code == (0 if status is None else 78), process.errors
    if status is None:
        assert proxy.happened["refuse"] == 3
        assert "trying again" in process.text
    assert_silent(process)
    # what the run itself left behind, stopped or not
    written = tmp_path / "written"
    (written / "anchor").write_bytes(b"")
    assert leaks_below(written) == {}
