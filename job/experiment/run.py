"""The order of things: plan, decode, then per result train, evaluate, export, upload; the manifest last."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from job import manifest
from job.data import duplicates, reading
from job.data.rows import Rows
from job.errors import ConfigError, JobError
from job.experiment import artifacts, cap, estimate
from job.experiment.plan import Plan, make_plan
from job.experiment.result import Experiment, result_name
from job.machine.console import Console
from job.machine.replicas import Replicas
from job.machine.runtime import Runtime
from job.machine.workspace import workspace
from job.manifest import MANIFEST
from job.results import comparisons
from job.settings.environment import Settings
from job.stopping import stop_if_asked
from job.storage import commit, delivery
from job.storage.finished import Finished, Pending
from job.storage.store import Store
from job.training.checkpoints import Checkpoints
from job.training.live_tensorboard import Board

logger = logging.getLogger(__name__)


def run(settings: Settings, machine: Runtime, console: Console, began: float | None = None) -> str:
    """Run the whole comparison and publish it; return the URI of the manifest.

    A run that is already published with the same fingerprint is verified instead; one that was killed goes on from
    where it was saved. Of several workers the chief alone publishes; all return when it has. Raises the errors of the
    steps.

    Args:
        settings: of the run.
        machine: that computes it.
        console: shows how it goes.
        began: when the process did, by time.monotonic(): now, if None. A cap counts from there.
    """
    began = time.monotonic() if began is None else began
    replicas = machine.replicas
    with workspace(settings.runtime.cache_dir) as folder, replicas.together():
        plan = make_plan(settings, machine, folder)
        uri = f"{plan.places.run.uri}/{MANIFEST}"
        logger.info("run %s", plan.run_id, extra={"run_id": plan.run_id, "fingerprint": plan.fingerprint})
        if _is_published(plan, uri, commit.completed):
            return uri
        account = cap.account(settings.output, plan.places.checkpoints, plan.fingerprint, began, replicas)
        with account.open():
            start = time.perf_counter()
            pixels = _decode(plan, folder, console)
            found = _duplicates(pixels, replicas)
            data_seconds = time.perf_counter() - start
            # only now: what is refused until here has begun nothing, and the same id may be tried with other settings
            if _is_published(plan, uri, commit.begin):
                account.close()
                return uri
            if not replicas.is_chief:
                _help(plan, Experiment(plan, pixels, data_seconds, folder, console))
                return uri
            saving = Checkpoints(plan.places.checkpoints, plan.fingerprint, settings.output.checkpoint_seconds, folder)
            board = Board(plan.places.tensorboard, settings.resolved(), folder)
            with saving.open(), board.open():
                experiment = Experiment(plan, pixels, data_seconds, folder, console, saving, board)
                finished = _results(plan, experiment, saving, account)
        _publish(plan, artifacts.record(plan, pixels, finished, found), finished, pixels, folder, console)
        return uri


def _is_published(plan: Plan, uri: str, look: Callable[[Store, str], bool]) -> bool:
    """Return whether the run is published, as the chief sees it: by ``look``, given its store and fingerprint."""
    replicas, published = plan.runtime.replicas, False
    if replicas.is_chief:
        published = look(plan.places.run, plan.fingerprint)
        if published:
            _tidy(plan)
            _deliver(plan)
            logger.info("already published and verified: %s", uri)
    return bool(replicas.from_chief(b"published" if published else b""))


def _deliver(plan: Plan) -> None:
    """Put the published model where the platform wants it: whoever ends with 0 leaves it there."""
    published = commit.read_manifest(plan.places.run)
    if plan.places.model is not None and published is not None:
        delivery.deliver(plan.places.run, published, plan.places.model)


def _publish(
    plan: Plan,
    record: manifest.Manifest,
    finished: Sequence[Finished],
    pixels: dict[str, Rows],
    folder: Path,
    console: Console,
) -> None:
    uri = f"{plan.places.run.uri}/{MANIFEST}"
    logger.info("writing the report")
    artifacts.write(record, pixels["test"], folder / "publication")
    stop_if_asked()
    place, written = Pending(plan.places.run, plan.fingerprint).add_files(folder / "publication")
    places = [(each.place, each.artifacts) for each in finished] + [(place, tuple(written))]
    everything = (each for _, some in places for each in some)
    record = record.model_copy(update={"artifacts": tuple(sorted(everything, key=lambda artifact: artifact.path))})
    stop_if_asked()
    logger.info("committing")
    if commit.commit(plan.places.run, record, places) is commit.Outcome.ALREADY_PUBLISHED:
        logger.info("another run published the same meanwhile: %s", uri)
        record = commit.read_manifest(plan.places.run) or record
    _tidy(plan)
    _deliver(plan)
    _summary(record, console)
    logger.info("report: %s/%s", plan.places.run.uri, artifacts.REPORT)
    logger.info("published %s", uri, extra={"manifest": uri})


def plan(settings: Settings, machine: Runtime, console: Console) -> None:
    """Make every check that :func:`run` makes before training, and print what was found and what it would cost."""
    with workspace(settings.runtime.cache_dir) as folder:
        found = estimate.report(make_plan(settings, machine, folder), folder)
    if console.rich is None:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        console.table("plan", ("what", "found"), list(estimate.rows(found)))
    if problems := cap.problems(cap.caps_of(settings.output), found["spent"], found["left"]):
        raise ConfigError(problems)


def _tidy(plan: Plan) -> None:
    """Remove the unfinished work of a run that is published."""
    commit.tidy(plan.places.run)
    try:
        plan.places.checkpoints.delete_all()
    except JobError as error:
        logger.warning("published, but checkpoints are left over: %s", error)


def _decode(plan: Plan, folder: Path, console: Console) -> dict[str, Rows]:
    settings = plan.settings
    total = sum(split.examples for split in plan.source.splits.values())
    with console.bar("decoding", total) as advance:
        return reading.read_splits(
            plan.source,
            settings.model.image_size,
            folder,
            settings.data.max_bad_images,
            lambda _done, _total: advance(1),
            plan.runtime.replicas,
            plan.decoding,
        )


def _duplicates(pixels: dict[str, Rows], replicas: Replicas) -> duplicates.Found:
    found = duplicates.find(pixels, replicas)
    if found.count:
        logger.warning(
            "%d photos lie in more than one split: test accuracies may be too high (the report lists them)",
            found.count,
            extra={"duplicates": found.count},
        )
    return found


def _results(plan: Plan, experiment: Experiment, saving: Checkpoints, account: cap.Account) -> list[Finished]:
    training, replicas = plan.settings.training, plan.runtime.replicas
    pending = Pending(plan.places.run, plan.fingerprint)
    found: list[Finished] = []
    account.follow(lambda: _share(plan, found, saving))
    for arm, fraction, seed in _wanted(plan):
        stop_if_asked()
        name = result_name(arm, fraction, seed)
        finished = pending.find(name)
        replicas.from_chief(b"finished" if finished else b"")
        if finished is None:
            outcome = experiment.result(arm, fraction, seed)
            logger.info("%s: storing", arm, extra={"arm": arm, "seed": seed})
            finished = pending.add(name, outcome.folder, outcome.record, outcome.test.correct)
            shutil.rmtree(outcome.folder)
        else:
            logger.info("%s: fraction %g, seed %d: finished before", arm, fraction, seed, extra={"arm": arm})
        saving.forget(name)
        found.append(finished)
    return sorted(found, key=lambda each: (each.result.train_fraction, training.seeds.index(each.result.seed)))


def _share(plan: Plan, finished: Sequence[Finished], saving: Checkpoints) -> float:
    """Return how much of all results' training is done, by the examples stepped over."""
    examples = sum(plan.train_examples(fraction) for _, fraction, _ in _wanted(plan))
    done = sum(each.result.train_examples for each in finished)
    return (done + saving.images / plan.settings.training.epochs) / examples


