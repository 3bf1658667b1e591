"""The published records: what a run's ``manifest.json`` holds, frozen and versioned.

Every reader of a bucket depends on these names. A change to one is a change of ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

SCHEMA_VERSION: Literal["1.0"] = "1.0"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Names in a run's folder. What lies below PENDING is unfinished work, and gone once the run is published.
MANIFEST = "manifest.json"
SCHEMA = "manifest.schema.json"
PENDING = "checkpoints"

Share = Annotated[float, Field(ge=0, le=1)]
# of 64 bits, which other languages have
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Field(ge=0)]

_T = TypeVar("_T")
# The first wrong entry is told of, not millions.
Many = Annotated[tuple[_T, ...], FailFast()]

# A path in the run's folder: relative, with slashes, and neither empty parts nor . and .. that lead out of it.
_NEVER = r"/\\\x00-\x1f\x7f-\x9f"
_NAME = rf"(?:[^.{_NEVER}][^{_NEVER}]*|\.[^.{_NEVER}][^{_NEVER}]*|\.\.[^{_NEVER}]+)"
_PATH = rf"{_NAME}(?:/{_NAME})*"


def _path(value: str) -> str:
    if not re.fullmatch(_PATH, value):
        raise ValueError(f"{value!r} is no path inside the run, with slashes and without control characters")
    return value


RunPath = Annotated[
    str,
    StringConstraints(max_length=1024),
    AfterValidator(_path),
    Field(json_schema_extra={"pattern": f"^{_PATH}$"}),
]

_ROW = re.compile(rb"\[\n\s+(\d+(?:,\n\s+\d+)*)\n\s+\]")
# Fields that do not apply to every record of their kind: they are absent then, not null.
_OMIT = {"batch_norm", "energy_joules", "cost", "own_cost", "own_seconds", "export_proof", "code", "revision", "image"}


class Record(BaseModel):
    """Base of all records: immutable, and no field beside the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _leave_out_what_does_not_apply(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in _OMIT or value is not None}


class Code(Record):
    """The job's own code. digest: of its files. revision, image: of the build, where that or the platform says so."""

    version: str
    digest: Sha256
    revision: str | None = None
    image: str | None = None


class Environment(Record):
    """What the run ran on.

    tf32: whether products of float32 were taken of TF32's 10 bits. xla: whether XLA compiled training steps.
    """

    python: str
    tensorflow: str
    keras: str
    tensorflow_datasets: str
    job: str
    devices: Many[str]
    workers: Annotated[int, Field(ge=1)]
    precision: str
    tf32: bool = False
    xla: bool
    deterministic: bool


class Split(Record):
    """One split as it was read: ``examples`` counts the decodable images."""

    expression: str
    examples: Count


class Splits(Record):
    """The three splits, proven disjoint before training."""

    train: Split
    validation: Split
    test: Split


class Example(Record):
    """One example of the data set."""

    split: Literal["train", "validation", "test"]
    example_id: str


class Duplicate(Record):
    """Examples of more than one split that show the same photo: byte for byte (exact), or encoded anew (near)."""

    kind: Literal["exact", "near"]
    examples: Many[Example]


class Dataset(Record):
    """The data set.

    duplicates_across_splits: distinct photos that lie in more than one split; ``duplicates`` lists them, the first
    1,000 if there are more. licence, citation and homepage: as the data set states them, null where it does not.
    """

    name: str
    version: str
    classes: Many[str]
    skipped_examples: Count
    duplicates_across_splits: Count
    duplicates: Many[Duplicate] = ()
    splits: Splits
    licence: str | None = None
    citation: str | None = None
    homepage: str | None = None


class Weights(Record):
    """The weights file that was loaded: where it came from, its hash, and its licence where that is known."""

    source: str
    sha256: Sha256
    licence: str | None = None


class Backbone(Record):
    """The backbone. ``layers`` and ``parameters`` are counted after truncation; no ``weights`` if only scratch ran."""

    name: str
    image_size: Annotated[int, Field(ge=1)]
    layers: Count
    parameters: Count
    weights: Weights | None


class Parameters(Record):
    """Parameter counts of the composed model; trainable as in the result's last phase."""

    total: Count
    trainable: Count
    backbone_trainable: Count


class Epoch(Record):
    """One epoch. Losses are mean cross-entropies in nats per example.

    ``train_*`` are measured on the fly, while the weights move; ``validation_*`` after the epoch, in inference mode.
    """

    epoch: Annotated[int, Field(ge=1)]
    phase: str
    train_loss: float
    train_accuracy: Share
    validation_loss: float
    validation_accuracy: Share
    seconds: Seconds


class ClassMetrics(Record):
    """One class against the rest."""

    name: str
    precision: Share
    recall: Share
    f1: Share
    support: Count


class Bin(Record):
    """Examples whose top probability lies in one of the equal-width bins: their mean top probability and accuracy."""

    examples: Annotated[int, Field(ge=1)]
    confidence: Share
    accuracy: Share


class SplitMetrics(Record):
    """Metrics of one result on one split, each example counted once.

    accuracy_interval: 95% Wilson score interval. auc: area under the ROC curve, averaged one-vs-rest over classes,
    null where a class is absent. calibration_error: expected calibration error over 15 equal-width bins.
    reliability: those of the bins that have examples, ascending. confusion: counts, rows true classes, columns
    predicted classes.
    """

    examples: Count
    loss: float
    accuracy: Share
    accuracy_interval: tuple[Share, Share]
    auc: Share | None
    calibration_error: Share
    reliability: Many[Bin] = ()
    confusion: Many[Many[Count]]
    per_class: Many[ClassMetrics]


