"""Cases as files for a side, and what moved between two sides' bits, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from megamoe.cases import Case
from megamoe.compare import disk
from megamoe.compare.show import CALLABLE, WEIGHTS
from megamoe.formats import unpack_sf
from megamoe.golden import GoldenError, Store, make, regenerate
from megamoe.judge import Finding, Place, Verdict, bitwise
from megamoe.judge.formats import BF16, BYTE, E4M3, F32, INT32, INT64, UE8M0, Form
from megamoe.suite.run import Runner

Array = npt.NDArray[Any]

COMPARABLE: Final = tuple(CALLABLE)
"""Kinds of case that give tensors; an errors case gives none."""
ORDER: Final = (
    "ids", "load", "x_sf", "x", "topk_idx", "topk_weights", "beyond", "l2_acts_sf", "l2_acts",
    "w13", "w13_sf", "w2", "w2_sf", "y",
)  # fmt: skip
"""Stages in the order in which they are computed: the first that moved is where to look."""
_FORMS: Final[Mapping[str, Form]] = {
    "y": BF16, "x": E4M3, "x_sf": UE8M0, "l2_acts": E4M3, "l2_acts_sf": UE8M0,
    "topk_weights": F32, "topk_idx": INT64, "load": INT32, "beyond": INT64, "w13": BYTE,
    "w2": BYTE, "w13_sf": UE8M0, "w2_sf": UE8M0,
}  # fmt: skip
_AXES: Final[Mapping[str, tuple[tuple[str, ...], int]]] = {
    "y": (("token", "channel"), 1), "x": (("token", "channel"), 1),
    "x_sf": (("token", "channel"), 32), "l2_acts": (("token", "slot", "channel"), 1),
    "l2_acts_sf": (("token", "slot", "channel"), 32), "topk_idx": (("token", "slot"), 1),
    "topk_weights": (("token", "slot"), 1), "ids": (("token", "slot"), 1),
    "load": (("expert",), 1), "beyond": (("row",), 1), "w13": (("expert", "row", "channel"), 1),
    "w2": (("expert", "row", "channel"), 1), "w13_sf": (("expert", "row", "channel"), 32),
    "w2_sf": (("expert", "row", "channel"), 32),
}  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """One stage on two sides."""

    elements: int
    moved: int = 0
    """Elements whose bits differ, payloads of NaN and signs of zero included."""
    max_ulps: int | None = 0
    """The largest distance; None: NaN on one side only."""
    finding: Finding | None = None
    text: str = ""
    """What is wrong where the two cannot be compared element by element."""


# --- to a side --------------------------------------------------------------------------------


def write_inputs(case: Case, path: Path) -> dict[str, Any]:
    """Regenerate ``case`` into ``path``; the request for a side, less where its bits shall go.

    Of the experts only those that an id names are written. Raises ``OSError``.
    """
    given = dict(regenerate(case))
    if case.kind == "staging":
        given["capacity"] = case.params["capacity"]
    if case.kind in ("forward", "property"):
        ids = given["topk_ids"]
        count = given["w13_weight"].shape[0]
        experts = ids[(ids >= 0) & (ids < count)].unique()
        given |= {name: given[name][experts] for name in WEIGHTS}
        given |= {"experts": experts, "num_experts": count}
    tensors = {k: v.contiguous() for k, v in given.items() if isinstance(v, torch.Tensor)}
    plain = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.require_room(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    part = path.with_suffix(".part")
    torch.save(tensors, part)
    part.replace(path)
    return {"id": case.id, "kind": case.kind, "inputs": str(path), "plain": plain}


def read_bits(path: Path) -> dict[str, Array]:
    """``{stage: integers}`` as a side wrote them, in the order of computation."""
    tensors = torch.load(path, weights_only=True)
    names = sorted(tensors, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))
    return {name: tensors[name].numpy() for name in names}


# --- between two ------------------------------------------------------------------------------


def ids_of(request: Mapping[str, Any]) -> Array | None:
    """Expert ids of a request's tokens, to name the expert of a slot."""
    tensors = torch.load(request["inputs"], weights_only=True)
    ids = tensors.get("topk_ids")
    return None if ids is None or request["kind"] == "eplb" else ids.numpy()


