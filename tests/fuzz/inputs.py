"""What Hypothesis makes inputs of: texts, numbers and JSON that programs trip over, and changes to sound documents."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Change = Callable[[Any], Any]

_ODD_TEXTS = (
    *("", " ", ".", "..", "../outside/file", "/etc/hostname", "a/../../outside/file", "a//b", "a\\b", "a\0b", "a\n"),
    *("\n12:00:00 verified", "\x1b[2J", "\u2028", "\x85", "\ufeff", "é", "e\u0301", "犬", "\U0001f415", "\ud800"),
    *("NaN", "null", "1e999", "-0", "٣", "%s%n", "{0}", "${HOME}", "__class__", "arms", "report.html", "manifest.json"),
    *("checkpoints/x", ".part-x", "a" * 300, "1.0", "2.0"),
)
_ODD_NUMBERS = (
    *(0, -1, 1, 2, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**25, 10**400, True, False),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf),
)
_ODD_BYTES = (
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"1e999",
        b"NaN",
        b"-Infinity",
        b'"',
        b"\\ud800",
        b"\xff",
        b"\xef\xbb\xbf",
    ),
    *(b"\0", b",", b"[],", b"{},", b'"run_id": "x",', b"0,", b"/*", b"\r\n"),
)
texts = st.one_of(st.sampled_from(_ODD_TEXTS), st.text(max_size=20))
numbers = st.one_of(st.sampled_from(_ODD_NUMBERS), st.integers(), st.floats())
scalars = st.one_of(st.none(), texts, numbers)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every value in a document stands, but the document itself."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*at, key)
        yield from places(each, (*at, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Return a copy of ``document`` that differs in one to three places."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        where = list(places(document))
        if not where:
            return draw(values)
        at = draw(st.sampled_from(where))
        parent = document
        for key in at[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(("replace", "remove", "add", "repeat", "nest", "rename")))
        if kind == "replace":
            parent[at[-1]] = draw(values)
        elif kind == "remove":
            del parent[at[-1]]
        elif kind == "nest":
            for _ in range(draw(st.sampled_from((1, 2, 150, 300)))):
                parent[at[-1]] = draw(st.sampled_from(([parent[at[-1]]], {"x": parent[at[-1]]})))
        elif isinstance(parent, list):
            parent.extend([draw(values) if kind == "add" else parent[at[-1]]] * draw(st.sampled_from((1, 2, 20))))
        elif kind == "rename":
            parent[draw(texts)] = parent.pop(at[-1])
        else:
            parent[draw(texts)] = draw(values) if kind == "add" else copy.deepcopy(parent[at[-1]])
    return document


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Return other bytes: some cut out, put in, repeated, replaced or with bits flipped, in one to four places."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 1, 2, 4, 16, 200, 10_000))))
        middle = data[start:end]
        new = draw(
            st.one_of(
                st.just(b""),
                st.binary(max_size=8),
                st.just(middle * 2),
                st.just(bytes(each ^ 1 << draw(st.integers(0, 7)) for each in middle[:4]) + middle[4:]),
                st.sampled_from(_ODD_BYTES),
            )
        )
        data = data[:start] + new + data[end:]
    return data


def written(document: Any) -> bytes:
    """Return a document as JSON, in which there may be numbers that JSON does not have; b"" where it is too deep."""
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5000
