"""URIs and paths as settings give them: what may be shown of one, and the bucket and the name in it."""

from __future__ import annotations

import re

# One slash is enough to tell a URI: gs:/bucket is what joining paths leaves of gs://bucket.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET = re.compile(r"(?=.{3,222}$)(?!\d+\.\d+\.\d+\.\d+$)[a-z0-9][a-z0-9_-]{0,62}(\.[a-z0-9_-]{1,63})*(?<=[a-z0-9])")


def is_uri(place: str) -> bool:
    """Return whether ``place`` is a URI, well formed or not, and no local path."""
    return _SCHEME.match(place) is not None


def bucket_and_name(uri: str) -> tuple[str, str]:
    """Return the bucket of a ``gs://`` URI, and the name or prefix in it without slashes at its ends; perhaps "".

    Raises:
        ValueError: it is another URI or none, or the bucket cannot have this name; the message says which.
    """
    if not uri.startswith("gs://"):
        raise ValueError("the only URIs are gs://bucket or gs://bucket/prefix")
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            "the bucket's name is not valid (3 to 63 lower-case letters, digits, '-', '_' and '.', "
            "a letter or digit at both ends)"
        )
    return bucket, name.strip("/")


def without_secrets(place: str) -> str:
    """Return a URI without user, password, query and fragment, and a path without a signed query: fit for logs."""
    if "://" in place:
        return re.sub(r"[?#].*", "", re.sub(r"(?<=://)[^/]*@", "", place), flags=re.DOTALL)
    return re.sub(r"\?.*=.*", "", place, flags=re.DOTALL)
