"""Every variable of a training step may live on a GPU, by the kernels that this TensorFlow was built with.

TensorFlow keeps a variable without such a kernel on the host, and a step that XLA compiles for a GPU may not reach it
there (tensorflow#53192). The package for Linux is built with CUDA, so its registry knows, whatever the machine.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

from job.arms import ARMS, Recipe
from job.backbone_table import BACKBONES
from job.data.rows import Rows
from job.machine import console
from job.models.backbones import build, preprocessing
from job.models.classifier import Classifier, Head
from job.settings.groups import TrainingSettings
from job.training.stages import Stage
from job.training.trainer import Trainer


def dtypes_on_gpu() -> set[tf.DType]:
    registered = kernels.get_registered_kernels_for_op("VarHandleOp").kernel
    constraints = [
        each for kernel in registered if kernel.device_type in ("GPU", "DEFAULT") for each in kernel.constraint
    ]
    return {tf.as_dtype(dtype) for each in constraints for dtype in each.allowed_values.list.type}


def test_the_registry_tells_the_dtypes_that_may_live_on_a_gpu_from_those_that_may_not() -> None:
    assert {tf.float32, tf.int64, tf.float16} <= dtypes_on_gpu()
    assert tf.int32 not in dtypes_on_gpu()


@pytest.mark.parametrize("dtype_policy", ["float32", "mixed_float16", "mixed_bfloat16"], indirect=True)
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop", "adamw"])
@pytest.mark.usefixtures("dtype_policy")
def test_no_step_of_any_arm_has_a_variable_that_cannot(optimizer: str) -> None:
    row = BACKBONES["MobileNet"]
    classifier = Classifier(build(row, 32, "conv_pw_2_relu"), preprocessing(row), Head(2, (4,), 0.1), 5)
    settings = TrainingSettings(optimizer=optimizer)  # type: ignore[arg-type]
    steps = 0
    for arm in ARMS.values():
        trainer = Trainer(arm.name, classifier, settings, console.Console(None))
        for phase in arm.phases(Recipe(2, 1, 1e-3, 1e-4)):
            cut = classifier.cut(phase.trains)
            values = np.zeros((4, *cut.shape), cut.dtype)
            rows = Rows(tuple("abcd"), np.zeros(4, np.int32), values, (b"",) * 4)
            compiled = trainer.steps(Stage(phase, cut, rows, np.arange(4), rows))._call
            variables = compiled.get_concrete_function().graph.variables
            assert len(variables) > len(keras.tree.flatten(classifier.head.trainable_variables))
            assert {variable.dtype for variable in variables} <= dtypes_on_gpu()
            steps += 1
    assert steps == 4
