"""Split expressions resolved to the records they take, and proven disjoint before anything is read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.errors import ConfigError, Problem, first_line

SPLIT_VARIABLES = {
    "train": "TRANSFER_TRAIN_SPLIT",
    "validation": "TRANSFER_VALIDATION_SPLIT",
    "test": "TRANSFER_TEST_SPLIT",
}

Interval = tuple[str, int, int]


def resolve_splits(info: Any, expressions: Mapping[str, str]) -> dict[str, list[Interval]]:
    """Resolve each split to the records it takes.

    Args:
        info: the data set's ``tfds.core.DatasetInfo``.
        expressions: TFDS split expressions under the keys of ``SPLIT_VARIABLES``.

    Returns:
        For each split its (file name, start, stop), in reading order.

    Raises:
        ConfigError: all that is malformed, unknown, empty or shared, together.
    """
    problems: list[Problem] = []
    found: dict[str, list[Interval]] = {}
    available = ", ".join(f"{name} ({split.num_examples} examples)" for name, split in info.splits.items())
    for part, expression in expressions.items():
        try:
            instructions = info.splits[expression].file_instructions
        except (ValueError, KeyError, AssertionError) as error:
            reason = f"is no split of {info.full_name}: {first_line(error)}"
        else:
            found[part] = [(Path(i.filename).name, i.skip, i.skip + i.take) for i in instructions if i.take]
            if found[part]:
                continue
            reason = f"holds no example of {info.full_name}"
        message = f"{expression!r} {reason}. There are: {available}; write a part as train[:80%] or train[100:200]"
        problems.append(Problem(SPLIT_VARIABLES[part], message))
    for one, other in itertools.combinations_with_replacement(found, 2):
        if one == other:
            shared = _shared(itertools.combinations(found[one], 2))
            clash = f"{expressions[one]!r} takes twice"
        else:
            shared = _shared(itertools.product(found[one], found[other]))
            clash = f"{expressions[other]!r} and {SPLIT_VARIABLES[one]} {expressions[one]!r} share"
        if shared:
            file, start, _ = shared[0]
            count = sum(last - first for _, first, last in shared)
            message = f"{clash} {count} examples, among them {file}__{start}; take parts that do not overlap"
            problems.append(Problem(SPLIT_VARIABLES[other], message))
    if problems:
        raise ConfigError(problems)
    return found


def _shared(pairs: Any) -> list[Interval]:
    """Return what the two intervals of each pair have in common."""
    both = ((one[0], max(one[1], other[1]), min(one[2], other[2])) for one, other in pairs if one[0] == other[0])
    return [(file, start, stop) for file, start, stop in both if start < stop]
