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
from megamoe.confirm.words import INSTRUCTIONS, Asked, answered, modelled, sampled, units_near
from megamoe.golden import predicted
from megamoe.oracle.gates import silu_bounds
from megamoe.predict import Model, model, tables
from megamoe.predict.record import entry
from megamoe.spec.formats import bf16_decode

LISTED = 10
"""Cases that are named."""


@dataclass(frozen=True)
class Found:
    """One statement."""

    what: str
    state: str
    """confirmed, refuted, new, or not asked."""
    text: str

    def line(self) -> str:
        """For a terminal."""
        return f"{self.state:>9}  {self.what}: {self.text}"


def found(answers: Mapping[str, Any], root: Path) -> list[Found]:
    """All statements, instructions first."""
    own = model(answers["model"])
    out = [*_instructions(answers), *_silu(answers, own), *_cases(answers, own, root)]
    return out + [Found(name, "not asked", why) for name, why in sorted(answers["lacks"].items())]


def _instructions(answers: Mapping[str, Any]) -> Iterator[Found]:
    for name, answer in sorted(answers["instructions"].items()):
        if name not in INSTRUCTIONS:
            raise ConfirmError(f"unknown instruction {name!a}; known: {', '.join(INSTRUCTIONS)}")
        instruction = INSTRUCTIONS[name]
        asked = Asked(instruction, answer["seed"], answer["tiles"], answer["steps"])
        now = answered(asked, modelled(asked, instruction.unit))
        if now["sha256"] == answer["sha256"]:
            yield Found(
                name, "confirmed", f"{asked.outputs} words are those of {instruction.unit.name}"
            )
            continue
        given = sampled(answer)

        def apart(unit: Any, asked: Asked = asked, given: Any = given) -> int:
            wanted = np.concatenate(list(modelled(asked, unit, len(given))))
            nan = np.isnan(given.view(np.float32)) & np.isnan(wanted.view(np.float32))
            return int(((given != wanted) & ~nan).sum())

        own = apart(instruction.unit)
        near = {said: apart(unit) for said, unit in units_near(instruction.unit)}
        best = min(near, key=lambda said: near[said])
        why = f"; {best} leaves {near[best]}" if near[best] < own else ""
        yield Found(name, "refuted", f"{own} of {given.size} sampled words are not those of "
                                     f"{instruction.unit.name}{why}")  # fmt: skip


def _silu(answers: Mapping[str, Any], own: Model) -> Iterator[Found]:
    gates = bf16_decode(np.arange(tables.ENTRIES, dtype=np.uint16))
    for name, packed in sorted(answers["silu"].items()):
        table, form = tables.unpack(name, packed), tables.TABLES[name]
        low, high = silu_bounds("fast" if "fast" in name else form)
        with np.errstate(invalid="ignore"):
            outside = ~((table >= low) & (table <= high)) & np.isfinite(gates)
        if outside.any():
            said = f"{int(outside.sum())} gates lie outside the documented errors"
            yield Found(f"silu {name}", "refuted", f"{said} (numerics.md, 4.3)")
            continue
        if not own.silu or name not in tables.kept(own.silu)["tables"]:
            yield Found(f"silu {name}", "new", f"{packed['count']} words are not the reference's")
            continue
        kept = tables.table(own.silu, name)
        count = int(((table != kept) & np.isfinite(gates)).sum())
        if count:
            yield Found(f"silu {name}", "refuted", f"{count} gates differ from {own.silu}'s; keep "
                                                   "this table with --write")  # fmt: skip
        else:
            yield Found(f"silu {name}", "confirmed", f"the table of {own.silu}")


def _cases(answers: Mapping[str, Any], own: Model, root: Path) -> Iterator[Found]:
    if not answers["cases"]:
        return
    known = {case.id: case for case in load_cases(root)}
    revision, kept = answers["contract"], _kept(root, own)
    counts, named = Counter[str](), []
    for case_id, shown in sorted(answers["cases"].items()):
        if case_id not in known:
            counts["of no case here"] += 1
            continue
        now = kept.get(case_id) or entry(root, own.name, False, known[case_id])
        wanted = next((u for u in now.get("under", ()) if revision in u["contracts"]), None)
        if wanted is None:
            counts["without a prediction"] += 1
        elif now["inputs"] != shown["inputs"]:
            counts["of other inputs"] += 1
        elif "y" not in shown["stages"]:
            counts["without a y"] += 1
        else:
            apart = [n for n, d in shown["stages"].items() if wanted["stages"].get(n) != d]
            counts["unlike" if apart else "equal"] += 1
            outside = " (outside its envelope)" if shown["status"] == "fail" else ""
            named += [f"{case_id}: {_apart(apart, wanted, shown)}{outside}"] if apart else []
    said = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    state = "refuted" if named else "confirmed" if counts["equal"] else "not asked"
    more = f"; {'; '.join(named[:LISTED])}" if named else ""
    yield Found(f"cases of model {own.name}", state, said + more)


def _apart(apart: list[str], wanted: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    out = ", ".join(apart)
    if "y" in apart and "y" in wanted and "y" in shown:
        one, other = (np.frombuffer(base64.b64decode(each["y"]), np.uint16)
                      for each in (wanted, shown))  # fmt: skip
        if one.size == other.size:
            out += f" ({int((one != other).sum())} of {one.size} elements of y)"
    return out


def _kept(root: Path, own: Model) -> Mapping[str, Any]:
    try:
        kept: Mapping[str, Any] = predicted.read(root / predicted.FOLDER / f"{own.name}.json").data
    except FileNotFoundError:
        return {}
    return dict(kept["cases"])


__all__ = ["Found", "found"]
