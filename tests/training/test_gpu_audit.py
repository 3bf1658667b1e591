"""All that the job compiles for a GPU can run there, with the rows it takes, by this TensorFlow's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

from job.arms import Phase
from tests.support.gpu_registry import (
    KINDS,
    PRECISIONS,
    Audit,
    Kind,
    Op,
    audit,
    audited_passes,
    audited_stage,
    audited_steps,
    phases,
    small_classifier,
    stage_of,
    table,
)

pytestmark = pytest.mark.skipif(not tf.test.is_built_with_cuda(), reason="this TensorFlow has no kernels for a GPU")

PIXELS = tf.TensorSpec([None, 8, 8, 3], tf.uint8)
INDEX = tf.TensorSpec([None], tf.int64)


def audited(function: Callable[..., Any], *signature: tf.TensorSpec, rows: tuple[int, ...] = (0,)) -> Audit:
    return audit(tf.function(function, signature, autograph=False).get_concrete_function(), rows)


def looped(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Return what takes the same arguments and takes ``function`` of them three times, in a loop."""

    def loop(*arguments: tf.Tensor) -> tf.Tensor:
        _, result = tf.while_loop(
            lambda i, _: i < 3, lambda i, so_far: (i + 1, so_far + function(*arguments)), (tf.constant(0), tf.zeros([]))
        )
        return result

    return loop


def total(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(values, tf.float32))


