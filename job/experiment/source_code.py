"""Which code this is: a digest of the job's own files, since a version number outlives many a change."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# What decides how the job works: its modules, and the templates of what it writes.
_PATTERNS = ("**/*.py", "results/templates/*.j2", "results/templates/*.css")


@cache
def digest() -> str:
    """Return the sha256, in hex, of the job's own files, by their names and contents.

    It is the same wherever and however the package is installed.
    """
    return digest_of(_PACKAGE)


def digest_of(package: Path) -> str:
    """Return the :func:`digest` of the package in this folder. Compiled and foreign files do not count."""
    files = {path.relative_to(package).as_posix(): path for pattern in _PATTERNS for path in package.glob(pattern)}
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        whole.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()
