"""How much memory a run takes at its peak, from the shapes of the network alone: nothing is computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from job.arms import ARMS, Part, Phase
from job.errors import Problem
from job.experiment.disk import Space
from job.machine.limits import gigabytes
from job.models.cuts import bytes_of_weights, inputs_of, last_uses, outputs_of
from job.models.frozen_features import HELD_SHARE
from job.models.inference import IN_FLIGHT, INFERENCE_BATCH

# Python, TensorFlow, Keras and TFDS, once they have decoded photos and written a SavedModel of next to nothing. Their
# code, another 400 MB, is not counted: it is read from files again where memory is short.
_PROCESS = 580 * 10**6
# With a GPU, its driver and the compiler of kernels come to it.
_PROCESS_WITH_GPU = 2500 * 10**6
# Of each operation of the network: its forward and backward pass as graphs. (The pretrained network's come after the
# random one's have gone, or take little beside them.)
_PER_OPERATION = 10**6
# Ids and digests of an example, as Python keeps them.
_PER_EXAMPLE = 250
# Copies of a grouped convolution's patches in a training step: forward, backward, and layers that overlap.
_GROUPED_STEP = 3
# Copies of a photo, in float32, while it is changed at random (``augmentation``).
_COPIES_OF_PHOTO = 6
# Optimizer slots of a variable.
SLOTS = {"adam": 2, "adamw": 2, "rmsprop": 1, "sgd": 1}
# A run may take so much of what there is before a warning says that it could be too much.
_COMFORTABLE = 0.8

# Operations whose gradient needs none of the tensors that they take.
_NEED_NO_INPUT = (
    keras.layers.Add,
    keras.layers.AveragePooling2D,
    keras.layers.Concatenate,
    keras.layers.Cropping2D,
    keras.layers.Dropout,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.Normalization,
    keras.layers.ReLU,
    keras.layers.Rescaling,
    keras.layers.Reshape,
    keras.layers.ZeroPadding2D,
)
# Activations whose gradient is taken of what they return.
_OF_RESULT = {"relu", "relu6", "sigmoid", "softmax", "tanh"}
# Activations that are several operations, with so many tensors of their own to keep.
_COMPOSED = {"gelu": 3, "hard_silu": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes of memory at the peak of a run.

    fixed: the process, its graphs and every copy of the weights. rows: what is held of all examples. per_image: of a
    training step, for each of the ``batch`` images. forward: of passes without gradients. limit: what may be used.
    files: what is written to file systems that are in memory. photos: of decoding photos at full speed.
    """

    fixed: int
    rows: int
    per_image: int
    batch: int
    forward: int
    limit: int
    files: tuple[Space, ...] = ()
    photos: int = 0

    @property
    def needed(self) -> int:
        """Return what is needed when most is."""
        return self.fixed + self.rows + max(self._computing, self.decoding) + self.in_files

    @property
    def decoding(self) -> int:
        """Return what photos that are decoded at once may take: less than at full speed, where that is too much.

        They take it before anything is computed, and TensorFlow uses it again.
        """
        at_ease = int(_COMFORTABLE * self.limit) - self.fixed - self.rows - self.in_files
        return min(self.photos, max(self._computing, at_ease))

    @property
    def one_photo(self) -> int:
        """Return what a single photo may take that is decoded alone."""
        return max(0, self.limit - self.fixed - self.rows - self.in_files)

    @property
    def _computing(self) -> int:
        return max(self.per_image * self.batch, self.forward)

    @property
    def in_files(self) -> int:
        """Return how much of it is files."""
        return sum(place.whole for place in self.files)

    def problem(self) -> Problem | None:
        """Return what to change where there is too little memory; None where there is enough."""
        if self.needed <= self.limit:
            return None
        step, least, files = self.per_image * self.batch, max(self.forward, 2 * self.per_image), self.in_files
        room = self.limit - self.fixed - self.rows - files
        said = (
            f"the run needs about {gigabytes(self.needed)} of memory, and {gigabytes(self.limit)} may be used: "
            f"{gigabytes(self.fixed)} for the process and copies of the weights, {gigabytes(self.rows)} for examples, "
        )
        if files:
            told = ", ".join(f"{gigabytes(each.whole)} for {each.what} in {each.folder}" for each in self.files)
            said += f"{gigabytes(files)} for files on a file system in memory (tmpfs: {told}), "
        if files and (self.needed - files <= self.limit or room < least <= room + files):
            by_variable: Counter[str] = Counter()
            for each in self.files:
                by_variable[each.variable] += each.whole
            return Problem(
                max(by_variable, key=by_variable.__getitem__),
                f"{said}{gigabytes(max(step, self.forward))} for the images that it works on. Give a folder on a disk, "
                "smaller splits, or more memory",
            )
        if room < least:
            images = f"at least {gigabytes(least)} for the images that it works on"
            variable, change = "TRANSFER_IMAGE_SIZE", "smaller images or a smaller network (TRANSFER_BACKBONE)"
            if room <= 0:
                variable, change = "TRANSFER_BACKBONE", "a smaller network"
            return Problem(variable, f"{said}{images}. Give {change}, or more memory")
        return Problem(
            "TRANSFER_BATCH_SIZE",
            f"{said}{gigabytes(step)} for a training step of {self.batch} images. Give at most "
            f"{room // self.per_image}, a smaller TRANSFER_IMAGE_SIZE, or more memory",
        )

    @property
    def is_tight(self) -> bool:
        """Return whether there is so little more that the error of the estimate could decide."""
        return self.needed > _COMFORTABLE * self.limit


