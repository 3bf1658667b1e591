"""The stores that a run writes to, opened and tried before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from job.errors import ConfigError, Problem
from job.manifest import PENDING
from job.settings.environment import Settings
from job.storage.locations import open_store
from job.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where one run's things go.

    run: its own place, which is published. checkpoints: where its unfinished work is kept. model: where AIP_MODEL_DIR
    wants the best model. tensorboard: where AIP_TENSORBOARD_LOG_DIR wants the run's event files.
    """

    run: Store
    checkpoints: Store
    model: Store | None
    tensorboard: Store | None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Where the runs go that these settings begin. checkpoints: None where they lie under the run itself."""

    output: Store
    checkpoints: Store | None
    model: Store | None
    tensorboard: Store | None

    def of(self, run_id: str) -> Places:
        """Return the places of one run."""
        run = self.output.child(run_id)
        # elsewhere not under the run's own name: what lies there is removed, and the place may be that of the runs
        apart = self.checkpoints and self.checkpoints.child(f"{run_id}.checkpoints")
        return Places(
            run=run,
            checkpoints=apart or run.child(PENDING),
            model=self.model,
            tensorboard=self.tensorboard.child(run_id) if self.tensorboard else None,
        )


def open_places(settings: Settings) -> Opened:
    """Open and probe every place that is written to.

    Raises:
        ConfigError: with all that is wrong with them together.
        UnavailableError: one is out of reach.
    """
    output, on_platform = settings.output, settings.platform
    problems: list[Problem] = []

    def opened(uri: str, variable: str) -> Store | None:
        try:
            store = open_store(uri, variable)
            store.probe()
        except ConfigError as error:
            problems.extend(error.problems)
            return None
        return store

    def if_given(uri: str | None, variable: str) -> Store | None:
        return opened(uri, variable) if uri is not None else None

    store = opened(output.output_uri, "TRANSFER_OUTPUT_URI")
    variable = "TRANSFER_CHECKPOINT_URI" if output.checkpoint_uri else "AIP_CHECKPOINT_DIR"
    checkpoints = if_given(output.checkpoint_uri or on_platform.checkpoint_dir, variable)
    model = if_given(on_platform.model_dir, "AIP_MODEL_DIR")
    tensorboard = if_given(on_platform.tensorboard_log_dir, "AIP_TENSORBOARD_LOG_DIR")
    if store is None or problems:
        raise ConfigError(problems)
    return Opened(output=store, checkpoints=checkpoints, model=model, tensorboard=tensorboard)
