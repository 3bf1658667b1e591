"""What one setting may be: the types of its value, and the words for them in error messages and in the table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints
from pydantic.fields import FieldInfo

from job.backbone_table import BACKBONES
from job.errors import Problem
from job.settings import cluster
from job.uris import bucket_and_name, is_uri, without_secrets


@dataclass(frozen=True)
class Accepts:
    """What a type takes, in the words of an error message, where the type itself does not say it."""

    text: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShownDefault:
    """How the table shows a default that is no fixed value."""

    text: str


@dataclass(frozen=True)
class Role:
    """What other modules must know of a setting.

    decides: whether it decides the result, so that it is part of the fingerprint. recipe: where it says how a model is
    built and trained, what it is called in a model card and listed as among TensorBoard's hyperparameters.
    """

    decides: bool
    recipe: str | None = None


ASIDE = Role(decides=False)
DESIGN = Role(decides=True)
# What is counted or paid is no more than this; a number of hundreds of digits is no number that can be computed with.
LARGEST = 1_000_000_000
# Characters of what was received that are shown.
LONGEST = 80


# --- types -------------------------------------------------------------------------------------------------------


def _boolean(value: object) -> object:
    if not isinstance(value, str):
        return value
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if value.lower() not in known:
        raise ValueError
    return known[value.lower()]


def _split_commas(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")] if value else []
    if "" in parts:
        raise ValueError("an entry of the list is empty")
    return parts


T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("an entry is repeated")
    return values


def _location(value: str) -> str:
    if is_uri(value):
        _, name = bucket_and_name(value)
        if "?" in name or "#" in name:
            raise ValueError("a gs:// URI has no '?' or '#'")
    return value


def _local(value: str) -> str:
    if is_uri(value):
        raise ValueError("it must be on a local disk")
    return value


def _weights(value: str) -> str:
    if value != "imagenet" and "/" not in value and "." not in value:
        raise ValueError("it is neither imagenet nor the name of a file")
    return _location(value)


def _known_backbone(value: str) -> str:
    if value not in BACKBONES:
        raise ValueError
    return value


def _tf_config(value: str) -> str:
    cluster.parse(value)
    return value


_DISTINCT = AfterValidator(_distinct)

Boolean = Annotated[bool, BeforeValidator(_boolean)]
CommaList = Annotated[tuple[T, ...], BeforeValidator(_split_commas)]
DistinctList = Annotated[CommaList[T], _DISTINCT]
Fraction = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=10)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Units = Annotated[int, Field(ge=1, le=LARGEST)]
Text = Annotated[str, StringConstraints(min_length=1)]
LocalPath = Annotated[Text, AfterValidator(_local), Accepts("a local path")]
Location = Annotated[
    Text, AfterValidator(_location), Accepts("a local path, or gs://bucket or gs://bucket/prefix of a valid bucket")
]
DatasetName = Annotated[
    Text,
    AfterValidator(_location),
    Accepts("a TFDS name, name:version, name/config, or the path or gs:// URI of a prepared TFDS directory"),
]
BackboneName = Annotated[
    str,
    AfterValidator(_known_backbone),
    Accepts("a keras.applications model: " + ", ".join(BACKBONES), tuple(BACKBONES)),
]
Weights = Annotated[
    Text,
    AfterValidator(_weights),
    Accepts("imagenet, or the path or gs:// URI of a no-top weights file", ("imagenet",)),
]
Sha256 = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True), Accepts("64 hexadecimal digits")
]
RunId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"),
    Accepts("1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit"),
]
TfConfig = Annotated[
    str,
    AfterValidator(_tf_config),
    Accepts("a JSON object as TensorFlow defines it, whose cluster has one chief and workers, or workers only"),
]


# --- words -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """A field of a group, and the variable that sets it."""

    variable: str
    name: str
    info: FieldInfo

    @property
    def kind(self) -> str:
        """The type, as the table shows it."""
        return _kind(self.info.annotation)

    @property
    def default(self) -> str:
        """The default, as the table shows it; blank if the variable may be empty."""
        shown_default = next((note for note in self.info.metadata if isinstance(note, ShownDefault)), None)
        return shown_default.text if shown_default else as_text(self.info.default)

    @property
    def role(self) -> Role:
        """What other modules must know of it."""
        return cast("dict[str, Any]", self.info.json_schema_extra)["role"]  # type: ignore[no-any-return]

    @property
    def accepted(self) -> str:
        """What the variable takes, to follow "accepted: "."""
        return _accepted(self.info.rebuild_annotation())

    def problem(self, received: str, detail: Mapping[str, Any]) -> Problem:
        """Return in the user's words what pydantic found wrong: ``detail`` is one of a ValidationError's errors."""
        message = f"received {shown(received)}"
        culprit = received
        if len(detail["loc"]) > 1 and "," in received:
            culprit = str(detail["input"])
            message += f", of which {shown(culprit)} is not accepted"
        if reason := str(detail.get("ctx", {}).get("error", "")):
            message += f": {reason}"
        message += f"; accepted: {self.accepted}"
        choices = {choice.casefold(): choice for choice in _choices(self.info.rebuild_annotation())}
        if near := difflib.get_close_matches(culprit.casefold(), choices, n=1):
            message += f"; did you mean {choices[near[0]]}?"
        return Problem(self.variable, message)


def as_text(value: object) -> str:
    """Return a value as it would stand in the environment; blank for None."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def shown(value: str) -> str:
    """Return what was received as it may stand in a log: quoted, at most 80 characters, without secrets in a URL."""
    quoted = repr(without_secrets(value))
    return quoted if len(quoted) <= LONGEST else f"{quoted[: LONGEST - 1]}…"


def _unwrapped(annotation: Any) -> tuple[Any, list[Any]]:
    """Return the plain type inside Optional and Annotated, and the notes found on the way."""
    notes: list[Any] = []
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation, *found = (part for part in get_args(annotation) if part is not NoneType)
        for note in found:
            notes += note.metadata if isinstance(note, FieldInfo) else [note]
    return annotation, notes


def _kind(annotation: Any) -> str:
    plain, _ = _unwrapped(annotation)
    if get_origin(plain) is tuple:
        return f"list of {_kind(get_args(plain)[0])}s"
    if get_origin(plain) is Literal:
        return "choice"
    return {bool: "true/false", int: "integer", float: "number", str: "text"}[plain]


def _choices(annotation: Any) -> tuple[str, ...]:
    plain, notes = _unwrapped(annotation)
    for note in notes:
        if isinstance(note, Accepts):
            return note.choices
    if get_origin(plain) is tuple:
        return _choices(get_args(plain)[0])
    return get_args(plain) if get_origin(plain) is Literal else ()


def _accepted(annotation: Any) -> str:
    plain, notes = _unwrapped(annotation)
    for note in notes:
        if isinstance(note, Accepts):
            return note.text
    if get_origin(plain) is tuple:
        repeats = " without repeats" if _DISTINCT in notes else ""
        return f"a comma-separated list{repeats}, each {_accepted(get_args(plain)[0])}"
    if get_origin(plain) is Literal:
        *others, last = get_args(plain)
        return f"{', '.join(others)} or {last}"
    if plain is bool:
        return "true, false, 1, 0, yes or no"
    if plain is str:
        return "a text"
    bounds = [
        f"{words} {getattr(note, name)}"
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        for note in notes
        if hasattr(note, name)
    ]
    return ("a whole number" if plain is int else "a number") + (f", {' and '.join(bounds)}" if bounds else "")
