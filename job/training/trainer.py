"""The one loop: an arm's phases over rows, whatever the arm."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from job.arms import Phase
from job.errors import Stopped
from job.machine.console import Console
from job.manifest import Epoch
from job.models.classifier import Classifier
from job.models.recalibration import Recalibrator
from job.settings.groups import TrainingSettings
from job.stopping import deferred
from job.training import checkpoints
from job.training.checkpoints import Checkpoint, Checkpoints, Progress
from job.training.compilation import Compilation, Mode
from job.training.epochs import PhaseRun
from job.training.feeds import Feeder, Residents
from job.training.stages import Stage
from job.training.steps import Steps

logger = logging.getLogger(__name__)

# At the end of training, so much of the work that may be lost is worth a checkpoint: many results take a second each.
_SHARE_AT_END = 0.25


@dataclass(frozen=True)
class Trained:
    """What training an arm gave beside the weights.

    images: examples stepped over. seconds: wall-clock time of it all, in every life of the run. examples_per_second: in
    the last phase's steps after the first call, which compiles, and without validation; NaN where there was no second
    call in this life. resumed: how often training went on from a checkpoint. xla: whether steps were compiled by XLA.
    """

    history: tuple[Epoch, ...]
    images: int
    seconds: float
    examples_per_second: float
    resumed: int = 0
    xla: bool = False


@dataclass(frozen=True)
class Saving:
    """Where the progress of one result is saved. result: its name there."""

    checkpoints: Checkpoints
    result: str


class Trainer:
    """Trains one classifier, result after result: what is compiled for one serves the next."""

    def __init__(
        self,
        name: str,
        classifier: Classifier,
        settings: TrainingSettings,
        console: Console,
        *,
        xla: Mode = "off",
        device_bytes: int | None = None,
        results: int = 1,
    ) -> None:
        """Take the classifier, whose variables may be set to other values between results, but not replaced.

        name: the arm's, for the log and the bar. xla: whether steps are compiled by XLA; auto where that is faster.
        device_bytes: that rows may take in the memory of a GPU; None on a CPU. results: how many are to be trained.
        """
        self.classifier = classifier
        self.name = name
        self._settings = settings
        self._console = console
        self._xla: Mode = xla
        self._results = results
        self._residents = Residents(classifier.replicas, device_bytes)
        self._steps: dict[Phase, tuple[Steps, Compilation]] = {}
        self._recalibrator: Recalibrator | None = None

    def train(
        self,
        stages: tuple[Stage, ...],
        seed: int,
        saving: Saving | None = None,
        told: Callable[[Sequence[Epoch]], None] | None = None,
    ) -> Trained:
        """Train the classifier in place through ``stages``, from its present values, and return the history.

        The order of the examples is a permutation drawn from (seed, epoch), and the last, smaller batch of an epoch is
        trained on too. ``history`` counts epochs through all phases from 1; ``told`` is called with it after each. With
        ``saving``, training goes on from the newest checkpoint that can be used, and ends bit-identical where every
        operation repeats bit for bit.

        Raises:
            Stopped: the process was asked to stop; ``saving`` then holds the state after the last step.
            ConfigError: the loss is not finite.
        """
        found = self._shared(saving.checkpoints.newest(saving.result, len(stages)) if saving else None)
        session = _Session(self, stages, seed, saving, found, told)
        total = sum(stage.phase.epochs * len(stage.index) for stage in stages)
        # state is whole between two steps, where stop_if_asked is called
        with deferred(), self._console.bar(self.name, total) as advance:
            advance(session.progress.images)
            try:
                session.train(advance)
            except Stopped:
                session.hold()
                raise
            session.end()
        self._results -= 1
        done = session.progress
        xla = self._xla == "on" or session.xla
        return Trained(done.history, done.images, done.seconds, session.examples_per_second, done.resumed, xla)

    def _shared(self, found: Checkpoint | None) -> Checkpoint | None:
        """Return the chief's checkpoint on every worker: the others may not see where it is kept."""
        replicas = self.classifier.replicas
        if replicas.workers == 1:
            return found
        content = replicas.from_chief(found.to_bytes() if found else b"")
        return Checkpoint.from_bytes(content) if content else None

    def log_epoch(self, epoch: Epoch, seed: int) -> None:
        """Tell of a validated epoch."""
        logger.info(
            "%s: epoch %d/%d (%s) train loss %.4f accuracy %.4f, validation loss %.4f accuracy %.4f, %.1f s",
            self.name, epoch.epoch, self._settings.epochs, epoch.phase, epoch.train_loss, epoch.train_accuracy,
            epoch.validation_loss, epoch.validation_accuracy, epoch.seconds,
            extra={"arm": self.name, "seed": seed, **epoch.model_dump()},
        )  # fmt: skip

    def steps(self, stage: Stage) -> Steps:
        """Return the compiled steps of ``stage``, at their beginning: one compilation serves all results."""
        if stage.phase not in self._steps:
            steps = Steps(
                self.classifier, stage, self._settings.optimizer, self._settings.batch_size, xla=self._xla != "off"
            )
            self._steps[stage.phase] = steps, Compilation(f"{self.name}, {stage.phase.name}", self._xla)
        steps, _ = self._steps[stage.phase]
        steps.reset(self._number(stage))
        return steps

    def phase_run(self, stage: Stage, steps: Steps, seed: int) -> PhaseRun:
        """Return what takes ``steps`` through epochs of ``stage``."""
        recalibrator = self.recalibrator(stage) if stage.phase.trains_batch_norm else None
        _, compilation = self._steps[stage.phase]
        compilation.further_steps = max(0, self._results - 1) * self._number(stage)
        batch_size, feeder = self._settings.batch_size, self.feeder(stage)
        return PhaseRun(self.classifier, stage, steps, compilation, feeder, batch_size, seed, recalibrator)

    def feeder(self, stage: Stage) -> Feeder:
        """Return what makes the calls of ``stage``."""
        replicas = self.classifier.replicas
        return Feeder(*stage.stepped, self._settings.batch_size, replicas, self._residents, len(stage.index))

    def _number(self, stage: Stage) -> int:
        return stage.phase.epochs * -(-len(stage.index) // self._settings.batch_size)

    def recalibrator(self, stage: Stage) -> Recalibrator | None:
        """Return what re-estimates BatchNorm statistics from rows of ``stage``; None where there is no BatchNorm."""
        if self._recalibrator is None and self.classifier.batch_norms():
            self._recalibrator = Recalibrator(self.classifier, stage.cut)
        return self._recalibrator


class _Session:
    """The training of one result, from the beginning or from a checkpoint."""

    def __init__(
        self,
        trainer: Trainer,
        stages: tuple[Stage, ...],
        seed: int,
        saving: Saving | None,
        found: Checkpoint | None,
        told: Callable[[Sequence[Epoch]], None] | None,
    ) -> None:
        self._trainer = trainer
        self._stages = stages
        self._seed = seed
        self._saving = saving
        self._found = found
        self._told = told
        self._before = found.progress if found else Progress()
        self._start = time.perf_counter()
        self._steps: Steps | None = None
        self._run: PhaseRun | None = None
        self.examples_per_second = math.nan
        self.xla = False

    @property
    def progress(self) -> Progress:
        """How far training has come by now."""
        run, before = self._run, self._before
        taken = run.done - before.phase_step if run else 0
        return replace(
            before,
            step=before.step + taken,
            phase_step=before.phase_step + taken,
            images=before.images + (run.images if run else 0),
            seconds=before.seconds + time.perf_counter() - self._start,
            epoch_seconds=run.epoch_seconds if run else before.epoch_seconds,
        )

    def train(self, advance: Callable[[int], None]) -> None:
        """Train from where the checkpoint ends to the end."""
        if self._found:
            checkpoints.assign(self._trainer.classifier.variables, self._found.arrays, "variable")
            logger.info(
                "%s: goes on after step %d, in epoch %d", self._trainer.name, self._before.step,
                len(self._before.history) + 1, extra={"resumed_at": self._before.step, "arm": self._trainer.name},
            )  # fmt: skip

        def stepped(images: int) -> None:
            advance(images)
            self.save_if_due()

        epochs_before = 0
        for number, stage in enumerate(self._stages):
            epochs_in = len(self._before.history) - epochs_before
            epochs_before += stage.phase.epochs
            if number < self._before.phase:
                continue
            self._steps = self._trainer.steps(stage)
            self._run = run = self._trainer.phase_run(stage, self._steps, self._seed)
            if self._before.phase_step and self._found:
                run.go_on(self._found.arrays, self._before.phase_step, epochs_in, self._before.epoch_seconds)
            elif number:
                # kept before the first step of a phase, which compiles and cannot be stopped
                self.hold()
            for _ in range(epochs_in, stage.phase.epochs):
                epoch = run.epoch(len(self._before.history) + 1, stepped)
                self._before = replace(self._before, history=(*self._before.history, epoch))
                self._trainer.log_epoch(epoch, self._seed)
                if self._told:
                    self._told(self._before.history)
            self.examples_per_second = run.examples_per_second
            self.xla |= run.xla
            self._before = replace(self.progress, phase=number + 1, phase_step=0, epoch_seconds=0.0)
            self._start = time.perf_counter()
            self._steps = self._run = None

    def save_if_due(self) -> None:
        """Begin to save the present state, if so much work would be lost without it."""
        if self._saving and self._saving.checkpoints.due():
            self._saving.checkpoints.save(self._saving.result, self._checkpoint())

    def end(self) -> None:
        """Have the trained state saved: evaluation and export follow, from which nothing can be saved."""
        if self._saving and self._saving.checkpoints.due(_SHARE_AT_END):
            self._saving.checkpoints.save(self._saving.result, self._checkpoint())
        else:
            self.hold()

    def hold(self) -> None:
        """Have the present state saved if the process is asked to stop."""
        if self._saving:
            self._saving.checkpoints.hold(self._saving.result, self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        arrays = checkpoints.copied(self._trainer.classifier.variables, "variable")
        return Checkpoint(self.progress, arrays | (self._steps.state() if self._steps else {}))
