"""With several devices each changes its own copy of the variables, from what is there: nothing goes by way of another.

``strategy.reduce`` adds up on the host ("Reduce to /device:CPU:0"), and a variable that is changed outside the replicas
is changed on the first device and copied to the others, one by one.
"""

from __future__ import annotations

import json

from tests.support.running import python

PROGRAM = """
import json
from collections import Counter
import numpy as np
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from job.arms import ARMS, Recipe
from job.backbone_table import BACKBONES
from job.data.rows import Rows
from job.machine import console
from job.machine.replicas import connect
from job.models.backbones import build, preprocessing
from job.models.classifier import Classifier, Head
from job.settings.groups import TrainingSettings
from job.training.stages import Stage
from job.training.trainer import Trainer

def graphs(graph):
    yield graph
    for op in graph.get_operations():
        if op.type == "While":
            yield from graphs(graph._get_function(op.get_attr("body").name).graph)

replicas = connect(None, [device.name for device in tf.config.list_logical_devices("CPU")])
row = BACKBONES["MobileNet"]
with replicas.scope():
    model = Classifier(build(row, 32, "conv_pw_2_relu"), preprocessing(row), Head(2, (4,), 0.1), 5, None, replicas)
found = {}
for arm in ("scratch", "fine_tune"):
    phase = ARMS[arm].phases(Recipe(2, 1, 1e-3, 1e-4))[-1]
    cut = model.cut(phase.trains)
    rows = Rows(tuple("abcd"), np.zeros(4, np.int32), np.zeros((4, *cut.shape), cut.dtype), (b"",) * 4)
    trainer = Trainer(arm, model, TrainingSettings(batch_size=4), console.Console(None))
    traced = trainer.steps(Stage(phase, cut, rows, np.arange(4), rows)).traced().graph
    changes = Counter(
        (op.device[-5:], op.inputs[1].op.device[-5:])
        for graph in graphs(traced)
        for op in graph.get_operations()
        if op.type.startswith("Assign") and op.type.endswith("VariableOp")
    )
    # of the variables that train, of BatchNorm's two averages, and of the optimizer
    own = len(model.trainable_variables(phase.trains)) + 2 * len(model.batch_norms()) * phase.trains_batch_norm
    found[arm] = {"own": own, "changes": [[*where, number] for where, number in changes.items()]}
print(json.dumps(found))
"""


def test_each_device_changes_its_own_variables_from_its_own_values() -> None:
    for arm, found in json.loads(python(PROGRAM).stdout.splitlines()[-1]).items():
        changes = {(variable, value): number for variable, value, number in found["changes"]}
        assert ("CPU:0", "CPU:1") not in changes, arm
        assert ("CPU:1", "CPU:0") not in changes, arm
        assert changes["CPU:0", "CPU:0"] == changes["CPU:1", "CPU:1"] > found["own"], arm
