"""The published run's best SavedModel, put where the platform wants it (AIP_MODEL_DIR)."""

from __future__ import annotations

import logging
import random
import time

from job.errors import UnavailableError
from job.manifest import Artifact, Manifest
from job.storage.finished import at_once
from job.storage.store import Store
from job.storage.verification import differences

logger = logging.getLogger(__name__)

# The folders that a SavedModel may have: https://www.tensorflow.org/guide/saved_model
_FOLDERS = ("variables", "assets", "assets.extra")
_ATTEMPTS = 6


def deliver(run: Store, manifest: Manifest, target: Store) -> None:
    """Have the SavedModel with the best validation accuracy lie directly in ``target``, whole and alone.

    It replaces the model of another run. Where two runs write at the same time, each looks again after its last file,
    and begins anew if it finds one of the other's: so the later one's model stays, and never a mixture.

    Raises:
        ConfigError, UnavailableError: as the stores raise them.
        UnavailableError: other files appear again and again.
    """
    best = max(manifest.results, key=lambda result: result.metrics.validation.accuracy).saved_model
    start = f"{best}/"
    wanted = [
        artifact.model_copy(update={"path": artifact.path.removeprefix(start)})
        for artifact in manifest.artifacts
        if artifact.path.startswith(start)
    ]

    def copy(artifact: Artifact) -> None:
        target.copy(artifact.path, run, start + artifact.path)

    for attempt in range(_ATTEMPTS):
        strangers = _strangers(target, wanted)
        if not strangers and not any(differences(wanted, target)):
            if attempt:
                logger.info("the best model, %s, lies in %s", best, target.uri)
            return
        if attempt > 1:
            time.sleep(random.uniform(0, 2 ** (attempt - 1)))  # noqa: S311 - two that wait equally long meet again
        at_once(copy, wanted)
        for name in strangers:
            logger.warning("%s/%r is of another model: it is removed", target.uri, name)
            target.delete(name)
    raise UnavailableError(f"{target.uri} (AIP_MODEL_DIR) changes while the model is put there; try again later")


def _strangers(target: Store, wanted: list[Artifact]) -> list[str]:
    """Return the names of files that a loader would take for parts of the model."""
    ours = {artifact.path for artifact in wanted}
    return [name for name in target.list() if name.partition("/")[0] in _FOLDERS and "/" in name and name not in ours]
