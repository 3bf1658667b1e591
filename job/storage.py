"""One store over a local folder and over gs://: checksums both ways, bounded retries, create-only commits.

The only module that knows the storage client. No message of its errors holds a query string or an upload session:
both are secrets.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import mimetypes
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

import google.auth.exceptions
from google.api_core import exceptions as api
from google.api_core.retry import Retry, if_exception_type
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

from job.errors import ConfigError, UnavailableError
from job.store import Digest, LocalStore, Store, Stored, appearing, checksums, measure

__all__ = ["RETRY_SECONDS", "Store", "Stored", "checksums", "fetch", "open_store", "public_uri"]

logger = logging.getLogger(__name__)

# Storage outages are mostly seconds long; beyond two minutes the scheduler's own retry, which also moves the job to
# another machine, helps more than waiting on one that is paid for by the minute.
RETRY_SECONDS = 120.0
_REQUEST_SECONDS = 60.0
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"


def public_uri(uri: str) -> str:
    """Return ``uri`` without user, password, query and fragment, fit for logs. A plain path is returned unchanged."""
    if "://" not in uri:
        return uri
    scheme, location, path, _, _ = urlsplit(uri)
    return urlunsplit((scheme, location.rpartition("@")[2], path, "", ""))


class GcsStore(Store):
    """A prefix in a bucket of Google Cloud Storage, or of the emulator that STORAGE_EMULATOR_HOST names."""

    def __init__(
        self, client: storage.Client, bucket: str, prefix: str, variable: str, limit: float, parent: Store | None = None
    ) -> None:
        super().__init__("/".join(part for part in ("gs:/", bucket, prefix) if part), variable)
        self._client, self._bucket, self._prefix, self._limit = client, bucket, prefix, limit
        self._parent = parent  # whose end closes the client
        # Waits grow with the limit, so that a short limit too leaves room for several attempts.
        first, longest = min(1.0, limit / 16), limit / 8
        pace: dict[str, Any] = {"initial": first, "maximum": longest, "timeout": limit, "on_error": _give_way}
        self._options: dict[str, Any] = {
            # The library's own choice of what is worth a retry, of which it offers no copy with another on_error.
            "retry": Retry(DEFAULT_RETRY._predicate, **pace),
            "timeout": min(_REQUEST_SECONDS, limit),
        }
        # An answer cut short after the object was stored surfaces as a bare JSONDecodeError, which the library does
        # not retry; nor does it upload again what arrived damaged.
        self._again = Retry(if_exception_type(json.JSONDecodeError, DataCorruption), **pace)

    def put(self, name: str, source: Path) -> Stored:
        return self._upload(name, checksums(source), lambda blob, how: blob.upload_from_filename(str(source), **how))

    def put_bytes(self, name: str, data: bytes) -> Stored:
        return self._upload(name, measure(io.BytesIO(data)), lambda blob, how: blob.upload_from_string(data, **how))

    def create(self, name: str, data: bytes) -> bool:
        measured = measure(io.BytesIO(data))
        try:
            self._upload(name, measured, lambda blob, how: blob.upload_from_string(data, if_generation_match=0, **how))
        except api.PreconditionFailed:
            return self.read(name) == data
        return True

    def _upload(
        self, name: str, measured: tuple[int, str, str], send: Callable[[storage.Blob, dict[str, Any]], None]
    ) -> Stored:
        blob = self._blob(name)
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        with self._errors("write", name):
            self._again(send)(blob, {"content_type": content_type, "checksum": "crc32c", **self._options})
        size, _, crc32c = measured
        if blob.size != size or blob.crc32c not in (crc32c, None):
            raise UnavailableError(f"{self.uri}/{name}: arrived damaged ({blob.size} bytes of {size}); try again")
        return Stored(name, size, crc32c)

    def read(self, name: str) -> bytes | None:
        content = io.BytesIO()
        try:
            self._receive(name, content)
        except FileNotFoundError:
            return None
        return content.getvalue()

    def checksums(self, name: str) -> tuple[int, str, str]:
        return self._receive(name)

    def download(self, name: str, target: Path) -> None:
        with self._errors("read", name), appearing(target, os.replace) as file:
            self._receive(name, file)

    def _receive(self, name: str, file: BinaryIO | None = None) -> tuple[int, str, str]:
        blob, digest = self._blob(name), Digest(file)
        with self._errors("read", name):
            blob.download_to_file(digest, checksum="crc32c", **self._options)
        measured = digest.result()
        # The library leaves a download unchecked when it had to resume it.
        if blob.crc32c not in (measured[2], None):
            raise UnavailableError(f"{self.uri}/{name}: arrived damaged ({measured[0]} bytes); try again")
        return measured

    def list(self) -> dict[str, Stored]:
        start = f"{self._prefix}/" if self._prefix else ""
        with self._errors("list", ""):
            blobs = list(self._client.list_blobs(self._bucket, prefix=start, **self._options))
        # TensorFlow and the console mark folders by empty objects whose names end in a slash.
        found = (
            Stored(blob.name.removeprefix(start), blob.size, blob.crc32c) for blob in blobs if blob.name[-1] != "/"
        )
        return {stored.name: stored for stored in found}

    def delete(self, name: str) -> None:
        with self._errors("delete", name), suppress(api.NotFound):
            self._blob(name).delete(**self._options)

    def child(self, prefix: str) -> GcsStore:
        below = "/".join(part for part in (self._prefix, prefix.strip("/")) if part)
        return GcsStore(self._client, self._bucket, below, self.variable, self._limit, parent=self)

    def _blob(self, name: str) -> storage.Blob:
        return self._client.bucket(self._bucket).blob(f"{self._prefix}/{name}" if self._prefix else name)

    @contextmanager
    def _errors(self, action: str, name: str) -> Iterator[None]:
        """Turn what the client raises into the job's errors, but for the answers "taken" and "not there".

        The client's own texts hold request addresses, with upload sessions in them, and are left out.
        """
        where = f"{self.uri}/{name}".rstrip("/")
        try:
            yield
        except api.PreconditionFailed:
            raise
        except api.NotFound:
            if action == "read":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from None
            message = f"could not {action} {where}: there is no bucket {self._bucket}; make it, or name another"
            raise ConfigError.of(self.variable, message) from None
        except (api.Unauthorized, api.Forbidden) as error:
            message = (
                f"no permission to {action} {where} (HTTP {error.code}); give the job's account the role "
                f"Storage Object User on bucket {self._bucket}, or set {_CREDENTIALS} to an account that has it"
            )
            raise ConfigError.of(self.variable, message) from None
        except api.ClientError as error:
            message = f"storage refused to {action} {where} (HTTP {error.code}); check bucket and prefix"
            raise ConfigError.of(self.variable, message) from None
        except (InvalidSchema, InvalidURL, MissingSchema):
            message = "storage cannot be reached at this address; give http://host:port, or unset it"
            raise ConfigError.of("STORAGE_EMULATOR_HOST", message) from None
        except google.auth.exceptions.GoogleAuthError as error:
            if error.retryable or isinstance(error, google.auth.exceptions.TransportError):
                raise self._unavailable(action, where, error) from None
            raise _no_credentials(error) from None
        except (api.GoogleAPIError, OSError, DataCorruption, json.JSONDecodeError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise self._unavailable(action, where, error) from None

    def _unavailable(self, action: str, where: str, error: Exception) -> UnavailableError:
        reason = _reason(getattr(error, "cause", None) or error)
        return UnavailableError(f"{where}: could not {action} within {self._limit:g} s ({reason}); try again later")


def _give_way(error: Exception) -> None:
    """Note a failure that is tried again, and free its connection: the library drops a refused download unread."""
    logger.warning("storage: %s; trying again", _reason(error))
    response = getattr(error, "response", None)
    if response is not None:
        response.close()


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return f"HTTP {status}" if status >= HTTPStatus.BAD_REQUEST else type(error).__name__


def _no_credentials(error: Exception) -> ConfigError:
    reason = error.args[0] if error.args else type(error).__name__
    advice = "set it to the path of a service account's key file, or run under an account of the cloud"
    return ConfigError.of(_CREDENTIALS, f"no usable Google credentials ({reason}); {advice}")


def open_store(uri: str, variable: str, limit: float = RETRY_SECONDS) -> Store:
    """Return the store at a local folder or gs://bucket/prefix. Nothing is read or written yet.

    Args:
        uri: a local path, or gs://bucket or gs://bucket/prefix.
        variable: the setting that ``uri`` comes from, named in ConfigError.
        limit: seconds for which an operation that fails is tried again.

    Raises:
        ConfigError: ``uri`` is neither, or there are no credentials.
    """
    if not uri.strip():
        raise ConfigError.of(variable, "is empty; give a local path or gs://bucket/prefix")
    if "://" not in uri:
        return LocalStore(Path(uri), variable)
    bucket, prefix = _bucket_and_key(uri, variable)
    try:
        # No project: it is only needed to list or make buckets.
        client = storage.Client(project=None)
    except google.auth.exceptions.GoogleAuthError as error:
        raise _no_credentials(error) from error
    store = GcsStore(client, bucket, prefix, variable, limit)
    weakref.finalize(store, client.close)
    return store


def _bucket_and_key(uri: str, variable: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("gs://").partition("/")
    if not uri.startswith("gs://") or not _BUCKET.fullmatch(bucket):
        message = f"got {public_uri(uri)!r}; accepted are a local path and gs://bucket/prefix"
        raise ConfigError.of(variable, message)
    return bucket, key.strip("/")


def fetch(uri: str, folder: Path, variable: str, limit: float = RETRY_SECONDS) -> Path:
    """Return a local file with the content of ``uri``: itself when it is local, else a download into ``folder``.

    Raises:
        ConfigError: there is no such file or object, or it may not be read.
        UnavailableError: it is out of reach.
    """
    if "://" not in uri:
        if not Path(uri).is_file():
            raise ConfigError.of(variable, f"there is no file {uri}; give the path or gs:// URI of one")
        return Path(uri)
    bucket, key = _bucket_and_key(uri, variable)
    parent, _, name = key.rpartition("/")
    if not name:
        raise ConfigError.of(variable, f"{public_uri(uri)} names a bucket; give gs://bucket/path/to/file")
    try:
        open_store(f"gs://{bucket}/{parent}", variable, limit).download(name, folder / name)
    except FileNotFoundError:
        raise ConfigError.of(variable, f"there is no object {public_uri(uri)}; check bucket and path") from None
    return folder / name
