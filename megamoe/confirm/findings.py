"""What a file of answers says of the models: confirmed, refuted, or not asked."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.cases import load_cases
from megamoe.confirm.document import ConfirmError
from megamoe.confirm.words import (
    INSTRUCTIONS,
    Request,
    sample_of,
    units_near,
    words_entry,
    words_of,
)
from megamoe.golden import predicted
from megamoe.oracle.gates import silu_bounds
from megamoe.predict import Model, model, tables
from megamoe.predict.record import entry
from megamoe.spec.formats import bf16_decode

NAME_LIMIT = 10
"""Cases that are named."""


@dataclass(frozen=True)
class Statement:
    """One statement."""

    what: str
    state: str
    """confirmed, refuted, new, or not asked."""
    text: str

    def line(self) -> str:
        """For a terminal."""
        return f"{self.state:>9}  {self.what}: {self.text}"


def statements(answers: Mapping[str, Any], root: Path) -> list[Statement]:
    """All statements, instructions first."""
    own = model(answers["model"])
    out = [*_instructions(answers), *_silu(answers, own), *_cases(answers, own, root)]
    return out + [
        Statement(name, "not asked", why) for name, why in sorted(answers["lacks"].items())
    ]


def _instructions(answers: Mapping[str, Any]) -> Iterator[Statement]:
    for name, answer in sorted(answers["instructions"].items()):
        if name not in INSTRUCTIONS:
            raise ConfirmError(f"unknown instruction {name!a}; known: {', '.join(INSTRUCTIONS)}")
        instruction = INSTRUCTIONS[name]
        request = Request(instruction, answer["seed"], answer["tiles"], answer["steps"])
        now = words_entry(request, words_of(request, instruction.unit))
        if now["sha256"] == answer["sha256"]:
            yield Statement(
                name, "confirmed", f"{request.outputs} words are those of {instruction.unit.name}"
            )
            continue
        sample = sample_of(answer)

        def apart(unit: Any, request: Request = request, sample: Any = sample) -> int:
            expected = np.concatenate(list(words_of(request, unit, len(sample))))
            nan = np.isnan(sample.view(np.float32)) & np.isnan(expected.view(np.float32))
            return int(((sample != expected) & ~nan).sum())

        own = apart(instruction.unit)
        near = {change: apart(unit) for change, unit in units_near(instruction.unit)}
        best = min(near, key=lambda change: near[change])
        why = f"; {best} leaves {near[best]}" if near[best] < own else ""
        yield Statement(name, "refuted", f"{own} of {sample.size} sampled words are not those of "
                                     f"{instruction.unit.name}{why}")  # fmt: skip


def _silu(answers: Mapping[str, Any], own: Model) -> Iterator[Statement]:
    gates = bf16_decode(np.arange(tables.ENTRIES, dtype=np.uint16))
    for name, packed in sorted(answers["silu"].items()):
        table, form = tables.unpack(name, packed), tables.TABLES[name]
        low, high = silu_bounds("fast" if "fast" in name else form)
        with np.errstate(invalid="ignore"):
            outside = ~((table >= low) & (table <= high)) & np.isfinite(gates)
        if outside.any():
            text = f"{int(outside.sum())} gates lie outside the documented errors"
            yield Statement(f"silu {name}", "refuted", f"{text} (numerics.md, 4.3)")
            continue
        if not own.silu or name not in tables.load(own.silu)["tables"]:
            yield Statement(
                f"silu {name}", "new", f"{packed['count']} words are not the reference's"
            )
            continue
        reference = tables.table(own.silu, name)
        count = int(((table != reference) & np.isfinite(gates)).sum())
        if count:
            yield Statement(f"silu {name}", "refuted", f"{count} gates differ from {own.silu}'s; "
                                                   "keep this table with --write")  # fmt: skip
        else:
            yield Statement(f"silu {name}", "confirmed", f"the table of {own.silu}")


def _cases(answers: Mapping[str, Any], own: Model, root: Path) -> Iterator[Statement]:
    if not answers["cases"]:
        return
    by_id = {case.id: case for case in load_cases(root)}
    revision, entries = answers["contract"], _entries(root, own)
    counts, differences = Counter[str](), []
    for case_id, answer in sorted(answers["cases"].items()):
        if case_id not in by_id:
            counts["of no case here"] += 1
            continue
        now = entries.get(case_id) or entry(root, own.name, False, by_id[case_id])
        prediction = next((u for u in now.get("under", ()) if revision in u["contracts"]), None)
        if prediction is None:
            counts["without a prediction"] += 1
        elif now["inputs"] != answer["inputs"]:
            counts["of other inputs"] += 1
        elif "y" not in answer["stages"]:
            counts["without a y"] += 1
        else:
            apart = [n for n, d in answer["stages"].items() if prediction["stages"].get(n) != d]
            counts["unlike" if apart else "equal"] += 1
            outside = " (outside its envelope)" if answer["status"] == "fail" else ""
            differences += (
                [f"{case_id}: {_apart(apart, prediction, answer)}{outside}"] if apart else []
            )
    text = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    state = "refuted" if differences else "confirmed" if counts["equal"] else "not asked"
    more = f"; {'; '.join(differences[:NAME_LIMIT])}" if differences else ""
    yield Statement(f"cases of model {own.name}", state, text + more)


def _apart(apart: list[str], prediction: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    out = ", ".join(apart)
    if "y" in apart and "y" in prediction and "y" in answer:
        one, other = (np.frombuffer(base64.b64decode(each["y"]), np.uint16)
                      for each in (prediction, answer))  # fmt: skip
        if one.size == other.size:
            out += f" ({int((one != other).sum())} of {one.size} elements of y)"
    return out


def _entries(root: Path, own: Model) -> Mapping[str, Any]:
    try:
        document: Mapping[str, Any] = predicted.read(
            root / predicted.FOLDER / f"{own.name}.json"
        ).data
    except FileNotFoundError:
        return {}
    return dict(document["cases"])


__all__ = ["Statement", "statements"]
