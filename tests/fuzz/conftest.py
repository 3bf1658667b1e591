"""How many inputs are made up: a few hundred for each test and always the same; by ``make fuzz`` thousands, all new."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_COMMON = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("short", _COMMON, derandomize=True, max_examples=200)
settings.register_profile("long", _COMMON, max_examples=10_500, print_blob=True)
settings.load_profile("short")


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """An empty folder; in memory where that can be."""
    memory = Path("/dev/shm")  # noqa: S108
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)).resolve()
    yield folder
    shutil.rmtree(folder)