def memory_needed(
    backbone: keras.Model,
    first_trainable: int,
    phases: Mapping[str, Sequence[Phase]],
    optimizer: str,
    batch: int,
    examples: int,
    limit: int,
    *,
    gpu: bool = False,
    augmented: bool = False,
) -> Memory:
    """Return the memory that a run takes.

    On a CPU, the estimate was 3 to 32% above what 14 whole runs held in memory of their own at most (docs/operations.md
    has the table). It is the most above where passes without gradients decide: it adds them to the whole process, and
    their memory, which is not given back, serves for other things later.

    Args:
        backbone: the network; only its shapes are looked at, so its variables may have no values yet.
        first_trainable: index of the layer where fine_tune's tail starts.
        phases: of every arm that runs.
        optimizer: as in the settings.
        batch: images of a training step.
        examples: of all splits together.
        limit: bytes that may be used.
        gpu: whether steps run on a GPU; their memory is then its own and does not count.
        augmented: whether steps are taken on changed photos, so that frozen layers run in them.
    """
    operations, everything = backbone.operations, bytes_of_weights(backbone.layers)
    slots = SLOTS[optimizer]
    fixed, per_image = 0, 0
    for arm, its_phases in phases.items():
        for phase in its_phases:
            frozen = (_COPIES_OF_PHOTO * _bytes(backbone.input) + _of_pass(backbone)) if augmented else 0
            if phase.trains is Part.HEAD:
                per_image = max(per_image, frozen)
                continue
            first = 0 if phase.trains is Part.ALL else first_trainable
            trained = bytes_of_weights(backbone.layers[first:])
            # a flat copy, slots and their initial values, a gradient, and its temporaries; and a checkpoint being saved
            copies = (3 + 2 * slots) * trained + everything + slots * trained
            if not ARMS[arm].pretrained:
                copies += everything
            fixed = max(fixed, copies)
            part = operations[operations.index(backbone.layers[first]) :]
            widest = _live(backbone, part) // 2 + _GROUPED_STEP * _patches(part)
            per_image = max(per_image, _kept_for_gradients(part) + widest + frozen)
    pooled = 4 * backbone.output_shape[-1] if any(ARMS[arm].pretrained for arm in phases) else 0
    # once while their deviation is taken; and where they are held, as rows and as a tensor
    pooled *= 3 if examples * pooled <= limit // HELD_SHARE else 1
    fixed += 2 * everything + _PER_OPERATION * len(operations)
    return Memory(
        fixed=fixed + (_PROCESS_WITH_GPU if gpu else _PROCESS),
        rows=examples * (_PER_EXAMPLE + pooled),
        per_image=0 if gpu else per_image,
        batch=batch,
        forward=0 if gpu else IN_FLIGHT * INFERENCE_BATCH * _of_pass(backbone),
        limit=limit,
    )


