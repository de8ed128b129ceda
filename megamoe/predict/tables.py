"""Silu tables that a GPU gave: the one step between the linears that IEEE does not say.

A gate is bfloat16 before its silu, so silu is a table of 65,536 words for each mode. A recording is
``silu/GPU.json``: of each table the words that differ from the oracle's correctly rounded one, and
where they come from. ``megamoe confirm`` records another (docs/numerics.md, section 12).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np

from megamoe import schema
from megamoe.oracle.gates import Form, gate_table, silu_table
from megamoe.spec.formats import F32

SCHEMA: Final = 1
TABLES: Final = {"fast": "g/d", "precise": "g/d", "reciprocal": "g*(1/d)",
                 "triton_fast": "g/d", "triton_precise": "g/d"}  # fmt: skip
"""Name of a table -> the form whose reference it is stored against."""
ENTRIES: Final = 1 << 16
_RECORDING: Final = schema.Object(
    {
        "schema": schema.natural, "gpu": str, "provenance": schema.Each(str),
        "tables": schema.Each(schema.Object({"count": schema.natural, "words": str})),
    },
    {"note": str},
)  # fmt: skip


class TableError(ValueError):
    """A recording is not as it must be; one line with the remedy."""


def pack(name: str, table: F32) -> dict[str, Any]:
    """The words of ``(65536,)`` that are not the reference's, as ``count`` and ``words``.

    ``words`` is base64 of zlib, little-endian: the place of each word (uint16, less the one
    before), then what is added to the reference's bits (uint32, modulo 2**32).
    """
    if table.shape != (ENTRIES,) or table.dtype != np.float32:
        raise TableError(f"silu table {name}: it must be 65,536 float32 words")
    reference = silu_table(TABLES[name])
    other = table.view(np.uint32) != reference.view(np.uint32)
    at = np.flatnonzero(other & ~(np.isnan(table) & np.isnan(reference)))
    offsets = (table.view(np.uint32) - reference.view(np.uint32))[at]
    content = np.diff(at, prepend=0).astype("<u2").tobytes() + offsets.astype("<u4").tobytes()
    return {"count": len(at), "words": base64.b64encode(zlib.compress(content, 9)).decode()}


def unpack(name: str, packed: Mapping[str, Any]) -> F32:
    """The inverse of :func:`pack`; read-only. :class:`TableError` where it is damaged."""
    if name not in TABLES:
        raise TableError(f"silu table {name!r} is not known; known: {', '.join(TABLES)}")
    count = packed["count"]
    try:
        packed_words = base64.b64decode(packed["words"], validate=True)
        content = zlib.decompressobj().decompress(packed_words, 6 * ENTRIES + 1)
        at = np.cumsum(np.frombuffer(content, "<u2", count), dtype=np.int64)
        offsets = np.frombuffer(content, "<u4", count, 2 * count)
    except (ValueError, zlib.error) as error:
        raise TableError(f"silu table {name} is damaged ({error}); record it again") from error
    if len(content) != 6 * count or (np.diff(at, append=ENTRIES) <= 0).any():
        raise TableError(f"silu table {name} is damaged (its count is wrong); record it again")
    table = silu_table(TABLES[name]).copy()
    table.view(np.uint32)[at] += offsets
    table.setflags(write=False)
    return table


def recording(gpu: str, provenance: Mapping[str, str], tables: Mapping[str, F32]) -> dict[str, Any]:
    """The recording of one GPU, as a file holds it."""
    packed = {name: pack(name, table) for name, table in tables.items()}
    return {"schema": SCHEMA, "gpu": gpu, "provenance": dict(provenance), "tables": packed}


def read(content: str, where: str) -> dict[str, Any]:
    """A recording from its text; :class:`TableError` where it is none."""
    try:
        data = json.loads(content)
    except ValueError as error:
        raise TableError(f"{where} is no JSON ({error}); restore it, or record it again") from error
    if fault := schema.fault(data, _RECORDING):
        raise TableError(f"{where}: {fault}; restore it, or record it again")
    if data["schema"] != SCHEMA:
        raise TableError(f"{where} has schema {data['schema']!a}, this megamoe reads {SCHEMA}")
    for name, packed in data["tables"].items():
        unpack(name, packed)
    return dict(data)


def folder() -> Path:
    """Where the recordings lie."""
    return Path(str(resources.files("megamoe.predict").joinpath("silu")))


def recordings() -> list[str]:
    """Names of the recordings that are kept."""
    return sorted(path.stem for path in folder().glob("*.json"))


def of_class(machine: str, otherwise: str) -> str:
    """The name of the recording of a machine class, such as ``sm100``, or ``otherwise``.

    ``megamoe confirm --from FILE --write`` keeps such a recording; from then on the models of that
    class take it. Of several, the last by name is taken.
    """
    own = [name for name in recordings() if name.endswith(f"-{machine}")]
    return own[-1] if own else otherwise


@cache
def load(name: str) -> dict[str, Any]:
    """The recording of that name."""
    path = folder() / f"{name}.json"
    if not path.is_file():
        raise TableError(f"no silu tables of {name!r}; kept are {', '.join(recordings())}")
    return read(path.read_text("utf-8"), path.name)


@cache
def table(name: str, which: str) -> F32:
    """``(65536,)`` float32 by bf16 bits of the gate."""
    tables = load(name)["tables"]
    if which not in tables:
        raise TableError(f"the silu tables of {name} are {', '.join(tables)}; there is no {which}")
    return unpack(which, tables[which])


def of_gate(name: str, fast: str, precise: str, form: Form) -> tuple[F32, str]:
    """What stands for the gate's function under a contract, and what was assumed for it.

    A recorded table where there is one for the form; else the reference, each operation correctly
    rounded, and the second result says so.
    """
    which = fast if form.division == "fast" else precise
    if form.division == "g*(1/d)":
        which = "reciprocal"
    if not name or form.name != "swiglu" or form.alpha != 1:
        scaled = form.name == "swiglu" and form.alpha != 1
        label = f"silu of {form.alpha:g} * gate" if scaled else form.name
        return gate_table(form), f"correctly rounded {label}" if name else ""
    if which not in load(name)["tables"]:
        return gate_table(form), f"correctly rounded silu for {form.division}"
    values = table(name, which)
    return (values if form.most is None else np.fmin(values, np.float32(form.most))), ""


__all__ = [
    "TABLES", "TableError", "load", "of_gate", "pack", "read", "recording", "recordings", "table",
    "unpack",
]  # fmt: skip
