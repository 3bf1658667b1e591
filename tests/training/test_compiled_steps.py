"""Steps that XLA compiles are the plain ones: padded batches, several steps a call, one compilation for all results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job.arms import ARMS, Part, Phase, Recipe
from job.backbone_table import BACKBONES
from job.data.rows import Rows
from job.machine import console
from job.machine.replicas import Replicas
from job.models.backbones import build, preprocessing
from job.models.classifier import Classifier, Cut, Head
from job.models.randomness import DROPOUT, Chance, initial_values
from job.settings.groups import TrainingSettings
from job.training.augmentation import augmenter
from job.training.compilation import Compilation, Mode
from job.training.feeds import Feeder, Residents, packed, packed_spec, unpacked
from job.training.stages import Augmented, Stage
from job.training.steps import Steps
from job.training.trainer import Trained, Trainer
from tests.support.running import completed, published_in

# Two whole batches and a part, so that rows of no weight fill the last one up.
PHOTOS, BATCH = 21, 8


@pytest.fixture(scope="module")
def pixels() -> Rows:
    generator = np.random.default_rng(0)
    labels = (np.arange(PHOTOS) % 2).astype(np.int32)
    # 33 pixels: an odd number of bytes
    values = generator.integers(0, 128, (PHOTOS, 33, 33, 3)).astype(np.uint8) + 60 * labels[:, None, None, None].astype(
        np.uint8
    )
    return Rows(tuple(map(str, range(PHOTOS))), labels, values, (b"",) * PHOTOS)


def classifier() -> Classifier:
    row = BACKBONES["MobileNet"]
    # cut short: the signs of Adam's steps hang on rounding, more so the deeper the network
    with initial_values(3):
        return Classifier(build(row, 33, "conv_pw_2_relu"), preprocessing(row), Head(2, (4,), 0.25), 5)


def trained(
    pixels: Rows, arm: str, augmentation: str, padded: bool, xla: bool, steps: int = 1
) -> tuple[list[Any], tuple[float, int]]:
    """Take two epochs of the arm's last phase; return its variables, and the sums of the last epoch."""
    model = classifier()
    phase = ARMS[arm].phases(Recipe(2, 1, 1e-3, 1e-3))[-1]
    cut = model.cut(phase.trains)
    values = pixels.values if cut.at_pixels else np.asarray(cut.trunk(tf.constant(pixels.values)))
    rows = Rows(pixels.ids, pixels.labels, values, pixels.digests)
    augment = augmenter(augmentation)
    augmented = augment and Augmented(model.from_pixels(phase.trains), pixels, augment)
    stage = Stage(phase, cut, rows, np.arange(PHOTOS), rows, augmented)
    compiled = Steps(model, stage, "sgd", BATCH, xla=xla)
    compiled.reset(6)
    feeder = Feeder(*stage.stepped, BATCH, Replicas(), Residents(Replicas()), PHOTOS)
    done = 0
    for epoch in range(2):
        compiled.reset_sums()
        order = np.random.default_rng(epoch).permutation(PHOTOS)
        for call in feeder.calls(order, lambda: (steps, padded)):
            compiled(call, 5, done)
            done += call.steps
    assert done == 6
    return [variable.numpy() for variable in model.variables], compiled.sums()


@pytest.mark.parametrize("augmentation", ["none", "standard"])
@pytest.mark.parametrize("arm", ["scratch", "frozen", "fine_tune"])
@pytest.mark.parametrize("xla", [False, True])
def test_padded_batches_train_as_batches_of_their_own_size(
    pixels: Rows, arm: str, augmentation: str, xla: bool
) -> None:
    expected, (loss, correct) = trained(pixels, arm, augmentation, padded=False, xla=False)
    found, (loss_padded, correct_padded) = trained(pixels, arm, augmentation, padded=True, xla=xla, steps=2)
    assert correct_padded == correct
    assert loss_padded == pytest.approx(loss, rel=1e-4)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=3e-5)
    start = [variable.numpy() for variable in classifier().variables]
    assert max(float(np.abs(one - other).max()) for one, other in zip(expected, start, strict=True)) > 1e-3


