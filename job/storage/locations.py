"""A place by its path or URI: the store there, or one file of it."""

from __future__ import annotations

import weakref
from pathlib import Path

from job.errors import ConfigError
from job.storage.gcs import RETRY_SECONDS, GcsStore, connect
from job.storage.local import LocalStore
from job.storage.store import Store
from job.uris import bucket_and_name, without_secrets


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
    bucket, prefix = _bucket_and_name(uri, variable)
    client = connect(limit)
    store = GcsStore(client, bucket, prefix, variable, limit)
    weakref.finalize(store, client.close)
    return store


def _bucket_and_name(uri: str, variable: str) -> tuple[str, str]:
    try:
        return bucket_and_name(uri)
    except ValueError as error:
        message = f"got {without_secrets(uri)!r}; accepted are a local path and gs://bucket/prefix: {error}"
        raise ConfigError.of(variable, message) from None


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
    bucket, key = _bucket_and_name(uri, variable)
    parent, _, name = key.rpartition("/")
    if not name:
        raise ConfigError.of(variable, f"{without_secrets(uri)} names a bucket; give gs://bucket/path/to/file")
    try:
        open_store(f"gs://{bucket}/{parent}", variable, limit).download(name, folder / name)
    except FileNotFoundError:
        raise ConfigError.of(variable, f"there is no object {without_secrets(uri)}; check bucket and path") from None
    return folder / name
