"""Access to a data set's storage: asked for before TensorFlow reads, and what TensorFlow raises in the job's words.

TensorFlow's gs:// client takes itself for nobody where it gets no token, and of some of its errors TFDS makes "no such
data set". So the job's own client asks first: it knows why it is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tensorflow as tf

from job.errors import ConfigError, JobError, UnavailableError, first_line
from job.settings.environment import skip_metadata_server
from job.storage import credentials
from job.storage.gcs import RETRY_SECONDS
from job.storage.locations import open_store

logger = logging.getLogger(__name__)

DESCRIPTION = "dataset_info.json"

_AGAIN_SECONDS = 20.0
_REFUSED = (tf.errors.PermissionDeniedError, tf.errors.UnauthenticatedError)
# What a retry does not mend either; everything else that TensorFlow raises while reading may pass.
_LASTING = (tf.errors.NotFoundError, tf.errors.UnimplementedError)
# TensorFlow quotes the whole answer, and libcurl's advice.
_REASON = re.compile(r"HTTP response code (\d+)|meaning '([^']+)'")


@dataclass(frozen=True)
class Place:
    """Where a data set lies, or is looked for.

    uri: local path or gs:// URI. variable: the setting that chose it. is_prepared: whether it is said to be the folder
    of one prepared data set, which has a ``DESCRIPTION``; else it is searched.
    """

    uri: str
    variable: str
    is_prepared: bool

    def ask(self, limit: float = RETRY_SECONDS) -> bool:
        """Ask whether the job's account may read here; return whether there is an answer.

        There is none of a local folder, nor where the job has no account: what is public TensorFlow reads without.

        Args:
            limit: seconds for which storage that fails is asked again.

        Raises:
            ConfigError: there is no such bucket, or it may not be read.
            UnavailableError: storage is out of reach.
        """
        if not self.uri.startswith("gs://"):
            return False
        try:
            store = open_store(self.uri, self.variable, limit)
        except credentials.NoCredentialsError as error:
            logger.warning("%s is read without credentials: %s", self.uri, error)
            skip_metadata_server()
            return False
        # The rights to read objects and to list them are two. The folder of a data set is not listed if all is well.
        if not self.is_prepared or store.read(DESCRIPTION) is None:
            store.is_empty()
        return True

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turn what TensorFlow's file systems raise, TFDS's wrapping removed, into errors with an exit code.

        what: what is read in the block, for messages.
        """
        try:
            yield
        except JobError:
            raise
        except Exception as error:
            found = storage_error(error)
            if found is None:
                raise
            raise self._in_words(found, what) from error

    def _in_words(self, found: tf.errors.OpError, what: str) -> JobError:
        reason = _reason(found)
        if isinstance(found, _REFUSED):
            if self.ask(_AGAIN_SECONDS):
                return UnavailableError(
                    f"{what} could not be read: TensorFlow was refused ({reason}) and the job's account is not, so it "
                    "had no token, which it takes by a key, a login or a metadata server; try again later"
                )
            message = f"no permission to read {what} ({reason})"
            if self.uri.startswith("gs://"):
                message += (
                    "; give the job's account the role Storage Object Viewer on the bucket, or set "
                    f"{credentials.VARIABLE} to an account that has it"
                )
            return ConfigError.of(self.variable, message)
        if isinstance(found, _LASTING):
            self.ask(_AGAIN_SECONDS)  # TensorFlow says so too of a folder that it could not ask for
            return ConfigError.of(self.variable, f"{what} cannot be read: {reason}")
        return UnavailableError(f"{what} could not be read to its end: {reason}; try again later")


def storage_error(error: BaseException | None) -> tf.errors.OpError | None:
    """Return what TensorFlow raised, where ``error`` is that or what TFDS made of it."""
    while isinstance(error, RuntimeError | OSError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, tf.errors.OpError) else None


def _reason(error: tf.errors.OpError) -> str:
    if not (said := _REASON.search(error.message)):
        return first_line(error)
    status, by_curl = said.groups()
    return f"HTTP {status}" if status else str(by_curl)
