"""Charts as inline SVG, drawn by Matplotlib; colours are the page's CSS variables, so they follow its light and dark.

A chart is 340 units wide, about a phone's page, so that its letters keep their size there. Of words that users
chose, none stands in it: Matplotlib has no glyphs for every script that a class name may be written in.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator, PercentFormatter

WIDTH = 340
_DPI = 72  # of Matplotlib's SVG canvas: a point is a unit
# Matplotlib knows no variables: these stand for them until the SVG is written. None of them is a colour of its own.
_INK, _GRID, _PAPER = "#000001", "#000002", "#000003"
_ARMS = ("#00000a", "#00000b", "#00000c", "#00000d")
_VARIABLES = {_INK: "--ink", _GRID: "--grid", _PAPER: "--paper"} | {c: f"--arm-{i}" for i, c in enumerate(_ARMS)}
_MARKERS = ("o", "s", "^", "D")
_DASHES = ((0, (5, 1.5, 1, 1.5)), (0, (4, 2)), "solid", (0, (1, 1.5)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "legend.handlelength": 2.4,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 2,
    "lines.markersize": 7,
}


@dataclass(frozen=True)
class Points:
    """An arm's accuracies by training examples. style: its place among the arms; intervals: null where unknown."""

    name: str
    style: int
    examples: Sequence[int]
    accuracy: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]


@dataclass(frozen=True)
class Curve:
    """One seed's epochs: what was measured on the training and on the validation split after each."""

    train_loss: Sequence[float]
    validation_loss: Sequence[float]
    train_accuracy: Sequence[float]
    validation_accuracy: Sequence[float]


@dataclass(frozen=True)
class Words:
    """What a chart is for those who do not see it. key: unique on the page."""

    key: str
    title: str
    description: str


def in_view(baseline: float, arms: Sequence[Points]) -> bool:
    """Return whether a baseline is near enough to the arms to be drawn: at most as far below them as they spread.

    Where all arms are at 95% and chance is at 50%, an axis that has both shows nothing of what is between the arms.
    """
    bounds = [
        end for arm in arms for value, ends in zip(arm.accuracy, arm.intervals, strict=True) for end in ends or [value]
    ]
    return baseline >= min(bounds) - (max(bounds) - min(bounds))


def accuracy(arms: Sequence[Points], baseline: float | None, words: Words) -> Markup:
    """Return test accuracy against training examples, or one row per arm where all have the same number of examples.

    baseline: accuracy of always giving the commonest class; a line where it is known.
    """
    several = len({count for arm in arms for count in arm.examples}) > 1
    with _figure(280 if several else 70 + 34 * len(arms), words) as figure:
        axes = figure.subplots()
        (_by_examples if several else _by_arm)(axes, arms, baseline)
        if several:
            figure.legend(loc="upper left", ncols=3, borderaxespad=0.2)
        _margins(figure, left=62 if several else 84, right=18, top=36 if several else 10, bottom=46)
    return figure.svg


def _by_examples(axes: Axes, arms: Sequence[Points], baseline: float | None) -> None:
    counts = sorted({count for arm in arms for count in arm.examples})
    logarithmic = counts[-1] >= 5 * counts[0]
    for place, arm in enumerate(arms):
        # beside each other, since intervals at the same number of examples would hide one another
        shift = place - (len(arms) - 1) / 2
        spread = 0.008 * (counts[-1] - counts[0])
        x = [count * 1.035**shift if logarithmic else count + shift * spread for count in arm.examples]
        _line(axes, x, arm)
    if baseline is not None:
        axes.axhline(baseline, color=_INK, linewidth=1, linestyle=(0, (1, 3)))
    if logarithmic:
        axes.set_xscale("log")
    lowest, highest = (axes.transData.transform((count, 0))[0] for count in (counts[0], counts[-1]))
    shown: list[int] = []
    at = highest + _DPI
    for count in reversed(counts):
        place_x = axes.transData.transform((count, 0))[0]
        if at - place_x >= 0.13 * (highest - lowest):
            shown.append(count)
            at = place_x
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{count:,}" for count in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training examples" + (", logarithmic" if logarithmic else ""))
    axes.set_ylabel("test accuracy")
    _percent(axes)


def _line(axes: Axes, x: Sequence[float], arm: Points) -> None:
    style = arm.style % len(_ARMS)
    colour = _ARMS[style]
    axes.plot(
        x,
        arm.accuracy,
        color=colour,
        marker=_MARKERS[style],
        markeredgecolor=_PAPER,
        linestyle=_DASHES[style],
        label=arm.name,
    )
    for place, bounds in zip(x, arm.intervals, strict=True):
        if bounds is not None:
            axes.vlines(place, *bounds, color=colour, linewidth=2)


def _by_arm(axes: Axes, arms: Sequence[Points], baseline: float | None) -> None:
    for row, arm in enumerate(arms):
        style = arm.style % len(_ARMS)
        for value, bounds in zip(arm.accuracy, arm.intervals, strict=True):
            if bounds is not None:
                axes.hlines(row, *bounds, color=_ARMS[style], linewidth=3)
            axes.plot([value], [row], color=_ARMS[style], marker=_MARKERS[style], markeredgecolor=_PAPER, markersize=10)
    if baseline is not None:
        axes.axvline(baseline, color=_INK, linewidth=1, linestyle=(0, (1, 3)))
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("test accuracy")