class Metrics(Record):
    """Metrics on the three splits, all measured after training, in inference mode."""

    train: SplitMetrics
    validation: SplitMetrics
    test: SplitMetrics


class BatchNorm(Record):
    """Test accuracy with the moving averages as training left them, and with re-estimated statistics."""

    test_accuracy_raw: Share
    test_accuracy_recalibrated: Share


class Durations(Record):
    """Wall-clock seconds. What several results share (data, features) stands at the first that needed it."""

    data: Seconds
    features: Seconds
    training: Seconds
    evaluation: Seconds
    export: Seconds
    total: Seconds


class RowsRead(Record):
    """What the last phase read in each epoch.

    cut: ``pixels``, ``pooled``, or the backbone layer that the rows follow. row_bytes: of one example. kept: memory or
    disk; or no, where frozen layers ran in every epoch.
    """

    cut: str
    row_bytes: Count
    kept: Literal["memory", "disk", "no"]


class Wrong(Record):
    """A test example that a model got wrong: the names of its class and of the predicted one; their probabilities."""

    example_id: str
    label: str
    predicted: str
    label_probability: Share
    predicted_probability: Share


class ExportProof(Record):
    """How the reloaded SavedModel's predictions differ from those measured, on some test examples.

    examples: how many. logit_spread: standard deviation of the measured logits, each example's centred.
    largest_logit_difference: of centred logits. tolerance: what is accepted of it, a share of the spread by the
    arithmetic that ran. same_class: examples for which both give the same class.
    """

    examples: Count
    logit_spread: Annotated[float, Field(ge=0)]
    largest_logit_difference: Annotated[float, Field(ge=0)]
    tolerance: Annotated[float, Field(gt=0)]
    largest_probability_difference: Share
    same_class: Count


class Result(Record):
    """One (arm, train_fraction, seed).

    most_wrong: the test examples with the highest losses among those it got wrong, at most 12, the highest first.
    examples_per_second: in the last phase's training steps, but for the first. xla: whether XLA compiled some of them.
    energy_joules: of the devices while it was trained, evaluated and exported; absent where they do not tell.
    """

    arm: str
    train_fraction: Annotated[float, Field(gt=0, le=1)]
    seed: Count
    train_examples: Count
    resumed: Count
    parameters: Parameters
    history: Many[Epoch]
    metrics: Metrics
    batch_norm: BatchNorm | None = None
    most_wrong: Many[Wrong] = ()
    rows: RowsRead
    seconds: Durations
    examples_per_second: Annotated[float, Field(ge=0)]
    xla: bool = False
    energy_joules: Annotated[float, Field(ge=0)] | None = None
    cost: Annotated[float, Field(ge=0)] | None = None
    saved_model: RunPath
    export_proof: ExportProof | None = None


class Summary(Record):
    """All seeds of one (arm, train_fraction).

    train_examples: of each seed. test_accuracy: their mean, with a 95% interval that ``method`` names. seconds and
    cost: mean of a result. own_seconds and own_cost: the same without what several results share (data, features),
    which stands at the first that needed it: by these, arms can be compared.
    """

    arm: str
    train_fraction: Annotated[float, Field(gt=0, le=1)]
    train_examples: Count
    seeds: Many[Count]
    test_accuracy: Share
    interval: tuple[Share, Share]
    method: str
    seconds: Seconds
    cost: Annotated[float, Field(ge=0)] | None = None
    own_seconds: Seconds | None = None
    own_cost: Annotated[float, Field(ge=0)] | None = None


class Comparison(Record):
    """Two arms on the same test examples. ``difference`` is better minus worse, in test accuracy.

    seeds: those whose models are compared; one where a single model of each arm is.
    """

    train_fraction: float
    seeds: Many[Count] = ()
    better: str
    worse: str
    difference: float
    interval: tuple[float, float]
    p_value: Share
    method: str
    verdict: str


class Artifact(Record):
    """A published file. ``crc32c`` is base64 of the big-endian value, as object storage gives it."""

    path: RunPath
    bytes: Count
    sha256: Sha256
    crc32c: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{6}==$")]


class Manifest(Record):
    """A published run. ``verdict`` is its answer in one to three sentences. code: absent where an older job ran."""

    schema_version: Literal["1.0"]
    run_id: str
    created: AwareDatetime
    fingerprint: Sha256
    code: Code | None = None
    settings: dict[str, Any]
    environment: Environment
    dataset: Dataset
    backbone: Backbone
    results: Many[Result]
    summaries: Many[Summary] = ()
    verdict: str = ""
    comparisons: Many[Comparison]
    artifacts: Many[Artifact]

    def to_json(self) -> bytes:
        """Return the manifest as it is published: UTF-8 JSON, indented, ending in a newline.

        A list of whole numbers is one line: the confusion matrices of 1,000 classes have an eighth of the bytes so.
        """
        # in a text of JSON there are no line breaks
        data = _ROW.sub(lambda row: b"[" + b"".join(row[1].split()) + b"]", self.model_dump_json(indent=2).encode())
        return data + b"\n"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) that every manifest of this version satisfies."""
    schema = Manifest.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
