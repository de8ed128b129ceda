"""The file of answers: what one chip gave, and nothing that is derived from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe import schema
from megamoe.files import RECORDED_LIMIT, read_json, write_atomically
from megamoe.golden.documents import y_fault
from megamoe.golden.places import id_fault
from megamoe.predict.tables import TABLES, unpack
from megamoe.spec.contract import REVISIONS

SCHEMA: Final = 1
WHAT: Final = "What a chip computed; `megamoe confirm --from` compares it with the models."


def _some(value: Any) -> str:
    """A number from 1 on: of no words, every model would be confirmed."""
    return schema.natural(value) or ("" if value else "must be an integer from 1 on")


_WORDS: Final = schema.Object(
    {"seed": schema.natural, "tiles": _some, "steps": _some, "sha256": str, "sample": str}
)
_TABLE: Final = schema.Object({"count": schema.natural, "words": str})
_CASE: Final = schema.Object({"inputs": str, "status": str, "stages": schema.Each(str)},
                             {"y": y_fault})  # fmt: skip
_FILE: Final = schema.Object(
    {
        "schema": schema.natural, "what": str, "gpu": str, "machine_class": str, "model": str,
        "provenance": schema.Each(str), "instructions": schema.Each(_WORDS),
        "silu": schema.Each(_TABLE), "lacks": schema.Each(str),
        "cases": schema.Each(_CASE, key=id_fault),
    },
    {"contract": schema.OneOf(tuple(REVISIONS)), "backend": str, "recorded": dict},
)  # fmt: skip


class ConfirmError(ValueError):
    """Something of ``confirm`` cannot be done, or a file is none of its; one line."""


def write_answers(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file of answers, whole or not at all."""
    full = {"schema": SCHEMA, "what": WHAT, **data}
    if fault := schema.fault(full, _FILE):
        raise ConfirmError(f"the answers are not complete: {fault}")
    write_atomically(path, (json.dumps(full, indent=1, sort_keys=True) + "\n").encode())


def read_answers(path: Path) -> dict[str, Any]:
    """A file of answers; :class:`ConfirmError` where it is none."""
    again = "write it again with `megamoe confirm --out FILE`"
    try:
        data = read_json(path, RECORDED_LIMIT)
    except FileNotFoundError as error:
        raise ConfirmError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfirmError(f"{path} cannot be read as JSON ({error}); {again}") from error
    if fault := schema.fault(data, _FILE):
        raise ConfirmError(f"{path}: {fault}; {again}")
    if data["schema"] != SCHEMA:
        raise ConfirmError(f"{path} has schema {data['schema']!a}, this megamoe reads {SCHEMA}")
    for name, packed in data["silu"].items():
        if name not in TABLES:
            raise ConfirmError(f"{path}: unknown silu table {name!a}; known: {', '.join(TABLES)}")
        unpack(name, packed)
    return dict(data)


__all__ = ["ConfirmError", "read_answers", "write_answers"]
