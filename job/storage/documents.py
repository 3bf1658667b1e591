"""JSON that others wrote, read within bounds and only where every program reads the same in it."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

# The manifest of 1,000 classes and 36 results has 220,000. Each may take a hundred times the memory of its two bytes.
_CONTAINERS = 1_000_000
_KEYS = 10_000


def parse(data: bytes) -> Any:
    """Return the value that is written as JSON in ``data``.

    Raises:
        ValueError: it is none that can be used; the message goes on after its name, and may hold any character.
    """
    if data.count(b"{") + data.count(b"[") > _CONTAINERS:
        raise ValueError(f"has more than {_CONTAINERS:,} objects and lists")
    try:
        return json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_no_number, parse_float=_number)
    except _RefusedError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"is not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    except ValueError:  # of int
        raise ValueError("holds a whole number with thousands of digits") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


class _RefusedError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _KEYS:
        raise _RefusedError(f"has an object with {len(pairs):,} keys")
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, times),) = Counter(key for key, _ in pairs).most_common(1)
        raise _RefusedError(f"has an object with the key {key!r} {times} times")
    return found


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise _RefusedError(f"holds the number {text}, which JSON does not have or no program can hold")
