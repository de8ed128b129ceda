"""Predicted goldens: the bits that a model of a kernel gives, and no machine has confirmed.

``golden/predicted/MODEL.json`` holds digests of each forward case under every contract revision
that has a kernel of the model. It judges nothing: what a correct kernel may return is the derived
golden's to say. It says of a backend of the model's class whether it is the kernel that the model
means, and :mod:`megamoe.predict` computes it.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe import schema
from megamoe.cases import load_cases
from megamoe.files import clear_leftovers, folder_lock, write_atomically
from megamoe.golden.documents import RESTORE, SCHEMA, forward_inputs, read_bits, y_fault
from megamoe.golden.places import GoldenError, id_fault, inside
from megamoe.golden.recorded import digests
from megamoe.golden.store import canonical
from megamoe.judge.judgements import RESULTS, observable_codes
from megamoe.spec.contract import REVISIONS

Array = npt.NDArray[Any]

DIGITS: Final = 32
"""Hex digits of a sha256 that are kept."""
Y_LIMIT: Final = 1024
"""Bytes of ``y`` up to which it is kept whole, so that elements that differ can be counted."""
FOLDER: Final = "predicted"
CANDIDATES: Final = "predicted-candidates"
WHAT: Final = (
    "The bits that a model of a kernel gives; no machine has confirmed them. They judge nothing: a "
    "kernel may return other bits inside the certified envelope."
)

_UNDER: Final = schema.Object(
    {
        "contracts": schema.Items(schema.OneOf(tuple(REVISIONS))),
        "stages": schema.Each(str),
    },
    {"y": y_fault, "assumed": schema.Items(str)},
)  # fmt: skip
_CASE: Final = schema.Object({"inputs": str, "under": schema.Items(_UNDER)})
_FILE: Final = schema.Object(
    {
        "schema": schema.natural, "what": str, "model": str, "accumulator": str,
        "describes": schema.Each(str), "generator": dict,
        "cases": schema.Each(_CASE, key=id_fault), "none": schema.Each(str, key=id_fault),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Unlike:
    """A case whose output is not the prediction: the stages, and what is known of y."""

    stages: tuple[str, ...]
    elements: int | None
    """The number of elements of y that differ; None if the prediction keeps only a digest."""
    total: int

    def line(self) -> str:
        """The stages in one line."""
        many = f" ({self.elements} of {self.total} elements)" if self.elements is not None else ""
        return ", ".join(f"{n}{many}" if n == "y" else n for n in self.stages)


@dataclass(frozen=True)
class Predictions:
    """One file of ``golden/predicted``."""

    path: Path
    data: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(self.data["model"])

    def of(self, case_id: str, revision: str) -> Mapping[str, Any] | None:
        """The prediction of a case under a revision; None for none."""
        for under in self.data["cases"].get(case_id, {}).get("under", ()):
            if revision in under["contracts"]:
                return dict(under)
        return None

    def compare(
        self, case_id: str, revision: str, inputs: str, actual: Mapping[str, Array], ids: Array
    ) -> tuple[str, Unlike | None]:
        """``equal``, ``other inputs``, ``none``, or ``unlike`` and what differs.

        ``actual`` and ``ids`` ``(T, K)`` are of the rows that the case judges; ``inputs`` is the
        digest of what the case gave.
        """
        under = self.of(case_id, revision)
        if under is None:
            return "none", None
        if self.data["cases"][case_id]["inputs"] != inputs:
            return "other inputs", None
        now = stages_of(actual, ids)
        apart = tuple(n for n in RESULTS if n in now and n in under["stages"]
                      and now[n] != under["stages"][n])  # fmt: skip
        if not apart:
            return "equal", None
        y = canonical("y", actual["y"])
        count = None
        if "y" not in apart:
            count = 0
        elif "y" in under:
            expected = np.frombuffer(base64.b64decode(under["y"]), y.dtype)
            count = int((expected != y.ravel()).sum()) if expected.size == y.size else None
        return "unlike", Unlike(apart, count, y.size)


def observable(stages: Mapping[str, Array]) -> dict[str, Array]:
    """The computed stages as far as an output can show them."""
    out = {name: stages[name] for name in RESULTS if name in stages}
    if "l2_acts" in out:
        out["l2_acts"] = observable_codes(out["l2_acts"], out.get("l2_acts_sf"))
    return out


def stages_of(stages: Mapping[str, Array], ids: Array) -> dict[str, str]:
    """Digests of the computed stages; one for every NaN, and for both zeros of a code."""
    return {n: d[:DIGITS] for n, d in digests(observable(stages), ids).items()}


def under(
    contracts: list[str], stages: Mapping[str, Array], ids: Array, assumptions: tuple[str, ...]
) -> dict[str, Any]:
    """The prediction of one case, for the contracts that give the same bits."""
    out: dict[str, Any] = {"contracts": contracts, "stages": stages_of(stages, ids)}
    y = np.ascontiguousarray(canonical("y", stages["y"]))
    if y.nbytes <= Y_LIMIT:
        out["y"] = base64.b64encode(y.tobytes()).decode()
    return out | ({"assumed": list(assumptions)} if assumptions else {})


# --- the files --------------------------------------------------------------------------------


def read(path: Path) -> Predictions:
    """The predictions in ``path``; :class:`GoldenError` where it is none of this form."""
    name = f"{path.parent.name}/{path.name}"
    data = read_bits(path, name, _FILE)
    if data["model"] != path.stem:
        raise GoldenError(f"{name} is of model {data['model']!a}; give it that name, or {RESTORE}")
    return Predictions(path, data)


def find(root: Path, accumulator: str) -> Predictions | None:
    """The predictions for backends of a class; None for none."""
    for path in sorted((root / FOLDER).glob("*.json")):
        predictions = read(path)
        if predictions.data["accumulator"] == accumulator:
            return predictions
    return None


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write predictions, a line for each case."""
    head = {name: value for name, value in data.items() if name != "cases"}
    lines = [f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}"
             for k, v in sorted(data["cases"].items())]  # fmt: skip
    text = json.dumps(head, indent=1, sort_keys=True).removesuffix("\n}")
    body = ",\n".join(f"  {line}" for line in lines)
    write_atomically(path, f'{text},\n "cases": {{\n{body}\n }}\n}}\n'.encode())