def compare(
    left: Mapping[str, Array], right: Mapping[str, Array], ids: Array | None
) -> dict[str, Moved]:
    """Every stage that both sides show. A stage shown by one side only says nothing of it."""
    shared = [name for name in left if name in right]
    return {name: stage_moved(name, left[name], right[name], ids) for name in shared}


def stage_moved(name: str, left: Array, right: Array, ids: Array | None) -> Moved:
    """``right`` against ``left``, bit for bit."""
    if left.shape != right.shape or left.dtype.itemsize != right.dtype.itemsize:
        text = f"{left.dtype} {left.shape} became {right.dtype} {right.shape}"
        return Moved(max(left.size, right.size), max(left.size, right.size, 1), None, text=text)
    form = _FORMS.get(name) or (INT64 if left.dtype.itemsize == 8 else INT32)
    unsigned = form.signed_zero or form is UE8M0 or form is BYTE
    a, b = (_unsigned(x) if unsigned else x for x in (left, right))
    if name.endswith("_sf") and name != "l2_acts_sf":
        a, b = unpack_sf(left), unpack_sf(right)
    count = int((a != b).sum())
    if not count:
        return Moved(int(a.size))
    axes, per = _AXES.get(name, (("row",) * a.ndim, 1))
    if len(axes) != a.ndim:
        axes = ("row",) * a.ndim
    finding = bitwise(name, form, b, a, Place(axes, per, None, ids))
    far = finding.worst.ulps if finding.worst else 0  # 0: only payloads of NaN differ
    return Moved(int(a.size), count, far, finding)


def _unsigned(x: Array) -> Array:
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def signature(digests: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Stages that both show and whose digests differ, in the order of computation."""
    names = [name for name in digests if name in other and digests[name] != other[name]]
    return sorted(names, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))


# --- against the golden -----------------------------------------------------------------------


class _Said:
    """A backend that says again what a side showed, so that the suite's own judge can judge it."""

    def __init__(self, shown: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        self.name = str(facts.get("backend", "side"))
        self.accumulator = facts.get("accumulator")
        self._shown = shown

    def _tensor(self, name: str) -> torch.Tensor:
        array = self._shown[name]
        tensor = torch.from_numpy(np.array(array))
        return tensor.view(torch.bfloat16) if name == "y" else tensor

    def forward(self, problem: Any) -> dict[str, torch.Tensor]:
        return {name: self._tensor(name) for name in self._shown}

    def prepare(self, *arguments: torch.Tensor) -> None:
        outs = zip(("x", "x_sf", "topk_idx", "topk_weights"), arguments[3:], strict=True)
        for name, out in outs:
            mine = self._tensor(name)
            out[: mine.shape[0]] = mine.view(out.dtype)

    def eplb_map(self, *arguments: torch.Tensor) -> torch.Tensor:
        arguments[1].copy_(self._tensor("load"))
        return self._tensor("ids")

    def transform_weights(self, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def mn_major(t: torch.Tensor) -> torch.Tensor:
            return t.transpose(1, 2).contiguous().transpose(1, 2)

        made = {n: self._tensor(n) for n in ("w13", "w13_sf", "w2", "w2_sf")}
        return tuple(mn_major(t) if n.endswith("_sf") else t for n, t in made.items())


def judge(
    case: Case, shown: Mapping[str, Array], facts: Mapping[str, Any], root: Path
) -> tuple[Verdict, dict[str, int]]:
    """The golden's verdict of one side's bits, and how many elements of each stage are outside.

    A property case is judged as the forward it makes: its law takes more calls than one. Raises
    :class:`megamoe.golden.GoldenError` where there is no usable golden.
    """
    runner = Runner(_Said(shown, facts), Store(root, make))
    verdict = runner.run(case) if case.kind != "property" else runner.run_and_show(case)[0]
    if verdict.status == "error":
        raise GoldenError(verdict.reason)
    outside = {f.stage: f.outside or int(bool(f.text)) for f in verdict.findings}
    if "beyond" in shown and shown["beyond"].any():
        outside["beyond"] = int((shown["beyond"] != 0).sum())
    return verdict, outside


def worst_dict(name: str, finding: Finding | None) -> dict[str, Any] | None:
    """The element farthest off, JSON-able: ``expected`` is the left side's, or the good one's."""
    if finding is None or finding.worst is None:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(asdict(finding.worst)))
    return plain
