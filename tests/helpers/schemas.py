"""A report against its JSON Schema in ``megamoe/schemas/``."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import pytest


def schemas() -> dict[str, Any]:
    """Name of a report to its schema, as the package holds them."""
    folder = resources.files("megamoe").joinpath("schemas")
    return {
        path.name.removesuffix(".schema.json"): json.loads(path.read_text())
        for path in folder.iterdir()
    }


@cache
def _validators() -> dict[str, Any]:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    referencing = pytest.importorskip("referencing")
    by_name = schemas()
    entries = [
        (f"{name}.schema.json", referencing.Resource.from_contents(schema))
        for name, schema in by_name.items()
    ]
    registry = referencing.Registry().with_resources(entries)
    return {
        name: jsonschema.Draft202012Validator(schema, registry=registry)
        for name, schema in by_name.items()
    }


def faults(name: str, report: Any) -> list[str]:
    """Where ``report`` is not what the schema ``name`` says; empty for nothing."""
    plain = json.loads(json.dumps(report))
    return [line for error in _validators()[name].iter_errors(plain) for line in _lines(error)]


def _lines(error: Any) -> list[str]:
    """One for the error, and one for each of those that are behind it."""
    behind = [line for below in error.context for line in _lines(below)]
    return [f"{error.json_path}: {error.message}", *behind]


def valid(name: str, report: Any) -> None:
    """Fail the test where it is not. Without jsonschema only this check is left out."""
    try:
        errors = faults(name, report)
    except pytest.skip.Exception:
        return
    assert errors == []
