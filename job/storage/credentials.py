"""Google's credentials: looked for, proven by a token, and waited for where they may be slow to appear.

GKE's documentation says that its metadata server takes a few seconds to answer a new pod (google-auth#604, #1261).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import google.auth
import google.auth.credentials
import google.auth.transport
import google.auth.transport.requests
from google.auth import compute_engine
from google.auth.exceptions import GoogleAuthError, TransportError

from job.errors import ConfigError, JobError, UnavailableError
from job.stopping import stop_if_asked

logger = logging.getLogger(__name__)

VARIABLE: Final = "GOOGLE_APPLICATION_CREDENTIALS"
WAIT_SECONDS: Final = 30.0
_PACE_SECONDS = 1.0
_LOOK_SECONDS = 0.5
_ABSENT = re.compile(r"File '?(.+?)'? was not found")
_NONE = re.compile("Your default credentials were not found")
_METADATA_SERVER = "the machine's metadata server"
_TOKEN_SERVICE = "the service that gives tokens"  # noqa: S105  (its name)


class NoCredentialsError(ConfigError):
    """There are none, and nobody named any."""


def find(scopes: Sequence[str], limit: float = WAIT_SECONDS) -> google.auth.credentials.Credentials:
    """Return the application's default credentials, with a token.

    Waited for is what somebody is about to provide: a file that is named and not there yet, and a metadata server
    that shows a sign of life. Where there is neither, as on a laptop without credentials, the answer comes at once.

    Args:
        scopes: what the token must be good for.
        limit: seconds to wait.

    Raises:
        NoCredentialsError: there are none.
        ConfigError: they are not accepted, or what GOOGLE_APPLICATION_CREDENTIALS names is not there.
        UnavailableError: the service that gives tokens for them is out of reach.
        Stopped: the process was asked to stop.
    """
    deadline = time.monotonic() + limit
    warned = False
    while True:
        attempt = _Attempt(scopes)
        attempt.start()
        while attempt.is_alive() and time.monotonic() < deadline:
            attempt.join(_LOOK_SECONDS)
            stop_if_asked()
        if attempt.credentials is not None:
            return attempt.credentials
        error = attempt.error or attempt.awaited
        if not isinstance(error, _NotYetError):
            raise refused(error) from error
        if time.monotonic() + _PACE_SECONDS >= deadline:
            raise error.final(limit) from error.__cause__
        if not warned:
            logger.warning("no Google credentials yet: waiting up to %g s for %s", limit, error.awaited)
            warned = True
        time.sleep(_PACE_SECONDS)


def refused(error: BaseException) -> ConfigError:
    """Return the error for credentials that are missing, malformed or not accepted."""
    # Only google.auth's own texts are fit for logs: an error of another kind may quote the file.
    first = str(error.args[0]) if isinstance(error, GoogleAuthError) and error.args else type(error).__name__
    return _no_credentials(first, NoCredentialsError if _NONE.match(first) else ConfigError)


def transient(error: BaseException) -> bool:
    """Return whether a later attempt to get a token may succeed."""
    return isinstance(error, GoogleAuthError) and bool(
        error.retryable or isinstance(error, TransportError) or isinstance(error.__cause__, TransportError)
    )


def _no_credentials(reason: str, kind: type[ConfigError]) -> ConfigError:
    advice = "set it to the path of a service account's key file, or run under an account of the cloud"
    return kind.of(VARIABLE, f"no usable Google credentials ({reason}); {advice}")


class _NotYetError(Exception):
    """There are no credentials, and there may be soon.

    awaited: what is to provide them. ``found`` is whether they are there and only the token is missing.
    """

    def __init__(self, awaited: str, *, found: bool = False) -> None:
        super().__init__(awaited)
        self.awaited, self.found = awaited, found

    def final(self, limit: float) -> JobError:
        """Return the error to end with when the wait is over."""
        if self.found:
            return UnavailableError(f"no answer from {self.awaited} within {limit:g} s; try again later")
        named = self.awaited != _METADATA_SERVER
        return _no_credentials(f"waited {limit:g} s for {self.awaited}", ConfigError if named else NoCredentialsError)


class _Request(google.auth.transport.requests.Request):
    """Google's own requests; ``answered`` says whether a server of Google's showed a sign of life.

    google.auth asks the metadata server's address on every machine. On a laptop that leads nowhere; other clouds have a
    server there that names another flavor, or none. A refused connection is one of GKE's servers before it listens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answered = False

    def __call__(self, *args: Any, **options: Any) -> google.auth.transport.Response:
        try:
            response: google.auth.transport.Response = super().__call__(*args, **options)  # type: ignore[no-untyped-call]
        except TransportError as error:
            self.answered |= _is_refusal(error)
            raise
        flavor = response.headers.get("metadata-flavor")
        self.answered |= flavor == "Google" or response.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return response


def _is_refusal(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


class _Attempt(threading.Thread):
    """One look for credentials. ``awaited``: what keeps it, as long as it lasts.

    google.auth waits and tries again by itself, half a minute in all where a metadata server refuses connections. It is
    let to, as it knows best, but in a thread that nobody has to wait for.
    """

    def __init__(self, scopes: Sequence[str]) -> None:
        super().__init__(name="credentials", daemon=True)
        self._scopes = scopes
        self.awaited = _NotYetError(_METADATA_SERVER)
        self.credentials: google.auth.credentials.Credentials | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.credentials = self._look()
        except Exception as error:  # a file of another shape, such as a list, gives errors of any kind
            self.error = error

    def _look(self) -> google.auth.credentials.Credentials:
        credentials, request = None, _Request()
        try:
            credentials, _ = google.auth.default(scopes=self._scopes, request=request)
            by_metadata = isinstance(credentials, compute_engine.Credentials)
            self.awaited = _NotYetError(_METADATA_SERVER if by_metadata else _TOKEN_SERVICE, found=True)
            credentials.refresh(request)  # type: ignore[no-untyped-call]
            _ = credentials.universe_domain  # the storage client wants it too: one more question to a metadata server
        except GoogleAuthError as error:
            if absent := _ABSENT.search(str(error)):
                raise _NotYetError(f"the file {absent[1]}") from error
            if credentials is None and request.answered:
                raise _NotYetError(_METADATA_SERVER) from error
            if credentials is None or not transient(error):
                raise
            if isinstance(credentials, compute_engine.Credentials):
                raise _NotYetError(_METADATA_SERVER) from error
            raise self.awaited from error
        return credentials
