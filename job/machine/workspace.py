"""Local scratch space that is removed at the end of the process, or by the next one where that was killed."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from job.errors import ConfigError
from job.local_files import create_locked, locked_if_abandoned

logger = logging.getLogger(__name__)

_PREFIX = "transfer-"
_MARK = "in-use"


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
        mark = _mark(folder)
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
        mark.close()


def _mark(folder: Path) -> BinaryIO:
    """Mark ``folder`` as in use for as long as this process lives or the file that is returned is open."""
    # the mark gets its name only when it is locked: without a name it is no reason to remove the folder
    file = create_locked(folder / f".{_MARK}")
    (folder / f".{_MARK}").rename(folder / _MARK)
    return file


def _remove_abandoned(parent: Path) -> None:
    for mark in parent.glob(f"{_PREFIX}*/{_MARK}"):
        with locked_if_abandoned(mark) as abandoned:
            if abandoned:
                logger.info("removing %s, which a killed process left", mark.parent)
                shutil.rmtree(mark.parent, ignore_errors=True)
