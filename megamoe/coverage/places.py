"""Classes of a forward call's work: sizes, rows, tiles, offsets, capacity, routing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.cases.kind import CAPACITY_ALIGNMENT
from megamoe.coverage.calls import Call, form_classes
from megamoe.coverage.ranges import CALLS, MODEL_TOKENS, ROWS, TILES, TOKENS
from megamoe.kinds import laws
from megamoe.spec.models import MODELS
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS

Classes = dict[str, set[str]]
POWERS: Final = (16, 24, 31, 32)
"""Exponents of the offsets in the goal: 2 to these."""


SHALLOW: Final = (
    "tokens", "model-tokens", "rows-per-expert", "tiles", "experts", "top-k", "live-slots",
    "hidden", "intermediate", "shapes", "offsets", "capacity", "routing", "features",
    "activations",
)  # fmt: skip
"""Dimensions that need neither hidden states nor weights."""


def places(call: Call, params: Mapping[str, Any]) -> Classes:
    """Dimension -> classes of where the work of one call lies."""
    tokens, top_k = call.ids.shape
    out: Classes = defaultdict(set)
    out["tokens"] = {TOKENS.of(tokens)}
    out["hidden"], out["intermediate"] = {str(call.hidden)}, {str(call.inter)}
    out["experts"], out["top-k"] = {str(call.experts)}, {str(top_k)}
    out["shapes"] = {f"H {call.hidden} I {call.inter} top-{top_k}"}
    for model in MODELS.values():
        sizes = model.hidden_size, model.intermediate_size, model.top_k
        if sizes == (call.hidden, call.inter, top_k):
            out["model-tokens"].add(f"{model.name} {MODEL_TOKENS.of(tokens)}")
    out["live-slots"] = {str(n) for n in call.live[call.rows].sum(axis=1)}
    out["rows-per-expert"], out["tiles"] = _rows(call)
    out["offsets"] = offsets(call)
    out["capacity"] = _capacity(tokens, call.capacity)
    out["routing"] = routing(call.ids, call.experts)
    out["inputs"] = form_classes(call.forms, params)
    out["features"] = {*call.features} or {"none"}
    mode = "fast" if call.act.fast_math else "precise"
    out["activations"] = {f"{call.act.name} {mode}"}
    return out


def _rows(call: Call) -> tuple[set[str], set[str]]:
    """Rows of each expert, and places in tiles of those that are judged.

    An expert's rows are taken in the order of tokens, then slots.
    """
    mask = np.zeros(len(call.ids), np.bool_)
    mask[call.rows] = True
    counts, tiles = set[str](), set[str]()
    if not call.ids.size:
        return counts, tiles
    if len(np.unique(call.ids[call.live])) < call.experts:
        counts.add(ROWS.of(0))
    flat = call.ids.ravel()
    order = np.argsort(flat, kind="stable")
    names, starts = np.unique(flat[order], return_index=True)
    for name, part in zip(names, np.split(order, starts[1:]), strict=True):
        if name < 0:
            continue
        counts.add(ROWS.of(len(part)))
        at = np.flatnonzero(mask[part // call.ids.shape[1]])
        for tile in TILES:
            tiles |= {f"{tile}: {place}" for place in _in_tile(at, len(part), tile)}
    return counts, tiles


TILE_PLACES: Final = {
    "first row": "The first row of a tile is lost or computed twice.",
    "last row": "The last row of a tile is lost or computed twice.",
    "last row of a part": "The last row of a tile that is not full is lost.",
    "alone in a part": "A tile with one row is passed over.",
    "second tile or later": "Rows beyond the first tile read the first tile's.",
}


def _in_tile(at: npt.NDArray[Any], count: int, tile: int) -> list[str]:
    """Places of rows ``at`` of an expert with ``count`` rows."""
    last, part = (at == count - 1).any(), count % tile
    conditions = {
        "first row": (at % tile == 0).any(),
        "last row": (at % tile == tile - 1).any(),
        "last row of a part": last and part != 0,
        "alone in a part": last and part == 1,
        "second tile or later": (at >= tile).any(),
    }
    return [name for name, is_there in conditions.items() if is_there]


def offsets(call: Call) -> set[str]:
    """The highest offset of a judged row in each tensor, in bytes and, if that differs, in
    elements."""
    if not len(call.rows):
        return set()
    rows, slots = int(call.rows.max()) + 1, (int(call.rows.max()) + 1) * call.ids.shape[1]
    expert = int(call.ids[call.rows].max()) + 1
    h, i = call.hidden, call.inter
    group = 16 if "nvfp4" in call.features else 32
    ends = {  # elements, bytes of one
        "hidden_states": (rows * h, 2), "x": (rows * h, 1), "x_sf": (rows * h // 128, 4),
        "topk_ids": (slots, 8), "topk_weights": (slots, 4),
        "w13_weight": (expert * 2 * i * h // 2, 1),
        "w13_weight_scale": (expert * 2 * i * h // group, 1),
        "w2_weight": (expert * h * i // 2, 1), "w2_weight_scale": (expert * h * i // group, 1),
        "l2_acts": (slots * i, 1), "l2_acts_sf": (slots * i // group, 1),
        "slot rows": (slots * h, 2), "y": (rows * h, 2),
    }  # fmt: skip
    out = set()
    for name, (elements, size) in ends.items():
        for n in POWERS:
            out |= {f"{name} bytes beyond 2^{n}"} if elements * size > 1 << n else set()
            out |= {f"{name} elements beyond 2^{n}"} if size > 1 and elements > 1 << n else set()
    return out


OFFSET_TENSORS: Final = {
    "hidden_states": 2, "x": 1, "x_sf": 4, "topk_ids": 8, "topk_weights": 4,
    **dict.fromkeys(WEIGHTS, 1), "l2_acts": 1, "l2_acts_sf": 1, "slot rows": 2, "y": 2,
}  # fmt: skip
"""Tensors by the bytes of an element."""

CAPACITIES: Final = {
    "no tokens": "An empty batch leaves the buffer's old rows in the output.",
    "exactly full": "The last row of a full buffer is lost, or one beyond it is written.",
    "one row free": "The last row but one is taken for padding.",
    "full up to the alignment": "Capacity is aligned up, and rows beyond the tokens are read.",
    "no multiple of the alignment": "The buffer is made for fewer rows than were asked for.",
    "at least 8 times the tokens": "Strides of the buffer follow from the tokens.",
    "at least 1000 free rows": "Old rows beyond the tokens reach the output.",
}


def _capacity(tokens: int, capacity: int) -> set[str]:
    conditions = {
        "no tokens": tokens == 0,
        "exactly full": tokens == capacity,
        "one row free": tokens == capacity - 1,
        "full up to the alignment": tokens == capacity and capacity % CAPACITY_ALIGNMENT != 0,
        "no multiple of the alignment": capacity % CAPACITY_ALIGNMENT != 0,
        "at least 8 times the tokens": 0 < 8 * tokens <= capacity,
        "at least 1000 free rows": capacity - tokens >= 1000,
    }
    return {name for name, is_so in conditions.items() if is_so}


ROUTES: Final = {
    "one expert takes all": "One expert's rows overflow its share of the pool.",
    "uniform": "Experts with equal counts share one offset.",
    "skewed": "Blocks are shared out by the mean and not by each expert's count.",
    "experts without rows": "An expert without rows moves those that follow.",
    "the first expert": "The first expert is passed over.",
    "the last expert": "The last expert is passed over.",
    "the last expert alone": "Offsets are found by the experts before.",
    "some slots masked": "A masked slot is computed, or moves those that follow.",
    "the first slot masked": "A token whose first slot is masked is passed over.",
    "the last slot masked": "The combine waits for a slot that is masked.",
    "a token without slots": "A token without slots keeps an old row in place of zeros.",
    "every slot masked": "A batch without live slots hangs, or is not written.",
    "an expert twice in a token": "Two slots of one expert share one row.",
    "ids ascending": "Slots are sorted in the other direction.",
    "ids not ascending": "Slots are taken in the order of experts, and summed so.",
}


def routing(ids: npt.NDArray[Any], experts: int) -> set[str]:
    """Patterns of ``(T, K)`` ids, -1 for no expert."""
    live = ids >= 0
    if not ids.size:
        return set()
    counts = np.bincount(ids[live], minlength=experts)
    masked = ~live
    order = np.sort(np.where(live, ids, -1 - np.arange(ids.shape[1])), axis=1)
    several = live.sum(axis=1) > 1
    steps = [np.diff(row[on]) for row, on in zip(ids[several], live[several], strict=True)]
    conditions = {
        "one expert takes all": live.any() and experts > 1 and (counts > 0).sum() == 1,
        "uniform": experts > 1 and counts.min() > 0 and counts.max() - counts.min() <= 1,
        "skewed": (counts > 0).sum() > 1 and counts.max() >= 4 * counts.mean(),
        "experts without rows": live.any() and counts.min() == 0,
        "the first expert": counts[0] > 0, "the last expert": counts[-1] > 0,
        "the last expert alone": experts > 1 and counts[-1] > 0 and counts[-1] == counts.sum(),
        "some slots masked": masked.any() and live.any(),
        "the first slot masked": (masked[:, 0] & live.any(axis=1)).any(),
        "the last slot masked": (masked[:, -1] & live.any(axis=1)).any(),
        "a token without slots": masked.all(axis=1).any() and live.any(),
        "every slot masked": masked.all(),
        "an expert twice in a token": (np.diff(order, axis=1) == 0).any(),
        "ids ascending": any((s > 0).all() for s in steps),
        "ids not ascending": any((s < 0).any() for s in steps),
    }  # fmt: skip
    return {name for name, is_so in conditions.items() if is_so}


# --- calls on one buffer ----------------------------------------------------------------------


def calls(problem: Problem | None, law: str | None, is_full: bool = False) -> Classes:
    """The number of a case's calls, and the changes between them.

    ``problem`` may hold the judged rows alone; ``is_full``: all rows fill the buffer exactly.
    """
    if law is None:
        return {"calls": {CALLS.of(1)}}
    out = {f"law {law}"}
    if problem is None or law not in laws.LAWS:
        return {"calls": out}  # how a launch is varied is known to the worker alone
    number, full = 1, 0
    for variant in laws.variants(problem, law):
        before = () if variant.before is None else (variant.before,)
        for one in (*before, variant.problem):
            number += 1
            alike = (one.num_tokens, one.max_num_tokens)
            full += is_full and alike == (problem.num_tokens, problem.max_num_tokens)
            same = one.letters == problem.letters
            other = (
                same
                and one.w13_weight is not problem.w13_weight
                and not bool((one.w13_weight == problem.w13_weight).all())
            )
            out |= {"other weights of the same shapes"} if other else set()
    full += is_full
    out |= {CALLS.of(number)} | ({"exactly full more than once"} if full > 1 else set())
    return {"calls": out}
