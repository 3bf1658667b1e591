"""Where a backbone comes apart into layers that never train and layers that may, and which place costs least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

PIXELS = "pixels"
POOLED = "pooled"

# Rates for weighing bytes against recomputation. They are orders of magnitude, not promises: a measured rate would
# change from run to run, and the chosen cut with it. One core of a cloud machine reached 23 GFLOP/s in MobileNetV2's
# forward pass, reading rows from the page cache 2 GB/s; a cloud disk gives 0.2 GB/s, small layers on a GPU 2 TFLOP/s.
FLOPS_PER_CORE = 2.3e10
FLOPS_OF_GPU = 2e12
MEMORY_BYTES_PER_SECOND = 2e9
DISK_BYTES_PER_SECOND = 2e8
# An elementwise operation is bound by memory; counted as this many operations per value it is in the same currency.
_FLOPS_PER_VALUE = 10


@dataclass(frozen=True)
class Candidate:
    """A tensor at which the frozen layers may end.

    name: ``pixels``, or the Keras operation that the cut follows. operation: None at the pixels. row_bytes: of one
    example. flops: of one example, of the frozen layers that come after it and would run in every epoch.
    """

    name: str
    operation: Any
    row_bytes: int
    flops: int


@dataclass(frozen=True)
class Means:
    """What a choice depends on beside the network.

    epochs: how often rows are read. examples: rows to keep, over all splits. disk: free bytes. memory: bytes that the
    process may take in all, which unlike the free ones are the same in every run. flops_per_second: of the device.
    """

    epochs: int
    examples: int
    disk: int
    memory: int
    flops_per_second: float


def candidates(backbone: keras.Model, first_trainable: int, value_bytes: int = 4) -> list[Candidate]:
    """Return every cut before ``backbone.layers[first_trainable]``, in order of computation, the pixels first.

    A tensor is a cut when no other one made before it is still needed after it. ``backbone.operations`` is in order of
    computation, and unlike ``layers`` it holds bare additions too (ConvNeXt's residuals).

    value_bytes: of one value of a row.
    """
    operations = backbone.operations
    end = operations.index(backbone.layers[first_trainable])
    last_use = last_uses(backbone)
    flops = [_flops(op) for op in operations[:end]]
    pixels = math.prod(backbone.input_shape[1:])
    found = [Candidate(PIXELS, None, pixels, sum(flops))]
    live: set[int] = set()
    for index, op in enumerate(operations[:end]):
        outputs = outputs_of(op)
        live = {tensor for tensor in live | {id(tensor) for tensor in outputs} if last_use.get(tensor, -1) > index}
        if index > 0 and live == {id(outputs[0])}:
            row_bytes = math.prod(outputs[0].shape[1:]) * value_bytes
            found.append(Candidate(op.name, op, row_bytes, sum(flops[index + 1 :])))
    return found


def choose(found: Sequence[Candidate], means: Means) -> Candidate:
    """Return the candidate at which an epoch over rows costs least, among those whose rows fit the disk.

    The pixels always fit: they are there already. NASNetMobile's only other cut, after its stem, has rows of ten times
    the bytes, which cost more to read than the stem to run: so it is passed over.
    """
    possible = [cut for cut in found if cut.operation is None or cut.row_bytes * means.examples <= means.disk]
    return min(possible, key=lambda cut: seconds_per_example(cut, means))


def seconds_per_example(cut: Candidate, means: Means) -> float:
    """Return the estimated seconds that reading one row and running the frozen layers after it take, over all epochs.

    The first pass over the trunk is left out: it is nearly the same for all.
    """
    in_memory = cut.row_bytes * means.examples <= means.memory
    rate = MEMORY_BYTES_PER_SECOND if in_memory else DISK_BYTES_PER_SECOND
    return means.epochs * (cut.row_bytes / rate + cut.flops / means.flops_per_second)


def _flops(operation: Any) -> int:
    """Return the operations for one example: every weight of a kernel is used once at every output position."""
    shape = outputs_of(operation)[0].shape[1:]
    positions = math.prod(shape[:-1])
    kernels = sum(math.prod(w.shape) for w in getattr(operation, "weights", []) if len(w.shape) > 1)
    return int(2 * kernels * positions + _FLOPS_PER_VALUE * math.prod(shape))


def last_uses(backbone: keras.Model) -> dict[int, int]:
    """Return, by a tensor's id, the index in ``backbone.operations`` of the last one that needs it."""
    operations = backbone.operations
    found = {id(tensor): index for index, op in enumerate(operations) for tensor in inputs_of(op)}
    return found | {id(tensor): len(operations) for tensor in backbone.outputs}


def inputs_of(operation: Any) -> list[Any]:
    """Return the tensors that a Keras operation takes; none for the input layer."""
    return [] if isinstance(operation, keras.layers.InputLayer) else _as_list(operation.input)


def outputs_of(operation: Any) -> list[Any]:
    """Return the tensors that a Keras operation makes."""
    return _as_list(operation.output)


def _as_list(tensors: Any) -> list[Any]:
    return list(tensors) if isinstance(tensors, list | tuple) else [tensors]


def bytes_of_weights(layers: Sequence[keras.layers.Layer]) -> int:
    """Return the bytes that the values of the layers' variables take, float32 each."""
    return sum(4 * math.prod(weight.shape) for layer in layers for weight in layer.weights)
