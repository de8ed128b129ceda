"""A valid JSON document with one value that is something else: what a reader must survive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_ODD = st.sampled_from(
    ["../victim", "\ud800", "a\nb", "", 10**400, -(10**20), 2**63, 1e308, float("nan"),
     float("inf"), -1, 0, True, None, [], {}]
)  # fmt: skip
JSON = _ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3)
    ),
    max_leaves=6,
)
_DELETION: Any = object()

many = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _paths(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(document, dict):
        for key in document:
            yield from _paths(document[key], (*at, key))
    elif isinstance(document, list):
        for index in range(len(document)):
            yield from _paths(document[index], (*at, index))


@st.composite
def mutated(draw: Any, document: Any) -> Any:
    """``document`` with a random value replaced, a key renamed, or a key left out."""
    path = draw(st.sampled_from(list(_paths(document))))
    value = draw(JSON | st.just(_DELETION))
    if not path:
        return copy.deepcopy(document) if value is _DELETION else value
    out = copy.deepcopy(document)
    holder = out
    for part in path[:-1]:
        holder = holder[part]
    if value is not _DELETION:
        holder[path[-1]] = value
    elif isinstance(holder, dict) and draw(st.booleans()):
        holder[draw(st.text(max_size=8))] = holder.pop(path[-1])
    else:
        del holder[path[-1]]
    return out


def result_or_one_line(act: Callable[[], Any]) -> None:
    """``act`` returns, or raises a ``ValueError`` whose message is one printable line."""
    try:
        act()
    except ValueError as error:
        text = str(error)
        text.encode()  # a half surrogate would end the program that prints it
        if not text or "\n" in text:
            pytest.fail(f"no line: {text!a}")
