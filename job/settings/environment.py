"""The environment as one frozen object: the only module that reads ``os.environ``.

:func:`load` reports everything that is wrong at once; :func:`variables` is the table of all variables, made from the
same declarations. ``groups`` declares them and ``types`` says what one value may be; all other modules
import from here. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import astuple, dataclass, field, fields
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from job.backbone_table import BACKBONES
from job.errors import ConfigError, Problem
from job.settings.groups import (
    PREFIX,
    DataSettings,
    Group,
    ModelSettings,
    OutputSettings,
    PlatformSettings,
    RuntimeSettings,
    TrainingSettings,
)
from job.settings.types import LONGEST, shown
from job.uris import without_secrets


@dataclass(frozen=True)
class Settings:
    """All settings of a run, each group for the module that owns it."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    platform: PlatformSettings = field(default_factory=PlatformSettings)

    @property
    def workers(self) -> int:
        """Return how many workers train together."""
        cluster = self.platform.cluster
        return len(cluster.addresses) if cluster else 1

    def resolved(self) -> dict[str, Any]:
        """Return every ``TRANSFER_`` setting as JSON values under its lower-case name without prefix.

        Defaults that depend on other settings are filled in; credentials and queries in URIs and paths are left out.
        """
        values: dict[str, Any] = {}
        for name in _GROUPS:
            values |= getattr(self, name).model_dump(mode="json")
        values["head_epochs"] = self.training.resolved_head_epochs
        values["fine_tune_from"] = self.training.fine_tune_from or BACKBONES[self.model.backbone].fine_tune_from
        values = {name: without_secrets(value) if isinstance(value, str) else value for name, value in values.items()}
        return {declared.name: values[declared.name] for declared in _SETTINGS}

    def deciding(self) -> dict[str, Any]:
        """Return the part of :meth:`resolved` that decides the result.

        Data and weights are not in it by name: whoever takes a fingerprint adds them by content.
        """
        values = self.resolved()
        return {declared.name: values[declared.name] for declared in _SETTINGS if declared.role.decides}


_GROUPS: dict[str, Any] = {each.name: each.default_factory for each in fields(Settings)}
# The contract lists these after all other settings, whoever owns them.
_LISTED_LAST = ("max_bad_images", "cost_per_hour", "log_format", "max_seconds", "max_cost")
_SETTINGS = sorted(
    (declared for group in _GROUPS.values() if group is not PlatformSettings for declared in group.declared()),
    key=lambda declared: _LISTED_LAST.index(declared.name) if declared.name in _LISTED_LAST else -1,
)
_NAMES = {declared.variable.removeprefix(PREFIX): declared.variable for declared in _SETTINGS}


def hyperparameters() -> dict[str, str]:
    """Return what the settings are called that say how a model is built and trained, by their lower-case names."""
    return {declared.name: declared.role.recipe for declared in _SETTINGS if declared.role.recipe}


def fingerprint(facts: Mapping[str, object]) -> str:
    """Return the sha256, in hex, of ``facts`` as canonical JSON: the order of keys does not matter.

    Raises:
        TypeError: if a value has no JSON form.
        ValueError: if a number is NaN or infinite.
    """
    canonical = json.dumps(dict(facts), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# TensorFlow's gs:// client reads its own when it is loaded. Without them it tries refused connections for 200 s, and a
# silent server for a quarter of an hour; with them for 36 s and 102 s at most: lost storage is known in two minutes.
_TENSORFLOW = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GCS_REQUEST_CONNECTION_TIMEOUT_SECS": "10",
    "GCS_REQUEST_IDLE_TIMEOUT_SECS": "10",
    "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "16000000",
    "GCS_RETRY_CONFIG_MAX_RETRIES": "5",
}


def prepare_tensorflow(environ: MutableMapping[str, str] = os.environ) -> None:
    """Hide TensorFlow's start-up notices, which drown the job's own log lines, and bound its waits for gs://.

    Call before it is imported. What is set already stays.
    """
    for name, value in _TENSORFLOW.items():
        environ.setdefault(name, value)