@pytest.mark.parametrize("shape", [(4, 5, 3), (3, 3, 3), (7,)])
def test_packed_rows_come_back_bit_for_bit(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(np.uint8)
    # every pattern of bits, those of float16's NaNs too
    values.reshape(-1)[:8] = [0, 252, 1, 252, 255, 127, 0, 124]
    cut = Cut("pixels", shape, values.dtype, lambda pixels: pixels, lambda rows, _: rows)
    for compiled in (False, True):

        @tf.function(autograph=False, jit_compile=compiled)  # type: ignore[untyped-decorator]
        def gathered(rows: Any) -> Any:
            return unpacked(tf.gather(rows, tf.constant([5, 0, 3], tf.int64)), cut)

        rows = tf.constant(packed(values))
        assert packed_spec(cut).is_compatible_with(rows)
        np.testing.assert_array_equal(gathered(rows), values[[5, 0, 3]])


@pytest.mark.parametrize("compiled", [False, True])
def test_random_numbers_are_those_of_tensorflow_whoever_compiles(compiled: bool) -> None:
    @tf.function(autograph=False, jit_compile=compiled)  # type: ignore[untyped-decorator]
    def drawn(seed: Any) -> Any:
        places = tf.range(30, dtype=tf.int64)
        return Chance(seed, 32, places).uniform(DROPOUT, tf.zeros([30, 5]), 5)

    seed = tf.constant([7, 3])
    folded = tf.random.experimental.stateless_fold_in(seed, DROPOUT, alg="philox")
    np.testing.assert_array_equal(drawn(seed), tf.random.stateless_uniform([32, 5], folded, alg="philox")[:30])


def trained_by(pixels: Rows, mode: Mode, epochs: int, results: int = 1) -> tuple[Trained, list[Any]]:
    """Train a head through ``epochs`` of three steps; return what it gave, and the variables.

    results: that the trainer expects to train.
    """
    model = classifier()
    settings = TrainingSettings(epochs=epochs, batch_size=BATCH)
    trainer = Trainer("frozen", model, settings, console.Console(None), xla=mode, results=results)
    phase = Phase("head", Part.HEAD, epochs, 1e-3)
    cut = model.cut(phase.trains)
    rows = replace(pixels, values=np.asarray(cut.trunk(tf.constant(pixels.values))))
    done = trainer.train((Stage(phase, cut, rows, np.arange(PHOTOS), rows),), seed=1)
    return done, [variable.numpy() for variable in model.head.variables]


def test_xla_is_not_tried_for_steps_that_are_soon_over(pixels: Rows) -> None:
    assert not trained_by(pixels, "auto", epochs=30)[0].xla
    assert trained_by(pixels, "on", epochs=2)[0].xla


def test_training_that_goes_over_to_xla_half_way_ends_as_without_it(pixels: Rows) -> None:
    plain, expected = trained_by(pixels, "off", epochs=30)
    # so many results to come that it pays, however slow this machine is
    changed, found = trained_by(pixels, "auto", epochs=30, results=10**7)
    assert (plain.xla, changed.xla) == (False, True)
    assert changed.images == plain.images == 30 * PHOTOS
    assert [each.train_loss for each in changed.history] == pytest.approx(
        [each.train_loss for each in plain.history], rel=1e-4
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_xla_is_tried_where_steps_take_long_beside_the_first_one_and_kept_where_it_is_faster(pixels: Rows) -> None:
    cut = Cut("pixels", (33, 33, 3), np.dtype(np.uint8), lambda rows: rows, lambda rows, _: rows)
    feeder = Feeder(cut, pixels, BATCH, Replicas(), Residents(Replicas()), PHOTOS)

    def timed(plain: float, compiled: float, further: int) -> tuple[Compilation, list[bool]]:
        """Take calls of ten steps in so many seconds each; the first of each size takes 5 s."""
        found, asked, first = Compilation("scratch", "auto", further), [], {False: 5.0, True: 5.0}
        for _ in range(12):
            asked.append(found.padded(left=10))
            seconds = first.pop(asked[-1], compiled if asked[-1] else plain)
            found.took(feeder.read([np.arange(BATCH)] * 10, asked[-1]), seconds)
            # a smaller batch, whose kernels are chosen then: it says nothing of the others
            if len(asked) == 1:
                found.took(feeder.read([np.arange(2)]), 60.0)
        return found, asked

    # 10 ms a step: 5,000 of them take 50 s, 10,000 take 100 s
    assert timed(0.1, 0.01, further=5_000)[1] == [False] * 12
    kept, asked = timed(0.1, 0.01, further=10_000)
    assert asked == [False] * 3 + [True] * 9
    assert kept.examples_per_second == pytest.approx(10 * BATCH / 0.01)
    left, asked = timed(0.1, 0.2, further=10_000)
    assert asked == [False] * 3 + [True] * 3 + [False] * 6
    assert left.examples_per_second == pytest.approx(10 * BATCH / 0.1)


def test_where_xla_fails_training_goes_on_without_it_unless_it_is_asked_for(pixels: Rows) -> None:
    def unable(pixels: Any) -> Any:
        # XLA knows no strings
        nothing = tf.strings.length(tf.strings.as_string(pixels[0, 0, 0, 0])) * 0
        return tf.cast(pixels, tf.float32) + tf.cast(nothing, tf.float32)

    def steps_of(mode: Mode) -> tuple[Steps, Compilation]:
        model = classifier()
        phase = ARMS["scratch"].phases(Recipe(1, 1, 1e-2, 1e-2))[-1]
        cut = model.cut(phase.trains)
        spoiled = replace(cut, tail=lambda rows, trains: cut.tail(unable(rows), trains))
        stage = Stage(phase, spoiled, pixels, np.arange(PHOTOS), pixels)
        steps = Steps(model, stage, "sgd", BATCH, xla=True)
        steps.reset(4)
        return steps, Compilation("scratch", mode)

    feeder = Feeder(classifier().cut(Part.ALL), pixels, BATCH, Replicas(), Residents(Replicas()), PHOTOS)
    call = feeder.read([np.arange(BATCH)], padded=True)
    steps, compilation = steps_of("auto")
    compilation.take(steps, call, 5, 0, (0.0, 0.0))
    assert steps.sums()[0] > 0
    assert not compilation.padded(left=10**6)
    assert not steps.by_xla
    steps, compilation = steps_of("on")
    with pytest.raises(tf.errors.InvalidArgumentError, match="XLA"):
        compilation.take(steps, call, 5, 0, (0.0, 0.0))


def compilations(folder: Path) -> list[str]:
    """Return the names of the programs of training steps that XLA compiled, from what it dumped."""
    found = [path.name for path in folder.glob("*before_optimizations.txt")]
    return [name for name in found if "inference_call" in name or "inference_steps" in name]


@pytest.mark.parametrize(
    ("fractions", "seeds"), [("0.5,1.0", "0,1"), pytest.param("0.25,0.5,0.75,1.0", "0,1,2", marks=pytest.mark.slow)]
)
def test_one_compilation_a_phase_serves_all_fractions_and_seeds(
    tiny: dict[str, str], tmp_path: Path, fractions: str, seeds: str
) -> None:
    completed(
        tiny
        | {
            "TRANSFER_XLA": "on",
            "TRANSFER_TRAIN_FRACTIONS": fractions,
            "TRANSFER_SEEDS": seeds,
            "TRANSFER_OUTPUT_URI": str(tmp_path / "output"),
            "XLA_FLAGS": f"--xla_dump_to={tmp_path / 'dump'}",
        }
    )
    _, manifest = published_in(tmp_path / "output")
    assert len(manifest["results"]) == 3 * len(fractions.split(",")) * len(seeds.split(","))
    # scratch, frozen, and fine_tune's head and tail
    assert len(compilations(tmp_path / "dump")) == 4
