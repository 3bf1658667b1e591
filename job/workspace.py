"""Local scratch space that is removed at the end of the process, or by the next one where that was killed."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from job.errors import ConfigError

logger = logging.getLogger(__name__)

_PREFIX = "transfer-"
_LOCK = "in-use"


@contextmanager
def workspace(cache_dir: str | None) -> Iterator[Path]:
    """Yield a fresh folder on local disk, below ``cache_dir`` if given; it is removed at the end.

    Folders that killed processes left beside it are removed first: decoded photos can fill a disk.

    Raises:
        ConfigError: no folder can be made there.
    """
    try:
        parent = Path(cache_dir or tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = _locked(folder)
    except OSError as error:
        raise ConfigError.of(
            "TRANSFER_CACHE_DIR",
            f"no folder can be made in {cache_dir or tempfile.gettempdir()}: {error.strerror}. "
            "Give a folder on a local disk that can be written",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int:
    """Mark ``folder`` as in use while this process lives; return the open file that does."""
    # the mark gets its name only when it is locked: without a name it is no reason to remove the folder
    file = os.open(folder / f".{_LOCK}", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    (folder / f".{_LOCK}").rename(folder / _LOCK)
    return file


def _remove_abandoned(parent: Path) -> None:
    for mark in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):  # another user's, or in use
            file = os.open(mark, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                logger.info("removing %s, which a killed process left", mark.parent)
                shutil.rmtree(mark.parent, ignore_errors=True)
            finally:
                os.close(file)
