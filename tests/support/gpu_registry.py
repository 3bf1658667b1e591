"""What of a traced function a GPU can run, by the kernels that this TensorFlow was built with.

The package for Linux is built with CUDA, so its registry knows every GPU kernel, whatever the machine. TensorFlow says
nothing of an operation that has none: it runs it on the host, and copies what it takes there and back.

``python -m tests.support.gpu_registry`` prints the audit of all that the job compiles for a GPU; a minute on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import kernels

from job.arms import ARMS, Part, Phase, Recipe
from job.backbone_table import BACKBONES
from job.data.rows import Rows
from job.machine.console import Console
from job.models.backbones import build, first_trainable, preprocessing
from job.models.classifier import Classifier, Cut, Head
from job.models.cuts import candidates
from job.models.frozen_features import Features
from job.models.fused_batch_norm import unfuse_when_frozen
from job.models.recalibration import Recalibrator
from job.settings.groups import TrainingSettings
from job.training.augmentation import Augment, augmenter
from job.training.stages import Augmented, Stage
from job.training.trainer import Trainer

# A copy of fewer values than this costs what any copy does, however few they are.
_FEW = 64
# Rows are not followed into what these give.
_NOT_ROWS = {
    *("Shape", "ShapeN", "Size", "Rank"),  # a shape, which the host knows before the values are there
    *("ArgMax", "ArgMin"),  # an index, such as the class of each example
}
# The functions that these call, as their attributes name them. They need no kernel of their own: before it runs, what
# they call becomes part of the graph around it, its arguments and results passed as by ``_Arg`` and ``_Retval``.
_CALLS = {
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "Case": ("branches",),
    "StatelessCase": ("branches",),
    "While": ("cond", "body"),
    "StatelessWhile": ("cond", "body"),
}
# Whose kernels run on a GPU, the first one that fits; and whose XLA takes to compile for one.
_ON_GPU = ("GPU", "DEFAULT")
_BY_XLA = ("XLA_GPU_JIT",)


class Op(NamedTuple):
    """An operation: its name, behind those of the calls that lead to it, its type, and the types it is given."""

    name: str
    type: str
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.type}({', '.join(self.dtypes)})"


@dataclass(frozen=True)
class Audit:
    """What of a function a GPU cannot run, and what it would have to fetch.

    ops: how many operations there are, with those of all functions that it calls. types: of the operations. dtypes: of
    the tensors. without_kernel: operations that only the host can run. variables_on_host: name and dtype of those that
    TensorFlow keeps there; a function that XLA compiles for a GPU may not reach them (tensorflow#53192).
    rows_through_host: operations that run on the host, or take or give in its memory, what is made of rows.
    not_compiled: operations that XLA cannot compile for a GPU, whatever their shapes. not_followed: operations that
    call functions into which the audit cannot see, so that nothing is known of these.
    """

    ops: int
    types: tuple[str, ...]
    dtypes: tuple[str, ...]
    without_kernel: tuple[Op, ...]
    variables_on_host: tuple[tuple[str, str], ...]
    rows_through_host: tuple[Op, ...]
    not_compiled: tuple[Op, ...]
    not_followed: tuple[Op, ...]

    @property
    def verdict(self) -> str:
        """Return in words what is wrong; nothing where nothing is."""
        told = {
            "without a GPU kernel": self.without_kernel,
            "variables on the host": [f"{name} ({dtype})" for name, dtype in self.variables_on_host],
            "rows through the host": self.rows_through_host,
            "not for XLA": self.not_compiled,
            "not followed": self.not_followed,
        }
        return "; ".join(f"{what}: {', '.join(sorted(set(map(str, which))))}" for what, which in told.items() if which)


def audit(function: Any, rows: Iterable[int] = (0,)) -> Audit:
    """Return the audit of a concrete function, whose flat arguments ``rows`` hold rows.

    What is made of rows is followed through all operations and the functions that they call, but not into a variable
    and out again. A tensor counts as long as it may have ``_FEW`` values, so where a dimension is unknown, too.
    """
    walk, graph, holding = _Walk(), function.graph, set(rows)
    walk.through(graph, [place in holding for place in range(len(graph.inputs))])
    held = {
        tf.as_dtype(dtype)
        for kernel in _registered("VarHandleOp", _ON_GPU)
        for each in kernel.constraint
        for dtype in each.allowed_values.list.type
    }
    on_host = {(each.name.partition(":")[0], each.dtype.name) for each in graph.variables if each.dtype not in held}
    return Audit(
        ops=len(walk.types),
        types=tuple(sorted(set(walk.types.values()))),
        dtypes=tuple(sorted(walk.dtypes)),
        without_kernel=tuple(sorted(walk.without_kernel)),
        variables_on_host=tuple(sorted(on_host)),
        rows_through_host=tuple(sorted(walk.rows_through_host)),
        not_compiled=tuple(sorted(walk.not_compiled)),
        not_followed=tuple(sorted(walk.not_followed)),
    )


def table(audits: Mapping[str, Audit]) -> str:
    """Return the audits, by the names of the functions, as lines of text."""
    lines = [("function", "ops", "types", "dtypes", "verdict")]
    lines += [
        (name, str(of.ops), str(len(of.types)), " ".join(of.dtypes), of.verdict or "GPU") for name, of in audits.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class _Walk:
    """What is found on the way through a function and those that it calls."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self.dtypes: set[str] = set()
        self.without_kernel: set[Op] = set()
        self.rows_through_host: set[Op] = set()
        self.not_compiled: set[Op] = set()
        self.not_followed: set[Op] = set()

    def through(self, graph: Any, rows: Sequence[bool], path: str = "") -> list[bool]:
        """Return which of the results of ``graph`` are made of rows, where these of its arguments are."""
        made = {tensor.ref() for tensor, holds in zip(graph.inputs, rows, strict=True) if holds}
        arguments = {tensor.op.name for tensor in graph.inputs}
        self._pass("_Arg", graph.inputs, made, path)
        for op in graph.get_operations():
            self.dtypes |= {tensor.dtype.name for tensor in op.outputs}
            if op.name in arguments:
                continue
            self.types[path + op.name] = op.type
            taken = [tensor.ref() in made for tensor in op.inputs]
            if op.type in _CALLS:
                gives = self._call(graph, op, taken, path)
            else:
                gives = [any(taken) and op.type not in _NOT_ROWS] * len(op.outputs)
            made |= {tensor.ref() for tensor, holds in zip(op.outputs, gives, strict=True) if holds}
            if op.type not in _CALLS:
                self._run(op, made, path)
        self._pass("_Retval", graph.outputs, made, path)
        return [tensor.ref() in made for tensor in graph.outputs]

    def _call(self, graph: Any, op: Any, taken: list[bool], path: str) -> list[bool]:
        named = [op.get_attr(name) for name in _CALLS[op.type]]
        if "Case" in op.type:
            (named,) = named
        functions = [graph._get_function(each.name).graph for each in named]
        within = f"{path}{op.name}/"
        if "While" in op.type:
            cond, body = functions
            while (after := [a or b for a, b in zip(taken, self.through(body, taken, within), strict=True)]) != taken:
                taken = after
            self.through(cond, taken, within)
            return taken
        # what decides between branches is no argument of theirs
        arguments = taken if "Partitioned" in op.type else taken[1:]
        results = [self.through(function, arguments, within) for function in functions]
        return [any(each) for each in zip(*results, strict=True)]

    def _run(self, op: Any, made: set[Any], path: str) -> None:
        dtypes = _dtypes(op)
        told = Op(path + op.name, op.type, tuple(dtype.name for _, some in dtypes for dtype in some))
        if any(attr.type in ("func", "list(func)") for attr in op.op_def.attr):
            self.not_followed.add(told)
        if _kernel(op.type, dtypes, _BY_XLA) is None:
            self.not_compiled.add(told)
        kernel = _kernel(op.type, dtypes, _ON_GPU)
        if kernel is None:
            self.without_kernel.add(told)
        taken = zip(op.inputs, _slots(op, op.op_def.input_arg), strict=True)
        given = zip(op.outputs, _slots(op, op.op_def.output_arg), strict=True)
        for tensor, slot in (*taken, *given):
            if _much(tensor, made) and (kernel is None or slot in kernel.host_memory_arg):
                self.rows_through_host.add(told)

    def _pass(self, how: str, tensors: Sequence[Any], made: set[Any], path: str) -> None:
        for tensor in tensors:
            kernel = _kernel(how, (("T", (tensor.dtype,)),), _ON_GPU)
            if _much(tensor, made) and (kernel is None or kernel.host_memory_arg):
                self.rows_through_host.add(Op(path + tensor.op.name, how, (tensor.dtype.name,)))


def _much(tensor: Any, made: set[Any]) -> bool:
    """Return whether the tensor is one of those ``made`` of rows, and more than a few values."""
    number = tensor.shape.num_elements()
    return tensor.ref() in made and (number is None or number >= _FEW)


_Dtypes = tuple[tuple[str, tuple[tf.DType, ...]], ...]


def _dtypes(op: Any) -> _Dtypes:
    """Return the types that the operation is given, by the names of its attributes."""
    found = []
    for attr in op.op_def.attr:
        if attr.type in ("type", "list(type)"):
            value = op.get_attr(attr.name)
            found.append((attr.name, tuple(value) if isinstance(value, list) else (value,)))
    return tuple(found)


def _slots(op: Any, arguments: Any) -> list[str]:
    """Return, for each tensor that the operation takes or gives, the name of the argument that it belongs to."""
    found = []
    for each in arguments:
        number = 1
        if each.number_attr:
            number = op.get_attr(each.number_attr)
        elif each.type_list_attr:
            number = len(op.get_attr(each.type_list_attr))
        found += [each.name] * number
    return found


@cache
def _registered(op_type: str, devices: tuple[str, ...]) -> list[Any]:
    """Return the kernels for these devices, the first device's first."""
    _register_xla()
    found = kernels.get_registered_kernels_for_op(op_type).kernel
    # a kernel with a label is for those who ask for it by name, as nobody here does
    return [kernel for device in devices for kernel in found if kernel.device_type == device and not kernel.label]


@cache
def _register_xla() -> None:
    """Have XLA register its kernels, which it does when it first compiles something."""
    tf.function(lambda: tf.zeros([]), jit_compile=True)()


@cache
def _kernel(op_type: str, dtypes: _Dtypes, devices: tuple[str, ...]) -> Any:
    """Return the kernel that TensorFlow chooses for these types; None if there is none."""
    given = dict(dtypes)
    for kernel in _registered(op_type, devices):
        allowed = {each.name: set(each.allowed_values.list.type) for each in kernel.constraint}
        if all({dtype.as_datatype_enum for dtype in given[name]} <= some for name, some in allowed.items()):
            return kernel
    return None


class Kind(NamedTuple):
    """What decides which operations steps have, beside the arm and its phase."""

    precision: str
    optimizer: str
    augmentation: str
    deterministic: bool

    def __str__(self) -> str:
        return ", ".join([*self[:3], *["deterministic"] * self.deterministic])


PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
# Every two of a precision, an optimizer and an augmentation meet, and determinism meets all but the optimizers, which
# it leaves as they are.
KINDS = tuple(
    Kind(precision, optimizer, ("none", "flip", "standard")[(i + j) % 3], j > 1)
    for i, precision in enumerate(PRECISIONS)
    for j, optimizer in enumerate(("adam", "sgd", "rmsprop", "adamw"))
)


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Have Keras's layers compute in this precision within the block."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def small_classifier(
    *, deterministic: bool = False, preprocess: Callable[[tf.Tensor], tf.Tensor] | None = None
) -> Classifier:
    """Return one with depthwise convolutions, BatchNorm and ReLU6, and a cut between pixels and pooled features."""
    row = BACKBONES["MobileNet"]
    backbone = build(row, 32, "conv_pw_2_relu")
    first = first_trainable(backbone, "conv_pw_2")
    cut = candidates(backbone, first)[-1].operation
    classifier = Classifier(backbone, preprocess or preprocessing(row), Head(2, (4,), 0.1), first, cut)
    if deterministic:
        unfuse_when_frozen(classifier.batch_norms())
    return classifier