def learning_curves(
    seeds: Sequence[Curve], style: int, boundaries: Sequence[int], accuracies: tuple[float, float], words: Words
) -> Markup:
    """Return loss above accuracy by epoch: training dashed, validation solid, a thin line per seed.

    boundaries: epochs after which a further phase begins. accuracies: range of the accuracy's axis, so that charts of
    several arms can be compared.
    """
    colour = _ARMS[style % len(_ARMS)]
    width = 2 if len(seeds) == 1 else 1.1
    with _figure(380, words) as figure:
        above, below = figure.subplots(2, sharex=True)
        for number, seed in enumerate(seeds):
            epochs = range(1, len(seed.train_loss) + 1)
            # of a single epoch there is no line to see
            marker = "o" if len(epochs) == 1 else None
            for axes, train, validation in (
                (above, seed.train_loss, seed.validation_loss),
                (below, seed.train_accuracy, seed.validation_accuracy),
            ):
                first = number == 0 and axes is above
                for values, line, ink, name in (
                    (validation, "solid", colour, "validation"),
                    (train, (0, (3, 2)), _INK, "training"),
                ):
                    drawn = {"color": ink, "linewidth": width, "linestyle": line, "marker": marker}
                    axes.plot(epochs, values, label=name if first else None, **drawn)
        for axes in (above, below):
            for boundary in boundaries:
                axes.axvline(boundary + 0.5, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
        above.set_ylabel("loss, nats")
        above.yaxis.set_major_locator(MaxNLocator(5))
        below.set_ylabel("accuracy")
        _percent(below)
        below.set_ylim(*accuracies)
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if max(len(seed.train_loss) for seed in seeds) == 1:
            below.set_xlim(0.5, 1.5)
        figure.legend(loc="upper left", ncols=2, borderaxespad=0.2)
        _margins(figure, left=58, right=12, top=32, bottom=46)
        figure.subplots_adjust(hspace=0.14)
        figure.align_ylabels()
    return figure.svg


def reliability(bins: Sequence[tuple[float, float, float]], style: int, words: Words) -> Markup:
    """Return the reliability diagram (Guo et al. 2017) of bins (confidence, accuracy, share of the examples)."""
    style %= len(_ARMS)
    with _figure(300, words) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=(0, (1, 3)))
        confidence, right, share = zip(*bins, strict=True)
        axes.plot(confidence, right, color=_ARMS[style], linewidth=1)
        # area by share, and never too small to see: a bin of one example is a fact too
        areas = [24 + 240 * part for part in share]
        axes.scatter(
            confidence, right, s=areas, color=_ARMS[style], marker=_MARKERS[style], edgecolors=_PAPER, zorder=3
        )
        axes.set_xlim(0, 1.03)
        axes.set_ylim(-0.02, 1.03)
        axes.set_xlabel("probability that the model gave")
        axes.set_ylabel("how often it was right")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _margins(figure, left=62, right=16, top=10, bottom=46)
    return figure.svg


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


class _Chart(Figure):
    """A figure; ``svg`` once the block that draws it has ended."""

    svg = Markup("")


@contextmanager
def _figure(height: int, words: Words) -> Iterator[_Chart]:
    # the salt makes the ids of equal charts equal in every process; without one they are random
    with mpl.rc_context({**_STYLE, "svg.hashsalt": words.key}):
        figure = _Chart((WIDTH / _DPI, height / _DPI), dpi=_DPI)
        yield figure
        file = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    figure.svg = _inline(file.getvalue(), words)


def _margins(figure: Figure, left: float, right: float, top: float, bottom: float) -> None:
    """Set the margins in units of the page: automatic layouts measure letters of another font than the page's."""
    width, height = figure.get_size_inches() * _DPI
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)


def _inline(svg: str, words: Words) -> Markup:
    """Return Matplotlib's SVG file as an element of a page: named, without ids that another chart has too."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view is not None  # noqa: S101 - Matplotlib writes one
    body = body[body.index(">") + 1 :]
    # its style sheet would hold for the whole page
    body = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL
    )
    body = re.sub(r"font-family: [^\";]*", "", body).replace("xlink:href", "href")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    names = {name for pair in used for name in pair if name}
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{words.key}-{m[1]}"' if m[1] in names else "", body)
    body = re.sub(r'href="#|url\(#', lambda m: f"{m[0]}{words.key}-", body)
    body = re.sub(r'"[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s*\n\s*", " ", m[0])), body)
    body = re.sub(r"\s*\n\s*", "", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    head = Markup(
        '<svg viewBox="{view}" role="img" aria-labelledby="{key}-title {key}-text">'
        '<title id="{key}-title">{title}</title><desc id="{key}-text">{text}</desc>'
    ).format(view=view[1], key=words.key, title=words.title, text=words.description)
    return head + Markup(body)  # noqa: S704 - Matplotlib's own, without a word of users