def _help(plan: Plan, experiment: Experiment) -> None:
    """Train along with the chief, which knows what is finished, and leave the results to it."""
    for arm, fraction, seed in _wanted(plan):
        stop_if_asked()
        if not plan.runtime.replicas.from_chief(b""):
            experiment.assist(arm, fraction, seed)


def _wanted(plan: Plan) -> Iterator[tuple[str, float, int]]:
    """Yield arm, fraction and seed of every result.

    An arm's results follow each other: what was compiled for the first serves the others.
    """
    training = plan.settings.training
    return itertools.product(training.arms, plan.settings.data.train_fractions, training.seeds)


def _summary(record: manifest.Manifest, console: Console) -> None:
    dataset, backbone = record.dataset, record.backbone
    title = f"{dataset.name} {dataset.version}, {dataset.splits.test.examples:,} test examples, "
    title += f"{backbone.name} at {backbone.image_size} px"
    over_seeds = any(len(each.seeds) > 1 for each in record.summaries)
    columns, rows = _by_arm(record) if over_seeds else _by_result(record)
    if any(result.cost is None for result in record.results):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    console.table(title, columns, rows)
    seconds = [result.seconds for result in record.results]
    decoding, features = sum(each.data for each in seconds), sum(each.features for each in seconds)
    logger.info(
        "beside their own, results share %.0f s of decoding and %.0f s of frozen layers: %.0f s in all",
        decoding, features, sum(each.total for each in seconds),
    )  # fmt: skip
    logger.info("%s", record.verdict)


def _by_result(record: manifest.Manifest) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows with every result; the cost comes last."""
    labels = comparisons.labels(record.results)
    columns = ["arm", "train", "trainable", "test accuracy", "95% interval", "test loss"]
    columns += ["own seconds", "images/s", "own cost"]
    return columns, [
        [
            labels(result),
            f"{result.train_examples:,}",
            f"{result.parameters.trainable:,}",
            f"{result.metrics.test.accuracy:.4f}",
            _interval(result.metrics.test.accuracy_interval),
            f"{result.metrics.test.loss:.4f}",
            f"{comparisons.own_seconds(result):.0f}",
            f"{result.examples_per_second:.0f}",
            f"{comparisons.own_cost(result) or 0:.4f}",
        ]
        for result in record.results
    ]


def _by_arm(record: manifest.Manifest) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows with the means over seeds; the cost comes last."""
    columns = ["arm", "train", "seeds", "test accuracy", "95% interval", "own seconds each", "own cost each"]
    return columns, [
        [
            each.arm,
            f"{each.train_examples:,}",
            f"{len(each.seeds)}",
            f"{each.test_accuracy:.4f}",
            _interval(each.interval),
            f"{each.own_seconds or 0:.0f}",
            f"{each.own_cost or 0:.4f}",
        ]
        for each in record.summaries
    ]


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{low:.3f} - {high:.3f}"