def gathered(pixels: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    return total(tf.gather(pixels, index))


def pooled_at_random(pixels: tf.Tensor) -> tf.Tensor:
    return total(tf.nn.fractional_max_pool(tf.cast(pixels, tf.float32), 2.0, seed=1)[0])


def through_int32(pixels: tf.Tensor) -> tf.Tensor:
    return total(tf.cast(pixels, tf.int32) + 1)


def types(ops: tuple[Op, ...]) -> list[tuple[str, ...]]:
    return [(op.type, *op.dtypes) for op in ops]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_steps_of_every_arm_run_on_a_gpu(kind: Kind) -> None:
    found = audited_steps(kind)
    assert len(found) == 2 * len(phases()) == 8
    assert {name: of.verdict for name, of in found.items()} == dict.fromkeys(found, "")
    assert all(kind.precision.removeprefix("mixed_") in of.dtypes for of in found.values())
    usual = {"DepthwiseConv2dNative", "DepthwiseConv2dNativeBackpropFilter", "Relu6", "Relu6Grad", "GatherV2"}
    normalised = {"FusedBatchNormV3", "FusedBatchNormGradV3"}
    assert usual | normalised <= {*found[f"scratch, all, plain: {kind}"].types}
    assert usual <= {*found[f"scratch, all, padded: {kind}"].types}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_inference_and_recalibration_run_on_a_gpu(precision: str, deterministic: bool) -> None:
    found = audited_passes(precision, deterministic=deterministic)
    assert len(found) == 7
    assert {name: of.verdict for name, of in found.items()} == dict.fromkeys(found, "")
    assert all(precision.removeprefix("mixed_") in of.dtypes for of in found.values())


def test_the_kinds_of_steps_are_every_pair_of_what_decides_them() -> None:
    for chosen in ((0, 1), (0, 2), (1, 2), (0, 3), (2, 3)):
        values = [{kind[place] for kind in KINDS} for place in chosen]
        pairs = {tuple(kind[place] for place in chosen) for kind in KINDS}
        assert len(pairs) == len(values[0]) * len(values[1])


def scratch() -> Phase:
    ((_, phase),) = [each for each in phases() if each[0] == "scratch"]
    return phase


@pytest.mark.parametrize("padded", [False, True])
def test_an_int32_variable_that_a_step_changes_is_found(padded: bool) -> None:
    counted = tf.Variable(0, name="counted")

    def augment(pixels: tf.Tensor, _: Any) -> tf.Tensor:
        counted.assign_add(1)
        return pixels

    classifier = small_classifier()
    found = audited_stage(classifier, stage_of(classifier, scratch(), augment), padded=padded)
    assert found.variables_on_host == (("counted", "int32"),)
    assert found.verdict == "variables on the host: counted (int32)"


@pytest.mark.parametrize("number", range(len(phases())), ids=[f"{arm}, {phase.name}" for arm, phase in phases()])
def test_rows_that_a_step_takes_through_the_host_are_found_behind_gather_and_bitcast(number: int) -> None:
    def augment(pixels: tf.Tensor, _: Any) -> tf.Tensor:
        return tf.cast(tf.cast(pixels, tf.int32) + 1, tf.uint8)

    classifier = small_classifier()
    _, phase = phases()[number]
    found = audited_stage(classifier, stage_of(classifier, phase, augment))
    assert types(found.rows_through_host) == [("AddV2", "int32")]
    assert found.verdict == "rows through the host: AddV2(int32)"


def test_what_only_the_host_can_run_is_found_in_the_network_of_a_step() -> None:
    def preprocess(pixels: tf.Tensor) -> tf.Tensor:
        return tf.nn.fractional_max_pool(pixels, [1.0, 1.0, 1.0, 1.0], seed=1)[0]

    classifier = small_classifier(preprocess=preprocess)
    found = audited_stage(classifier, stage_of(classifier, scratch()))
    assert types(found.without_kernel) == [("FractionalMaxPool", "float32")]
    assert found.without_kernel == found.rows_through_host == found.not_compiled


@pytest.mark.parametrize("around", [lambda function: function, looped], ids=["plain", "in a loop"])
@pytest.mark.parametrize(
    ("function", "signature", "verdict"),
    [
        (
            gathered,
            (PIXELS, INDEX),
            "without a GPU kernel: GatherV2(uint8, int64, int32); rows through the host: GatherV2(uint8, int64, int32)",
        ),
        (
            pooled_at_random,
            (PIXELS,),
            (
                "without a GPU kernel: FractionalMaxPool(float32); rows through the host: FractionalMaxPool(float32); "
                "not for XLA: FractionalMaxPool(float32)"
            ),
        ),
        (through_int32, (PIXELS,), "rows through the host: AddV2(int32)"),
    ],
    ids=["gather of uint8", "no kernel at all", "int32"],
)
def test_a_planted_fault_is_found_and_nothing_else(
    around: Callable[..., Callable[..., tf.Tensor]],
    function: Callable[..., tf.Tensor],
    signature: tuple[tf.TensorSpec, ...],
    verdict: str,
) -> None:
    found = audited(around(function), *signature)
    assert found.verdict == verdict
    assert [op.name.startswith("while/") for op in found.rows_through_host] == [around is looped]


def test_what_xla_cannot_compile_is_found() -> None:
    def turned(pixels: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=pixels, transforms=tf.ones([1, 8]), output_shape=[8, 8], fill_value=0.0, interpolation="BILINEAR"
        )

    assert audited(turned, PIXELS).verdict == "not for XLA: ImageProjectiveTransformV3(uint8)"


def test_rows_are_followed_from_one_variable_of_a_loop_into_the_next() -> None:
    def handed_on(pixels: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, one: tf.Tensor, two: tf.Tensor, three: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return i + 1, one, one + two, three + through_int32(two)

        first = tf.constant(0), tf.cast(pixels, tf.float32), tf.zeros(tf.shape(pixels)), tf.zeros([])
        return tf.while_loop(lambda i, *_: i < 3, body, first)[-1]

    assert types(audited(handed_on, PIXELS).rows_through_host) == [("AddV2", "int32")]


def test_rows_are_followed_into_functions_and_branches() -> None:
    def branched(pixels: tf.Tensor) -> tf.Tensor:
        return tf.cond(tf.shape(pixels)[0] > 2, lambda: through_int32(pixels), lambda: 0.0)

    called = tf.function(branched, autograph=False)
    (found,) = audited(lambda pixels: called(pixels) + 1.0, PIXELS).rows_through_host
    assert found.name.startswith("PartitionedCall/cond/")
    assert found.type == "AddV2"


def test_int32_rows_lie_on_the_host_wherever_a_function_takes_or_gives_them() -> None:
    called = tf.function(tf.bitwise.invert, autograph=False)
    found = audited(lambda rows: called(rows), tf.TensorSpec([None, 8], tf.int32))
    outside = ("_Arg", "int32"), ("_Retval", "int32"), ("Identity", "int32")
    assert sorted(types(found.rows_through_host)) == sorted([*outside, *outside])


def test_labels_order_and_shapes_may_lie_on_the_host() -> None:
    def counted(pixels: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(tf.cast(pixels, tf.float32), [-1, 192])
        hits = tf.equal(tf.argmax(flat, axis=1, output_type=tf.int32), labels + 1)
        few = tf.cast(tf.gather(flat, [0, 1])[:, :5], tf.int32) + tf.shape(pixels)[0] // 2
        return tf.reduce_sum(tf.cast(hits, tf.float32)) + total(few)

    labels = tf.TensorSpec([None], tf.int32)
    assert audited(counted, PIXELS, labels).verdict == ""
    assert "Equal(int32)" in audited(counted, PIXELS, labels, rows=(1,)).verdict


def test_functions_that_are_not_followed_are_no_pass() -> None:
    def read(pixels: tf.Tensor) -> tf.Tensor:
        return tf.data.Dataset.from_tensor_slices(pixels).map(total).reduce(0.0, tf.add)

    found = audited(read, PIXELS)
    assert {"MapDataset", "ReduceDataset"} <= {op.type for op in found.not_followed}
    assert "not followed: MapDataset" in found.verdict


def test_the_table_has_a_line_for_each_function() -> None:
    lines = table({"good": audited(total, PIXELS), "bad": audited(gathered, PIXELS, INDEX)}).splitlines()
    told = "without a GPU kernel: GatherV2(uint8, int64, int32); rows through the host: GatherV2(uint8, int64, int32)"
    assert [" ".join(line.split()) for line in lines] == [
        "function ops types dtypes verdict",
        "good 4 4 float32 int32 uint8 GPU",
        f"bad 6 5 float32 int32 int64 uint8 {told}",
    ]
