"""A model card for each published SavedModel: Markdown, from the records that the report is made of.

Its parts are those of Mitchell et al., "Model Cards for Model Reporting" (2019). Front matter as some hubs read it is
left out: it would have to name a licence for the model, and only its publisher can give one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from job.arms import ARMS, about
from job.manifest import Comparison, Manifest, Result
from job.results.formatting import SHOWN_CLASSES, classes_shown, rounded, templates
from job.results.statistics import CALIBRATION_BINS
from job.settings.environment import hyperparameters

# What Markdown takes for more than text: anywhere, before a name, at a word's edge, and where a line begins.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|[<&](?=[\w/!?#])|(?<!\w)_|_(?!\w)|^[-+>#=]|(?<=^\d)[.)]|(?<=^\d\d)[.)]")
# A card tells of these elsewhere, and lists the others: first these, then all that there are, in the settings' order.
_TOLD_ELSEWHERE = {"backbone", "image_size", "epochs", "head_epochs"}
_FIRST = ("optimizer", "learning_rate", "fine_tune_learning_rate", "fine_tune_from", "batch_size", "augmentation")


def render(manifest: Manifest, result: Result) -> str:
    """Return the card of one of the manifest's results, as Markdown with tables (GitHub's).

    Paths in it are relative to the run's folder. Artifacts are not needed. Users' words (class names, settings) are
    escaped. Equal arguments give equal cards.
    """
    card = templates(finalize=_escaped)
    card.filters["block"] = _block
    test = result.metrics.test
    return card.get_template("model_card.md.j2").render(
        m=manifest,
        r=result,
        about=about(result.arm),
        pretrained=result.arm not in ARMS or ARMS[result.arm].pretrained,
        phases=[(name, len(list(epochs))) for name, epochs in groupby(epoch.phase for epoch in result.history)],
        recipe=_recipe(manifest, result),
        splits=[(name, getattr(result.metrics, name)) for name in ("train", "validation", "test")],
        classes=classes_shown([test.confusion]),
        shown_classes=SHOWN_CLASSES,
        calibration_bins=CALIBRATION_BINS,
        comparisons=_concerning(manifest.comparisons, result),
        seeds=[other.seed for other in manifest.results if _cell(other) == _cell(result)],
        rounded=rounded,
    )


def _cell(result: Result) -> tuple[str, float]:
    return result.arm, result.train_fraction


def _recipe(manifest: Manifest, result: Result) -> list[tuple[str, str]]:
    """Return what was set, in words; settings that do not concern the arm or are at nothing are left out."""
    given, words = manifest.settings, hyperparameters()
    return [
        (words[name], ", ".join(map(str, value)) if isinstance(value := given[name], list) else str(value))
        for name in dict.fromkeys((*_FIRST, *words))
        if given.get(name) not in (None, [], "")
        and name not in _TOLD_ELSEWHERE
        and (result.arm == "fine_tune" or not name.startswith("fine_tune_"))
    ]


def _concerning(comparisons: Sequence[Comparison], result: Result) -> list[Comparison]:
    """Return those of the result's arm and fraction, over all seeds where there are any, else of the seed."""
    own = [
        row
        for row in comparisons
        if result.arm in (row.better, row.worse)
        and row.train_fraction == result.train_fraction
        and (not row.seeds or result.seed in row.seeds)
    ]
    most = max((len(row.seeds) for row in own), default=0)
    return [row for row in own if len(row.seeds) == most]


def _escaped(value: object) -> Markup:
    """Return a value so that Markdown shows it as it is, on one line; what is Markup already stays."""
    if isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\g<0>", " ".join(str(value).split())))  # noqa: S704 - this is the escaping


def _block(value: str) -> Markup:
    """Return a fenced block of code."""
    fence = "`" * max(3, max(map(len, re.findall("`+", value)), default=0) + 1)
    return Markup(f"{fence}text\n{value.strip()}\n{fence}")  # noqa: S704 - nothing in it is markup