def phases() -> list[tuple[str, Phase]]:
    """Return each phase of each arm, behind the arm's name."""
    return [(arm.name, phase) for arm in ARMS.values() for phase in arm.phases(Recipe(2, 1, 1e-3, 1e-4))]


def stage_of(classifier: Classifier, phase: Phase, augment: Augment | None = None) -> Stage:
    """Return the phase on four rows of zeros."""
    cut = classifier.cut(phase.trains)
    augmented = None
    if augment:
        whole = classifier.from_pixels(phase.trains)
        augmented = Augmented(whole, _rows(whole), augment)
    return Stage(phase, cut, _rows(cut), np.arange(4), _rows(cut), augmented)


def _rows(cut: Cut) -> Rows:
    return Rows(tuple("abcd"), np.zeros(4, np.int32), np.zeros((4, *cut.shape), cut.dtype), (b"",) * 4)


def audited_stage(classifier: Classifier, stage: Stage, optimizer: str = "adam", *, padded: bool = False) -> Audit:
    """Return the audit of a stage's steps.

    padded: of those for calls that XLA compiles on a GPU.
    """
    settings = TrainingSettings(optimizer=optimizer)
    steps = Trainer(stage.phase.name, classifier, settings, Console(None)).steps(stage)
    # the first of the flat arguments is the rows of the first replica
    return audit(steps.traced(padded=padded), rows=(0,))