def changes(root: Path, model: str) -> list[str]:
    """What blessing the candidate of ``model`` would change, a line each."""
    new = read(root / CANDIDATES / f"{model}.json").data
    try:
        old: Mapping[str, Any] = read(root / FOLDER / f"{model}.json").data
    except FileNotFoundError:
        old = {"cases": {}, "none": {}}
    out = []
    for case_id in sorted({*new["cases"], *old["cases"]}):
        before, after = (data["cases"].get(case_id) for data in (old, new))
        if before is None or after is None:
            out.append(f"{case_id}: {'new' if before is None else 'gone'}")
        elif before != after:
            out.append(f"{case_id}: {_change(before, after)}")
    return out


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before["inputs"] != after["inputs"]:
        return "other inputs"
    old, new = ({r: u["stages"] for u in e["under"] for r in u["contracts"]}
                for e in (before, after))  # fmt: skip
    apart = [r for r in sorted({*old, *new}) if old.get(r) != new.get(r)]
    return f"other bits under {', '.join(apart)}" if apart else "its description"


def bless(root: Path) -> list[Path]:
    """Make every candidate a predicted golden; returns the files written.

    :class:`GoldenError`, with nothing written, in a CI run, where there is no candidate, and where
    one lacks a forward case or is of other inputs.
    """
    if os.environ.get("CI"):
        raise GoldenError(
            "bless-predictions refuses to run where CI is set: goldens change by a person's hand "
            "only; unset CI if you are one"
        )
    with folder_lock(root):
        paths = sorted((root / CANDIDATES).glob("*.json"))
        if not paths:
            raise GoldenError(
                f"no candidates in {root / CANDIDATES}; make them with `megamoe golden predict`"
            )
        candidates = [read(path) for path in paths]
        case_ids = {c.id for c in load_cases(root) if {*REVISIONS} & {*c.revisions}}
        inputs = {k: v for k, v in forward_inputs(root).items() if k in case_ids}
        for each in candidates:
            _complete(each, inputs)
            inside(root, root / FOLDER / each.path.name)
            inside(root, each.path)
        clear_leftovers(root / FOLDER)
        for each in candidates:
            write(root / FOLDER / each.path.name, each.data)
            each.path.unlink()
    return [root / FOLDER / each.path.name for each in candidates]


def _complete(candidate: Predictions, inputs: Mapping[str, str]) -> None:
    cases, again = candidate.data["cases"], "predict again with `megamoe golden predict`"
    own = {*cases, *candidate.data["none"]}
    for what, ids in (
        ("lacks", set(inputs) - own), ("has a case that the manifest has not:", own - set(inputs))
    ):  # fmt: skip
        if ids:
            raise GoldenError(f"candidate {candidate.path.name} {what} {min(ids)}; {again}")
    for case_id, of_case in cases.items():
        if of_case["inputs"] != inputs[case_id]:
            raise GoldenError(
                f"candidate {candidate.path.name}: {case_id} was given other inputs than its "
                f"golden's; {again}"
            )


__all__ = [
    "SCHEMA", "Predictions", "Unlike", "bless", "changes", "find", "observable", "read",
    "stages_of", "under", "write",
]  # fmt: skip