def skip_metadata_server(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep TensorFlow from asking a metadata server, which may be silent, for what is known not to be there."""
    environ.setdefault("NO_GCE_CHECK", "true")


# What TensorFlow, OpenBLAS (NumPy's and SciPy's) and OpenMP (scikit-learn's) take the size of their pools from. All but
# the last know on how many CPUs the process may run, none knows how much of their time its control group may take.
_POOL_SIZES = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def bound_threads(cpus: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have libraries start as many threads as there are ``cpus``; call before NumPy and TensorFlow are imported."""
    for name in _POOL_SIZES:
        environ.setdefault(name, str(cpus))


# --- the table of variables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variable:
    """One row of the table: all as text."""

    name: str
    type: str
    default: str
    meaning: str


def variables() -> list[Variable]:
    """Return every variable in the contract's order, the platform's after the job's own."""
    return [
        Variable(declared.variable, declared.kind, declared.default, str(declared.info.description))
        for declared in (*_SETTINGS, *PlatformSettings.declared())
    ]


def variables_markdown() -> str:
    """Return :func:`variables` as a Markdown table, its columns aligned."""
    rows = [("variable", "type", "default", "meaning"), *map(astuple, variables())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- reading -----------------------------------------------------------------------------------------------------


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check all settings.

    Args:
        environ: the environment; the process's own if None.

    Raises:
        ConfigError: with everything that is wrong, not the first thing only.
    """
    environ = os.environ if environ is None else environ
    problems = [_unknown(name, environ[name]) for name in sorted(environ) if _is_unknown(name)]
    settings = Settings(**{name: _read(group, environ, problems) for name, group in _GROUPS.items()})
    wrong = {problem.variable for problem in problems}
    for concerned, check in _CHECKS:
        if wrong.isdisjoint(concerned):
            problems.extend(Problem(concerned[0], message) for message in check(settings))
    if problems:
        raise ConfigError(problems)
    return settings


def log_format(environ: Mapping[str, str] | None = None) -> str:
    """Return the value of ``TRANSFER_LOG_FORMAT``, or "auto" where it is not an accepted one.

    With it the errors of :func:`load` can be reported.

    Args:
        environ: the environment; the process's own if None.
    """
    return _read(RuntimeSettings, os.environ if environ is None else environ, []).log_format


def _is_unknown(name: str) -> bool:
    # Transfer_Epochs, too, would otherwise change nothing without a word.
    return name.upper().startswith(PREFIX) and name not in _NAMES.values()


_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)


def _unknown(name: str, value: str) -> Problem:
    alike = name.upper().removeprefix(PREFIX)[:LONGEST]  # the longer, the slower
    nearest = _NAMES[difflib.get_close_matches(alike, _NAMES, n=1, cutoff=0)[0]]
    received = "a value not shown here" if _SECRET_NAME.search(name) else shown(value)
    return Problem(
        name if name.isprintable() and len(name) <= LONGEST else shown(name),
        f"received {received}, but there is no such setting; the nearest is {nearest} "
        "(`python -m job env` lists all that are accepted)",
    )


_GroupT = TypeVar("_GroupT", bound=Group)


def _read(group: type[_GroupT], environ: Mapping[str, str], problems: list[Problem]) -> _GroupT:
    """Return the group with what is right in the environment; add to ``problems`` what is not."""
    given: dict[str, str] = {}
    for declared in group.declared():
        value = environ.get(declared.variable)
        if value is None or (value == "" and declared.default == ""):
            continue
        if value == "":
            fault = f"an empty value is not a default; unset it for {declared.default}, or give {declared.accepted}"
        elif declared.variable.startswith(PREFIX) and value != value.strip():
            fault = f"it begins or ends with white space; accepted: {declared.accepted}, without it"
        else:
            given[declared.variable.lower()] = value
            continue
        problems.append(Problem(declared.variable, f"received {shown(value)}: {fault}"))
    source = EnvSettingsSource(group)
    source.env_vars = given
    values = source()
    try:
        return group(**values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0])
            declared = next(declared for declared in group.declared() if key in (declared.name, declared.variable))
            values.pop(key, None)
            problems.append(declared.problem(environ[declared.variable], detail))
    return group(**values)


# --- checks over several values ---------------------------------------------------------------------------------


def _check_same_split(second: str, first: str, settings: Settings) -> Iterator[str]:
    expressions = dict(settings.data)
    mine, other = (expressions[name.removeprefix(PREFIX).lower()] for name in (second, first))
    if "".join(mine.split()) == "".join(other.split()):
        yield (
            f"received {shown(mine)}, which {first} is too; "
            "accepted: TFDS split expressions that do not overlap, e.g. train[:80%], train[80%:90%], train[90%:]"
        )


def _check_image_size(settings: Settings) -> Iterator[str]:
    smallest = BACKBONES[settings.model.backbone].minimum_size
    if settings.model.image_size < smallest:
        yield (
            f"received '{settings.model.image_size}', which is too small for {settings.model.backbone} "
            f"(TRANSFER_BACKBONE); accepted: a whole number, at least {smallest} and at most 4096"
        )


def _check_head_epochs(settings: Settings) -> Iterator[str]:
    training = settings.training
    if "fine_tune" in training.arms and training.resolved_head_epochs >= training.epochs:
        yield (
            f"received '{training.head_epochs}', which with TRANSFER_EPOCHS={training.epochs} leaves fine_tune no "
            f"epoch to fine-tune in; accepted: a whole number, at least 0 and below {training.epochs}; "
            "or raise TRANSFER_EPOCHS, or leave fine_tune out of TRANSFER_ARMS"
        )


def _check_max_cost(settings: Settings) -> Iterator[str]:
    output = settings.output
    if output.max_cost is not None and not output.cost_per_hour:
        price = "none is set" if output.cost_per_hour is None else f"that is {output.cost_per_hour:g}"
        yield (
            f"received '{output.max_cost:g}', which is counted in hours at TRANSFER_COST_PER_HOUR, and {price}; "
            "give a price above 0, or cap the time by TRANSFER_MAX_SECONDS"
        )


# Each check runs when the variables it concerns are right in themselves; its problems bear the first one's name.
_SPLITS = ("TRANSFER_TRAIN_SPLIT", "TRANSFER_VALIDATION_SPLIT", "TRANSFER_TEST_SPLIT")
_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Settings], Iterator[str]]], ...] = (
    *(((second, first), partial(_check_same_split, second, first)) for first, second in combinations(_SPLITS, 2)),
    (("TRANSFER_IMAGE_SIZE", "TRANSFER_BACKBONE"), _check_image_size),
    (("TRANSFER_HEAD_EPOCHS", "TRANSFER_EPOCHS", "TRANSFER_ARMS"), _check_head_epochs),
    (("TRANSFER_MAX_COST", "TRANSFER_COST_PER_HOUR"), _check_max_cost),
)
