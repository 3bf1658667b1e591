"""The store over gs://: checksums both ways, bounded retries, create-only commits.

The only module that knows the storage client. No message of its errors holds a query string or an upload session:
both are secrets.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import mimetypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO

import google.auth.exceptions
from google.api_core import exceptions as api
from google.api_core.retry import Retry
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

from job.errors import ConfigError, UnavailableError
from job.local_files import appearing
from job.storage import credentials
from job.storage.store import THREADS, Digest, Store, Stored, checksums, measure

logger = logging.getLogger(__name__)

# Storage outages are mostly seconds long; beyond two minutes the scheduler's own retry, which also moves the job to
# another machine, helps more than waiting on one that is paid for by the minute.
RETRY_SECONDS = 120.0
# A request that hears nothing for so long has been lost; within the limit there is room for others.
_REQUEST_SECONDS = 30.0
# A chunk that is interrupted is sent again as a whole.
_CHUNK = 16 << 20
# So often an upload begins anew whatever time it took: a large one may lose its session when the limit has long passed.
_NEW_SESSIONS = 2
_GOOGLE = "https://storage.googleapis.com"


class GcsStore(Store):
    """A prefix in a bucket of Google Cloud Storage, or of the emulator that STORAGE_EMULATOR_HOST names."""

    def __init__(
        self, client: storage.Client, bucket: str, prefix: str, variable: str, limit: float, parent: Store | None = None
    ) -> None:
        super().__init__("/".join(part for part in ("gs:/", bucket, prefix) if part), variable)
        self._client, self._bucket, self._prefix, self._limit = client, bucket, prefix, limit
        self._start = f"{prefix}/" if prefix else ""  # of the names of its objects
        self._parent = parent  # whose end closes the client
        # Waits grow with the limit, so that a short limit too leaves room for several attempts.
        first, longest = min(1.0, limit / 16), limit / 8
        pace: dict[str, Any] = {"initial": first, "maximum": longest, "timeout": limit, "on_error": _give_way}
        self._options: dict[str, Any] = {
            "retry": Retry(_worth_a_retry, **pace),
            "timeout": min(_REQUEST_SECONDS, limit / 2),
        }
        # The library reads the answer to an upload when its own retries are over, and never sends or fetches again what
        # arrived damaged.
        self._again = Retry(_worth_a_new_start, **pace)

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
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        how = {"content_type": content_type, "checksum": "crc32c", **self._options}
        size, _, crc32c = measured

        def sent(new_sessions: int = _NEW_SESSIONS) -> storage.Blob:
            blob = self._blob(name)
            blob.chunk_size = _CHUNK
            try:
                send(blob, how)
            except api.GoogleAPICallError as error:
                if not new_sessions or not _is_lost_session(error):
                    raise
                _give_way(error)
                return sent(new_sessions - 1)
            return blob

        def attempt() -> None:
            blob = sent()
            if blob.size != size or blob.crc32c not in (crc32c, None):
                # Google refuses what does not have the announced checksum; others need to be asked for their own
                with suppress(api.NotFound, api.PreconditionFailed):
                    blob.delete(if_generation_match=blob.generation, **self._options)
                raise DataCorruption(None, f"{blob.size} bytes with crc32c {blob.crc32c}")

        with self._errors("write", name):
            self._again(attempt)()
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
        with self._errors("read", name, target), appearing(target, os.replace) as file:
            self._receive(name, file, target)

    def _receive(self, name: str, file: BinaryIO | None = None, target: Path | None = None) -> tuple[int, str, str]:
        def attempt() -> tuple[int, str, str]:
            blob, digest = self._blob(name), Digest(file)
            if file is not None:
                file.seek(0)
                file.truncate()
            blob.download_to_file(digest, checksum="crc32c", **self._options)
            # The library leaves a download unchecked when it had to resume it.
            if blob.crc32c not in (digest.result()[2], None):
                raise DataCorruption(None, f"{digest.result()[0]} bytes with another crc32c than {blob.crc32c}")
            return digest.result()

        with self._errors("read", name, target):
            measured: tuple[int, str, str] = self._again(attempt)()
        return measured

    def list(self) -> dict[str, Stored]:
        # TensorFlow and the console mark folders by empty objects whose names end in a slash.
        objects = [blob for blob in self._blobs() if not blob.name.endswith("/")]
        names = [blob.name.removeprefix(self._start) for blob in objects]
        return {name: Stored(name, blob.size, blob.crc32c) for name, blob in zip(names, objects, strict=True)}

    def is_empty(self) -> bool:
        return not self._blobs(1)  # of a bucket there may be millions

    def _blobs(self, most: int | None = None) -> builtins.list[storage.Blob]:
        with self._errors("list", ""):
            return list(self._client.list_blobs(self._bucket, prefix=self._start, max_results=most, **self._options))

    def delete(self, name: str) -> None:
        with self._errors("delete", name), suppress(api.NotFound):
            self._blob(name).delete(**self._options)

    def copy(self, name: str, source: Store, source_name: str) -> Stored:
        if not isinstance(source, GcsStore):
            return super().copy(name, source, source_name)
        original, target = source._blob(source_name), self._blob(name)
        with source._errors("read", source_name):
            original.reload(**self._options)
        target.content_type = original.content_type
        with self._errors("write", name):
            try:
                token, *_ = target.rewrite(source._blob(source_name), **self._options)
                while token:  # the server copies what is large, or lies in another region, in several requests
                    token, *_ = target.rewrite(source._blob(source_name), token=token, **self._options)
            except api.NotFound:
                with source._errors("read", source_name):  # was it the source that has gone, or is it our bucket?
                    source._blob(source_name).reload(**self._options)
                raise
        if (target.size, target.crc32c) != (original.size, original.crc32c):
            raise UnavailableError(f"{source.uri}/{source_name} changed while it was copied to {self.uri}; try again")
        return Stored(name, target.size, target.crc32c)

    def delete_all(self) -> None:
        names = [blob.name.removeprefix(self._start) for blob in self._blobs()]
        pool = ThreadPoolExecutor(THREADS)
        try:
            list(pool.map(self.delete, names))
        finally:
            pool.shutdown(cancel_futures=True)

    def child(self, prefix: str) -> GcsStore:
        below = "/".join(part for part in (self._prefix, prefix.strip("/")) if part)
        return GcsStore(self._client, self._bucket, below, self.variable, self._limit, parent=self)

    def _blob(self, name: str) -> storage.Blob:
        return self._client.bucket(self._bucket).blob(self._start + name)

    @contextmanager
    def _errors(self, action: str, name: str, target: Path | None = None) -> Iterator[None]:
        """Turn what the client raises into the job's errors, but for the answers "taken" and "not there".

        The client's own texts hold request addresses, with upload sessions in them, and are left out.
        """
        where = f"{self.uri}/{name}".rstrip("/") + (f" into {target}" if target else "")
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
            role = f"Storage Object {'Viewer' if action in ('read', 'list') else 'User'}"
            message = (
                f"no permission to {action} {where} (HTTP {error.code}); give the job's account the role "
                f"{role} on bucket {self._bucket}, or set {credentials.VARIABLE} to an account that has it"
            )
            raise ConfigError.of(self.variable, message) from None
        except api.ClientError as error:
            message = f"storage refused to {action} {where} (HTTP {error.code}); check bucket and prefix"
            raise ConfigError.of(self.variable, message) from None
        except (InvalidSchema, InvalidURL, MissingSchema):
            message = "storage cannot be reached at this address; give http://host:port, or unset it"
            raise ConfigError.of("STORAGE_EMULATOR_HOST", message) from None
        except google.auth.exceptions.GoogleAuthError as error:
            if credentials.transient(error):
                raise self._unavailable(action, where, error) from None
            raise credentials.refused(error) from None
        except (api.GoogleAPIError, OSError, DataCorruption, json.JSONDecodeError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise self._unavailable(action, where, error) from None

    def _unavailable(self, action: str, where: str, error: Exception) -> UnavailableError:
        reason = _reason(getattr(error, "cause", None) or error)
        return UnavailableError(f"{where}: could not {action} within {self._limit:g} s ({reason}); try again later")


def _worth_a_retry(error: Exception) -> bool:
    """Choose as the library does, of whose choice there is no copy with another on_error, and what it leaves out.

    An answer cut short surfaces as a bare JSONDecodeError, a token that could not be refreshed for now as RefreshError.
    """
    return DEFAULT_RETRY._predicate(error) or isinstance(error, json.JSONDecodeError) or credentials.transient(error)


def _worth_a_new_start(error: Exception) -> bool:
    # Google's answer to an upload that arrived with another checksum than announced is 400 and names the checksum.
    refused = isinstance(error, api.BadRequest) and "crc32c" in str(error).lower()
    return refused or _is_lost_session(error) or isinstance(error, json.JSONDecodeError | DataCorruption)


def _is_lost_session(error: Exception) -> bool:
    """Return whether an upload session has ended before its object was whole: another one has to begin."""
    if not isinstance(error, api.GoogleAPICallError) or error.code not in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return False
    # The client sends by PUT to sessions only. To its other requests 404 means that there is no bucket, or object.
    return getattr(getattr(error.response, "request", None), "method", None) == "PUT"


def _give_way(error: Exception) -> None:
    """Note a failure that is tried again, and free its connection: the library drops a refused download unread."""
    logger.warning("storage: %s; trying again", _reason(error))
    response = getattr(error, "response", None)
    if response is not None:
        response.close()


def _reason(error: Exception) -> str:
    if isinstance(error, DataCorruption):
        return "it arrived damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return f"HTTP {status}" if status >= HTTPStatus.BAD_REQUEST else type(error).__name__


def connect(limit: float) -> storage.Client:
    """Return a client of Google's storage, or of the emulator that STORAGE_EMULATOR_HOST names.

    limit: seconds for which credentials that are not there yet are waited for at most.

    Raises:
        ConfigError: there are no credentials.
    """
    with closing(storage.Client.create_anonymous_client()) as anonymous:
        elsewhere = anonymous.api_endpoint != _GOOGLE
    found = None  # an emulator needs none
    if not elsewhere:
        found = credentials.find(storage.Client.SCOPE, min(credentials.WAIT_SECONDS, limit))
    try:
        # No project: it is only needed to list or make buckets.
        return storage.Client(project=None, credentials=found)
    except google.auth.exceptions.GoogleAuthError as error:
        raise credentials.refused(error) from error
