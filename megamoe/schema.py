"""What a JSON document must look like, and one line on where it does not.

A form is a type, a function from a value to what is wrong with it ('' for nothing), or one of the
classes here. Keys that a form does not name may be there: a later version may write more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Form = Any
"""``str``, ``int``, ``bool``, a function, or one of the classes below."""

_WORDS = {str: "a string", int: "an integer", bool: "true or false", dict: "an object"}


@dataclass(frozen=True)
class Object:
    """An object with ``keys``; those of ``optional`` may be missing."""

    keys: Mapping[str, Form] = field(default_factory=dict)
    optional: Mapping[str, Form] = field(default_factory=dict)


@dataclass(frozen=True)
class Each:
    """An object of any keys: what ``key`` says of each, and the form of each value."""

    value: Form
    key: Callable[[str], str] = lambda key: ""


@dataclass(frozen=True)
class Items:
    """A list of values of one form."""

    item: Form


@dataclass(frozen=True)
class OrNull:
    """A value of the form, or null."""

    form: Form


@dataclass(frozen=True)
class OneOf:
    """One of these strings or numbers."""

    values: Sequence[Any]


def seconds(value: Any) -> str:
    """A duration: a number from 0 to 1e9, so that sums of many are numbers too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    return "" if 0 <= value <= 1e9 else "must be a number from 0 to 1e9"


def natural(value: Any) -> str:
    """An integer from 0 to 2**63 - 1."""
    right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return "" if right else "must be an integer from 0 on"


def fault(value: Any, form: Form, at: str = "it") -> str:
    """'' where ``value`` has the form; else one line: where, what is there, what must be."""
    match form:
        case Object():
            return _object(value, form, at)
        case Each():
            if not isinstance(value, dict):
                return _wrong(value, at, "must be an object")
            for key, below in value.items():
                message = form.key(key)
                text = f"{at} has the key {preview(key)}: {message}" if message else ""
                text = text or fault(below, form.value, f"{at}[{preview(key)}]")
                if text:
                    return text
            return ""
        case Items():
            if not isinstance(value, list):
                return _wrong(value, at, "must be a list")
            each = (fault(v, form.item, f"{at}[{i}]") for i, v in enumerate(value))
            return next(filter(None, each), "")
        case OrNull():
            return "" if value is None else fault(value, form.form, at)
        case OneOf():
            # `in` alone would take true for 1.
            right = any(type(value) is type(v) and value == v for v in form.values)
            values = ", ".join(map(str, form.values))
            return "" if right else _wrong(value, at, f"must be one of {values}")
        case type():
            right = isinstance(value, form) and (form is bool or not isinstance(value, bool))
            return "" if right else _wrong(value, at, f"must be {_WORDS[form]}")
        case _:
            message = form(value)
            return _wrong(value, at, message) if message else ""


def _object(value: Any, form: Object, at: str) -> str:
    if not isinstance(value, dict):
        return _wrong(value, at, "must be an object")
    for key, below in {**form.keys, **form.optional}.items():
        if key not in value:
            if key in form.keys:
                return f"{at} has no {key}"
            continue
        text = fault(value[key], below, f"{at}.{key}" if at != "it" else key)
        if text:
            return text
    return ""


def _wrong(value: Any, at: str, must: str) -> str:
    return f"{at} is {preview(value)}; it {must}"


def preview(value: Any, most: int = 60) -> str:
    """``value`` in one short line of ASCII, whatever it is."""
    # repr of a large integer is refused by Python, and of a deep list it recurses.
    if isinstance(value, dict | list):
        return f"a{'n object' if isinstance(value, dict) else ' list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a very large integer"
    text = ascii(value)
    if len(text) > most:
        text = f"{text[: most - 4]}...{text[-1]}"
    return text


def plain(value: Any) -> str:
    """As :func:`shown`; a string without its quotes."""
    return preview(value)[1:-1] if isinstance(value, str) else preview(value)