def audited_steps(kind: Kind) -> dict[str, Audit]:
    """Return the audit of the steps of each phase of each arm, plain and padded."""
    found = {}
    with computing_in(kind.precision):
        classifier = small_classifier(deterministic=kind.deterministic)
        for arm, phase in phases():
            stage = stage_of(classifier, phase, augmenter(kind.augmentation))
            for padded in (False, True):
                name = f"{arm}, {phase.name}, {'padded' if padded else 'plain'}: {kind}"
                found[name] = audited_stage(classifier, stage, kind.optimizer, padded=padded)
    return found


def audited_passes(precision: str, *, deterministic: bool = False) -> dict[str, Audit]:
    """Return the audit of each function without gradients: features, inference and recalibration."""
    functions: dict[str, Any] = {}
    with computing_in(precision):
        classifier = small_classifier(deterministic=deterministic)
        pixels, within, pooled = (classifier.cut(part) for part in (Part.ALL, Part.TAIL, Part.HEAD))
        features = Features({"train": _rows(pixels)}, (), None, {}, Console(None))
        for cuts in ((within,), (pooled,), (within, pooled)):
            functions[f"features at {' and '.join(cut.name for cut in cuts)}"] = features._function(cuts)
        for cut in (pixels, within, pooled):
            functions[f"inference from {cut.name}"] = classifier.inference(cut)
        functions[f"recalibration from {pixels.name}"] = Recalibrator(classifier, pixels)._forward
        told = ", ".join([precision, *["deterministic"] * deterministic])
        return {f"{name}: {told}": audit(each.get_concrete_function()) for name, each in functions.items()}


def main() -> int:
    """Print the audit of every arm's steps and of every pass, and return 1 if anything is wrong."""
    found: dict[str, Audit] = {}
    for precision in PRECISIONS:
        for deterministic in (False, True):
            found |= audited_passes(precision, deterministic=deterministic)
    for kind in KINDS:
        found |= audited_steps(kind)
    sys.stdout.write(f"{table(found)}\n")
    return int(any(of.verdict for of in found.values()))


if __name__ == "__main__":
    sys.exit(main())
