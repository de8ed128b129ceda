"""Reading a result: JSON of ``check``, ``merge``, ``ab`` or ``bisect``, whatever is missing in it.

A report is read after a bad day, so it makes the best of what there is: a key that is missing or of
a wrong type reads as nothing. Only what is no result at all is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe.files import REPORT_LIMIT, read_json
from megamoe.printable import printable, quantity
from megamoe.report import words

Result = dict[str, Any]
View = dict[str, Any]
"""What a report says of a part of a result: plain data, which the page and the terminal draw."""

LONGEST: Final = 2000
"""Characters of one string that a report shows; a backend may have raised a whole file."""


def read(path: Path) -> tuple[str, Result]:
    """The kind of result (``run``, ``ab`` or ``bisect``) and the result.

    Strings have no control characters, no half surrogates, no changes of writing direction, and no
    more than :data:`LONGEST` characters. Raises ``ValueError`` of one line for what cannot be read
    as JSON or is no result.
    """
    try:
        data = _clean(read_json(path, REPORT_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: cannot be read as JSON: {why}") from error
    expected = "a result of `megamoe check`, `merge`, `ab` or `bisect` (--json)"
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no JSON object; name {expected}")
    if data.get("kind") == "ab" and "cases" in data:
        return "ab", data
    if data.get("kind") == "bisect" and "steps" in data:
        return "bisect", data
    if isinstance(data.get("cases"), list) and isinstance(data.get("counts"), dict):
        return "run", data
    raise ValueError(f"{path} is not {expected}")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        text = printable(value, lines=True)
        more = len(text) - LONGEST
        return text if more <= 0 else f"{text[:LONGEST]} (and {quantity(more, 'more character')})"
    if isinstance(value, dict):
        return {_clean(key): _clean(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_clean(below) for below in value]
    return value


# --- what a key holds, if it holds it -----------------------------------------------------------


def text(data: Any, key: str, default: str = "") -> str:
    """A string, or a number as one."""
    value = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(value, bool) or value is None or isinstance(value, Mapping | list):
        return default
    return str(value)


def number(data: Any, key: str) -> float | None:
    """A finite number."""
    value = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < math.inf else None


def count(data: Any, key: str) -> int:
    """A number of something; 0 where there is none."""
    return max(0, int(number(data, key) or 0))


def mapping(data: Any, key: str) -> dict[str, Any]:
    """An object; empty where there is none."""
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, dict) else {}


def items(data: Any, key: str) -> list[Any]:
    """A list; empty where there is none."""
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, list) else []


def objects(data: Any, key: str) -> list[dict[str, Any]]:
    """The objects of a list."""
    return [entry for entry in items(data, key) if isinstance(entry, dict)]


def tally(data: Any, key: str) -> list[tuple[str, int]]:
    """``{name: count}``, the largest first."""
    counts = mapping(data, key)
    pairs = [(str(name), count(counts, name)) for name in counts]
    return sorted((p for p in pairs if p[1]), key=lambda p: -p[1])


def sentence(value: Any) -> str:
    """Anything in one line: ``token 2, ULPs apart 3``."""
    if isinstance(value, Mapping):
        pairs = ((words.of(str(k)), v) for k, v in value.items() if v not in (None, "", [], {}))
        return ", ".join(f"{name} {sentence(below)}" for name, below in pairs)
    if isinstance(value, list):
        return ", ".join(map(sentence, value))
    return "" if value is None else str(value)