def _bytes(tensor: Any) -> int:
    return int(math.prod(tensor.shape[1:]) * tf.as_dtype(tensor.dtype).size)


def _activation(operation: Any) -> str:
    return getattr(getattr(operation, "activation", None), "__name__", "linear")


def _kept_for_gradients(operations: Sequence[Any]) -> int:
    """Return the bytes of one example that stay until the backward pass: what the gradients are computed from.

    Normalised values that only a ReLU takes are not among them: TensorFlow's gradient is taken of the ReLU's result,
    and the memory of its input is used again.
    """
    kept: dict[int, int] = {}
    composed = 0
    for operation in operations:
        outputs = outputs_of(operation)
        activation = _activation(operation)
        alone = isinstance(operation, keras.layers.Activation) and activation in _OF_RESULT
        if not alone and not isinstance(operation, _NEED_NO_INPUT):
            kept |= {id(tensor): _bytes(tensor) for tensor in inputs_of(operation)}
        if activation in _OF_RESULT or isinstance(operation, keras.layers.ReLU):
            kept |= {id(tensor): _bytes(tensor) for tensor in outputs}
        composed += _COMPOSED.get(activation, 0) * _bytes(outputs[0])
        if isinstance(operation, keras.layers.LayerNormalization):
            composed += 3 * _bytes(outputs[0])
        if isinstance(operation, keras.layers.SeparableConv2D):
            # between its two convolutions: the positions of the one, the channels of the other
            composed += _bytes(outputs[0]) // outputs[0].shape[-1] * inputs_of(operation)[0].shape[-1]
    return sum(kept.values()) + composed


def _patches(operations: Sequence[Any]) -> int:
    """Return the bytes of the patches of one example in the largest convolution of groups.

    ConvNeXt writes its depthwise convolutions so, and TensorFlow computes them on a CPU by copying all patches.
    """
    grouped = (op for op in operations if isinstance(op, keras.layers.Conv2D) and op.groups > 1)
    return max((math.prod(op.kernel_size) * _bytes(inputs_of(op)[0]) for op in grouped), default=0)


def _of_pass(backbone: keras.Model) -> int:
    """Return the bytes of one example that a forward pass takes on a CPU.

    TensorFlow's allocator there (oneDNN's) gives nothing back, and puts a tensor in a freed piece only where it fits.
    MobileNetV2's first expansion is followed by its normalised values and then by a padded copy, 2% larger than the
    freed piece: a third piece. So a pass takes the widest place and one more tensor, the largest. Two passes of 32
    images held, in MB, and the estimate: MobileNetV2 at 224 px 910 to 965 (936), at 160 px 487 (480), at 96 px 155
    (174); at 160 px EfficientNetB0 483 (480), ResNet50 423 (424), DenseNet121 431 (385), VGG16 1018 (1258).
    """
    operations = backbone.operations
    largest = max(_bytes(tensor) for operation in operations for tensor in outputs_of(operation))
    return _live(backbone, operations) + largest + _patches(operations) // 2


def _live(backbone: keras.Model, part: Sequence[Any]) -> int:
    """Return the bytes of one example that a forward pass over ``part`` of ``backbone`` holds at its widest place."""
    last_use = last_uses(backbone)
    first = backbone.operations.index(part[0])
    live: dict[int, int] = {}
    widest = 0
    for index, operation in enumerate(part, first):
        live |= {id(tensor): _bytes(tensor) for tensor in outputs_of(operation)}
        widest = max(widest, sum(live.values()))
        live = {tensor: size for tensor, size in live.items() if last_use.get(tensor, -1) > index}
    return widest
