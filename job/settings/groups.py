"""Every setting with its default and meaning, in one group for each owner. A new setting is one line in its group."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from job.backbone_table import BACKBONES
from job.settings import types
from job.settings.cluster import Cluster, image_of, parse
from job.settings.types import ASIDE, DESIGN, LARGEST, Accepts, Declared, Role, ShownDefault

PREFIX = "TRANSFER_"

LEARNING_RATE = 1e-3
FINE_TUNE_LEARNING_RATE = 1e-4
HEAD_SHARE = 0.2


def default_head_epochs(epochs: int) -> int:
    """Return how many of ``epochs`` fine_tune trains the head alone when nothing is said: always fewer than all."""
    return min(epochs - 1, max(1, round(HEAD_SHARE * epochs)))


class Group(BaseSettings):
    """One owner's settings. Built from its arguments alone: ``environment.load`` gives it the environment."""

    model_config = SettingsConfigDict(
        frozen=True, env_prefix=PREFIX, enable_decoding=False, allow_inf_nan=False, validate_by_name=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  (the signature is pydantic's)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave the constructor's arguments as the only source."""
        return (init_settings,)

    @classmethod
    def declared(cls) -> list[Declared]:
        """Return the fields, each with the variable that sets it."""
        return [
            Declared(str(info.validation_alias or PREFIX + name.upper()), name, info)
            for name, info in cls.model_fields.items()
        ]


def recipe(words: str) -> Role:
    """Return the role of a setting that is part of how a model is built and trained."""
    return Role(True, words)


def _setting(default: Any, meaning: str, role: Role, **bounds: Any) -> Any:
    """Return the field of a setting. meaning: for the table of variables. bounds: as pydantic's Field takes them."""
    return Field(default, description=meaning, json_schema_extra={"role": cast("Any", role)}, **bounds)


class DataSettings(Group):
    """Which photos, and which of them for what. The data set decides by its content, not by name or place."""

    dataset: types.DatasetName = _setting(
        "cats_vs_dogs",
        "TFDS name, name:version, name/config, or the path or gs:// URI of a prepared TFDS directory",
        ASIDE,
    )
    data_dir: Annotated[types.Location | None, ShownDefault("TFDS's own")] = _setting(
        None, "where prepared data sets lie: a local path or gs:// URI", ASIDE
    )
    train_split: types.Text = _setting("train[:20%]", "TFDS split expression", DESIGN)
    validation_split: types.Text = _setting("train[80%:90%]", "likewise", DESIGN)
    test_split: types.Text = _setting("train[90%:]", "likewise; the three must not overlap", DESIGN)
    train_fractions: types.DistinctList[types.Fraction] = _setting(
        (1.0,), "parts of the train split at which every arm is trained, nested", DESIGN
    )
    max_bad_images: float = _setting(
        0.01,
        "share of undecodable images that is skipped (and counted) before the run stops",
        ASIDE,
        ge=0,
        lt=1,
    )


class ModelSettings(Group):
    """The backbone and the head on it. Weights decide by their hash, not by name or place."""

    backbone: types.BackboneName = _setting("MobileNetV2", "a keras.applications model", recipe("backbone"))
    image_size: int = _setting(160, "side of the square image, in pixels", recipe("image size"), ge=1, le=4096)
    weights: types.Weights = _setting(
        "imagenet", "or the path or gs:// URI of a no-top weights file; its sha256 is recorded", ASIDE
    )
    weights_sha256: types.Sha256 | None = _setting(None, "refuse weights with another hash", ASIDE)
    truncate_at: types.Text | None = _setting(
        None,
        "layer after which the rest of the backbone is left out",
        recipe("last layer of the backbone"),
    )
    head_units: types.CommaList[types.Units] = _setting(
        (),
        "units of hidden Dense layers between pooling and the classifier, e.g. 256,128",
        recipe("hidden units of the head"),
    )
    dropout: float = _setting(0.0, "share of features dropped before the classifier", recipe("dropout"), ge=0, lt=1)


class TrainingSettings(Group):
    """How the arms are trained."""

    arms: types.DistinctList[Literal["scratch", "frozen", "fine_tune"]] = _setting(
        ("scratch", "frozen", "fine_tune"), "which arms run: scratch, frozen, fine_tune", DESIGN
    )
    fine_tune_from: Annotated[types.Text | None, ShownDefault("the backbone's own")] = _setting(
        None,
        "first backbone layer that trains in fine_tune, or all "
        f"(MobileNetV2: {BACKBONES['MobileNetV2'].fine_tune_from})",
        recipe("first layer that fine-tuning trains"),
    )
    epochs: int = _setting(10, "per arm, all its phases together", recipe("epochs"), ge=1, le=LARGEST)
    head_epochs: Annotated[int | None, ShownDefault(f"{HEAD_SHARE:.0%} of the epochs")] = _setting(
        None,
        "of these, how many fine_tune first trains the head alone",
        recipe("epochs of the head alone"),
        ge=0,
        le=LARGEST,
    )
    batch_size: Annotated[
        int,
        Accepts("a whole number, at least 2 and at most 65536 (rows of a batch of one are not bit-equal to others)"),
    ] = _setting(32, "images per step, global: over all devices and workers", recipe("batch size"), ge=2, le=65536)
    optimizer: Literal["adam", "sgd", "rmsprop", "adamw"] = _setting(
        "adam", "adam, sgd (momentum 0.9), rmsprop, adamw", recipe("optimizer")
    )
    learning_rate: types.Rate = _setting(
        LEARNING_RATE, "scratch, frozen, and fine_tune's head phase", recipe("learning rate")
    )
    fine_tune_learning_rate: types.Rate = _setting(
        FINE_TUNE_LEARNING_RATE,
        "fine_tune after unfreezing",
        recipe("learning rate of fine-tuning"),
    )
    augmentation: Literal["none", "flip", "standard"] = _setting(
        "none", "none, flip, or standard (flip, shift, zoom, contrast)", recipe("augmentation")
    )
    seeds: types.DistinctList[types.Seed] = _setting((0,), "each seed repeats every arm", DESIGN)

    @property
    def resolved_head_epochs(self) -> int:
        """Epochs in which fine_tune trains the head alone, with the default filled in."""
        return default_head_epochs(self.epochs) if self.head_epochs is None else self.head_epochs


class RuntimeSettings(Group):
    """The machine and the log."""

    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = _setting(
        "auto", "auto, float32, mixed_float16, mixed_bfloat16", DESIGN
    )
    xla: Literal["auto", "on", "off"] = _setting("auto", "auto, on, off", DESIGN)
    deterministic: types.Boolean = _setting(False, "bit-reproducible, at the cost of speed", DESIGN)
    feature_cache: Literal["auto", "off"] = _setting(
        "auto", "auto, off: train frozen layers' outputs from a cache, or run them every step", DESIGN
    )
    cache_dir: Annotated[types.LocalPath | None, ShownDefault("a temporary folder")] = _setting(
        None, "local scratch disk", ASIDE
    )
    log_format: Literal["auto", "text", "json"] = _setting(
        "auto", "auto: text and progress bars on a terminal, JSON lines elsewhere; or text, json", ASIDE
    )


class OutputSettings(Group):
    """What is published where, and what is kept on the way."""

    checkpoint_uri: Annotated[types.Location | None, ShownDefault("AIP_CHECKPOINT_DIR, else under the run")] = _setting(
        None, "where unfinished work is kept: a local path or gs:// URI", ASIDE
    )
    checkpoint_seconds: float = _setting(60, "at most this much work, in seconds, is lost to a kill", ASIDE, gt=0)
    output_uri: types.Location = _setting("output", "local folder or gs://bucket/prefix", ASIDE)
    run_id: Annotated[types.RunId | None, ShownDefault("from the fingerprint")] = _setting(
        None, "the same settings on the same data give the same id", ASIDE
    )
    cost_per_hour: float | None = _setting(None, "price of the machine, for the cost columns", ASIDE, ge=0, le=LARGEST)
    max_seconds: float | None = _setting(
        None,
        "a cap on a run's time over all restarts, at which progress is saved and the exit is 78",
        ASIDE,
        gt=0,
        le=LARGEST,
    )
    max_cost: float | None = _setting(None, "the same in money, with TRANSFER_COST_PER_HOUR", ASIDE, gt=0, le=LARGEST)


class PlatformSettings(Group):
    """What the platform and other programs set; an empty value counts as unset."""

    model_dir: types.Location | None = Field(
        None, validation_alias="AIP_MODEL_DIR", description="Vertex AI: the best SavedModel also lies directly in it"
    )
    checkpoint_dir: types.Location | None = Field(
        None,
        validation_alias="AIP_CHECKPOINT_DIR",
        description="Vertex AI: where unfinished work is kept",
    )
    tensorboard_log_dir: types.Location | None = Field(
        None,
        validation_alias="AIP_TENSORBOARD_LOG_DIR",
        description="where TensorBoard is shown, below the run's id, how training goes",
    )
    tf_config: types.TfConfig | None = Field(
        None, validation_alias="TF_CONFIG", description="several workers: the cluster and this one's task, as JSON"
    )
    nvidia_visible_devices: str | None = Field(
        None,
        validation_alias="NVIDIA_VISIBLE_DEVICES",
        description="the GPUs that the container was to get: with any, a run that can use none is refused",
    )
    cuda_visible_devices: str | None = Field(
        None, validation_alias="CUDA_VISIBLE_DEVICES", description="the GPUs that may be used; -1: none, the CPU trains"
    )
    nvidia_tf32_override: str | None = Field(
        None,
        validation_alias="NVIDIA_TF32_OVERRIDE",
        description="0: GPUs multiply float32 with all its bits instead of TF32's 10",
    )
    job_revision: str | None = Field(
        None,
        validation_alias="JOB_REVISION",
        description="the revision that an image was built from: the image sets it, the manifest says it",
    )
    job_image: str | None = Field(
        None,
        validation_alias="JOB_IMAGE",
        description="the image that runs, with its digest, for the manifest; Vertex AI's CLUSTER_SPEC names it too",
    )
    cluster_spec: str | None = Field(
        None, validation_alias="CLUSTER_SPEC", description="Vertex AI: the job's own specification, as JSON"
    )
    ephemeral_storage_limit: int | None = Field(
        None,
        validation_alias="EPHEMERAL_STORAGE_LIMIT",
        description="Kubernetes: bytes of disk that the container may use (limits.ephemeral-storage); 0: no limit",
        ge=0,
    )
    storage_emulator_host: str | None = Field(
        None, validation_alias="STORAGE_EMULATOR_HOST", description="address of a storage server to use for gs://"
    )
    keras_home: str | None = Field(None, validation_alias="KERAS_HOME", description="folder of Keras's weights cache")
    tfds_data_dir: str | None = Field(
        None, validation_alias="TFDS_DATA_DIR", description="TFDS's own folder of prepared data sets"
    )

    @property
    def cluster(self) -> Cluster | None:
        """Return the workers that train together; None where this process trains alone."""
        return parse(self.tf_config) if self.tf_config else None

    @property
    def image(self) -> str | None:
        """Return the name of the image that runs, None where nobody says it."""
        return self.job_image or image_of(self.cluster_spec or "")
