"""How a manifest is shown: values rounded by one function, each with its place; some of many classes; templates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from job.manifest import Manifest

Form = Literal[
    "text", "count", "percent", "points", "number", "p", "seconds", "money", "rate", "share", "yes", "date", "setting"
]
Number = int | float

# More classes than these are not all shown, but those that most need a look.
SHOWN_CLASSES = 20
_MINUS = "\N{MINUS SIGN}"
_ABSENT = "\N{EN DASH}"
REDUCTIONS: dict[str, Callable[[Sequence[Number]], Number]] = {"mean": fmean, "sum": sum}


def rounded(value: Any, form: Form) -> str:
    """Return ``value`` as it is shown; null is an en dash.

    count: integer. percent: of a share, one decimal. points: of a difference of shares, signed. number: a loss or an
    AUC, three decimals. p: two-sided p-value. rate and money: three significant digits, all of an integer part.
    seconds: likewise, two decimals at most. share: as short as it is exact. yes: a truth value. date: the day of a
    time. setting: text as it is, anything else as JSON.
    """
    if value is None:
        return _ABSENT
    match form:
        case "text":
            return str(value)
        case "setting":
            return value if isinstance(value, str) else json.dumps(value)
        case "date":
            return str(value)[:10]
        case "yes":
            return "yes" if value else "no"
        case "share":
            return f"{value:g}"
        case "count":
            shown = f"{value:,}"
        case "percent":
            shown = f"{100 * value:.1f}%"
        case "points":
            shown = f"{100 * value:+.1f}"
        case "number":
            shown = f"{value:.3f}"
        case "p":
            shown = "< 0.001" if value < 0.001 else f"{value:.3f}"
        case "seconds":
            shown = f"{_three_digits(value, 2)} s"
        case "money" | "rate":
            shown = _three_digits(value)
    return shown.replace("-", _MINUS)


def _three_digits(value: Number, decimals: int = 12) -> str:
    if value == 0:
        return "0"
    needed = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(needed, decimals)}f}"


@dataclass(frozen=True)
class Classes:
    """What is shown of a confusion matrix. counts: the whole of it; rows: the classes that are shown.

    pairs: where not all classes are, the most frequent confusions (true class, predicted class); else null.
    """

    counts: list[list[int]]
    rows: list[int]
    pairs: list[tuple[int, int]] | None


def classes_shown(matrices: Sequence[Sequence[Sequence[int]]]) -> Classes:
    """Return what to show of the sum of confusion matrices: all of few classes, the 20 worst of many."""
    indices = range(len(matrices[0]))
    counts = [[sum(matrix[i][j] for matrix in matrices) for j in indices] for i in indices]
    if len(indices) <= SHOWN_CLASSES:
        return Classes(counts, list(indices), None)
    # a class without test examples has a recall of zero by convention, and is nobody's mistake
    tested = [index for index in indices if sum(counts[index])]
    worst = sorted(tested, key=lambda index: (counts[index][index] / sum(counts[index]), index))
    pairs = sorted((-counts[i][j], i, j) for i in indices for j in indices if i != j and counts[i][j])
    return Classes(counts, worst[:SHOWN_CLASSES], [(i, j) for _, i, j in pairs[:SHOWN_CLASSES]])


def templates(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """Return the package's templates. What they print is escaped for HTML unless ``finalize`` makes it Markup."""
    return Environment(
        loader=PackageLoader("job.results"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def pointer(*parts: str | int) -> str:
    """Return the JSON pointer (RFC 6901) of nested keys and indices."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


class Quotes:
    """One manifest's values as HTML.

    An element with ``data-path`` shows the value at that JSON pointer. One with ``data-how`` shows what was computed: a
    mean or sum of the values that lie at ``data-at`` below each of the places that the nearest ``data-of`` lists, or a
    figure whose definition stands beside it on the page. ``data-value`` is the exact value, as JSON.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._document = manifest.model_dump(mode="json")

    def value(self, path: str) -> Any:
        """Return the value at a JSON pointer. Raises KeyError or IndexError where nothing is."""
        found: Any = self._document
        for part in path.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found

    def quote(self, path: str, form: Form = "text") -> Markup:
        """Return the value at ``path``; a list as its items, separated by commas."""
        value = self.value(path)
        if isinstance(value, list) and value:
            return Markup(", ").join(self.quote(f"{path}/{index}", form) for index in range(len(value)))
        return _element(rounded(value or None if isinstance(value, list) else value, form), value, path=path)

    def interval(self, path: str, form: Form = "percent") -> Markup:
        """Return the two bounds at ``path``."""
        return Markup("{} to {}").format(self.quote(f"{path}/0", form), self.quote(f"{path}/1", form))

    def over(self, places: Iterable[str], below: str, how: str, form: Form) -> Markup:
        """Return the mean or sum of the values at ``below`` each of ``places``; absent where one of them is."""
        return _element(rounded(value := self.reduced(places, below, how), form), value, how=how, at=below)

    def reduced(self, places: Iterable[str], below: str, how: str) -> Number | None:
        """Return what ``over`` shows, unrounded."""
        try:
            values = [self.value(place + below) for place in places]
        except KeyError:
            return None
        return None if None in values or not values else REDUCTIONS[how](values)

    def computed(self, value: Number | None, form: Form, how: str, **named: str) -> Markup:
        """Return a figure that the page defines in words; ``how`` and ``named`` say which it is, for a program."""
        return _element(rounded(value, form), value, how=how, **named)


def _element(shown: str, value: Any, **data: str) -> Markup:
    """Return a span; a text that is shown whole carries no ``data-value``."""
    attributes = data if value == shown else {**data, "value": json.dumps(value)}
    pairs = Markup("").join(Markup(' data-{}="{}"').format(name, text) for name, text in attributes.items())
    return Markup("<span{}>{}</span>").format(pairs, shown)
