"""Every setting with its default and meaning, in one group for each owner. A new setting is one line in its group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from job.backbone_table import BACKBONES
from job.settings.cluster import Cluster, parse
from job.settings.types import (
    Accepts,
    BackboneName,
    Boolean,
    CommaList,
    DatasetName,
    Declared,
    DistinctList,
    Fraction,
    LocalPath,
    Location,
    Rate,
    RunId,
    Seed,
    Sha256,
    ShownDefault,
    Text,
    TfConfig,
    Units,
    Weights,
)

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


class DataSettings(Group):
    """Which photos, and which of them for what."""

    dataset: DatasetName = Field(
        "cats_vs_dogs",
        description="TFDS name, name:version, name/config, or the path or gs:// URI of a prepared TFDS directory",
    )
    data_dir: Annotated[Location | None, ShownDefault("TFDS's own")] = Field(
        None, description="where prepared data sets lie: a local path or gs:// URI"
    )
    train_split: Text = Field("train[:20%]", description="TFDS split expression")
    validation_split: Text = Field("train[80%:90%]", description="likewise")
    test_split: Text = Field("train[90%:]", description="likewise; the three must not overlap")
    train_fractions: DistinctList[Fraction] = Field(
        (1.0,), description="parts of the train split at which every arm is trained, nested"
    )
    max_bad_images: float = Field(
        0.01, ge=0, lt=1, description="share of undecodable images that is skipped (and counted) before the run stops"
    )


class ModelSettings(Group):
    """The backbone and the head on it."""

    backbone: BackboneName = Field("MobileNetV2", description="a keras.applications model")
    image_size: int = Field(160, ge=1, le=4096, description="side of the square image, in pixels")
    weights: Weights = Field(
        "imagenet", description="or the path or gs:// URI of a no-top weights file; its sha256 is recorded"
    )
    weights_sha256: Sha256 | None = Field(None, description="refuse weights with another hash")
    truncate_at: Text | None = Field(None, description="layer after which the rest of the backbone is left out")
    head_units: CommaList[Units] = Field(
        (), description="units of hidden Dense layers between pooling and the classifier, e.g. 256,128"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of features dropped before the classifier")


class TrainingSettings(Group):
    """How the arms are trained."""

    arms: DistinctList[Literal["scratch", "frozen", "fine_tune"]] = Field(
        ("scratch", "frozen", "fine_tune"), description="which arms run: scratch, frozen, fine_tune"
    )
    fine_tune_from: Annotated[Text | None, ShownDefault("the backbone's own")] = Field(
        None,
        description="first backbone layer that trains in fine_tune, or all "
        f"(MobileNetV2: {BACKBONES['MobileNetV2'].fine_tune_from})",
    )
    epochs: int = Field(10, ge=1, description="per arm, all its phases together")
    head_epochs: Annotated[int | None, ShownDefault(f"{HEAD_SHARE:.0%} of the epochs")] = Field(
        None, ge=0, description="of these, how many fine_tune first trains the head alone"
    )
    batch_size: Annotated[
        int,
        Accepts("a whole number, at least 2 and at most 65536 (rows of a batch of one are not bit-equal to others)"),
    ] = Field(32, ge=2, le=65536, description="images per step, global: over all devices and workers")
    optimizer: Literal["adam", "sgd", "rmsprop", "adamw"] = Field(
        "adam", description="adam, sgd (momentum 0.9), rmsprop, adamw"
    )
    learning_rate: Rate = Field(LEARNING_RATE, description="scratch, frozen, and fine_tune's head phase")
    fine_tune_learning_rate: Rate = Field(FINE_TUNE_LEARNING_RATE, description="fine_tune after unfreezing")
    augmentation: Literal["none", "flip", "standard"] = Field(
        "none", description="none, flip, or standard (flip, shift, zoom, contrast)"
    )
    seeds: DistinctList[Seed] = Field((0,), description="each seed repeats every arm")

    @property
    def resolved_head_epochs(self) -> int:
        """Epochs in which fine_tune trains the head alone, with the default filled in."""
        return default_head_epochs(self.epochs) if self.head_epochs is None else self.head_epochs


class RuntimeSettings(Group):
    """The machine and the log."""

    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = Field(
        "auto", description="auto, float32, mixed_float16, mixed_bfloat16"
    )
    xla: Literal["auto", "on", "off"] = Field("auto", description="auto, on, off")
    deterministic: Boolean = Field(False, description="bit-reproducible, at the cost of speed")
    feature_cache: Literal["auto", "off"] = Field(
        "auto", description="auto, off: train frozen layers' outputs from a cache, or run them every step"
    )
    cache_dir: Annotated[LocalPath | None, ShownDefault("a temporary folder")] = Field(
        None, description="local scratch disk"
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="auto: text and progress bars on a terminal, JSON lines elsewhere; or text, json"
    )


class OutputSettings(Group):
    """What is published where, and what is kept on the way."""

    checkpoint_uri: Annotated[Location | None, ShownDefault("AIP_CHECKPOINT_DIR, else under the run")] = Field(
        None, description="where unfinished work is kept: a local path or gs:// URI"
    )
    checkpoint_seconds: float = Field(60, gt=0, description="at most this much work, in seconds, is lost to a kill")
    output_uri: Location = Field("output", description="local folder or gs://bucket/prefix")
    run_id: Annotated[RunId | None, ShownDefault("from the fingerprint")] = Field(
        None, description="the same settings on the same data give the same id"
    )
    cost_per_hour: float | None = Field(None, ge=0, description="price of the machine, for the cost columns")


class PlatformSettings(Group):
    """What the platform and other programs set; an empty value counts as unset."""

    model_dir: Location | None = Field(
        None, validation_alias="AIP_MODEL_DIR", description="Vertex AI: the best SavedModel also lies directly in it"
    )
    checkpoint_dir: Location | None = Field(
        None,
        validation_alias="AIP_CHECKPOINT_DIR",
        description="Vertex AI: where unfinished work is kept",
    )
    tensorboard_log_dir: Location | None = Field(
        None,
        validation_alias="AIP_TENSORBOARD_LOG_DIR",
        description="where TensorBoard is shown, below the run's id, how training goes",
    )
    tf_config: TfConfig | None = Field(
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
