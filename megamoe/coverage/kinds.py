"""Classes of the kinds that are no forward: staging, eplb, layout, errors."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import numpy as np

from megamoe.cases import Case, kind_of
from megamoe.cases.recipes import hidden_states, routing
from megamoe.coverage import gates, groups
from megamoe.coverage.calls import form_classes, forms_of
from megamoe.coverage.ranges import FEWER, Ranges
from megamoe.oracle.staging import quantize
from megamoe.spec.contract import Contract
from megamoe.spec.formats import bf16_decode
from megamoe.spec.forms import bits
from megamoe.spec.tensors import WEIGHTS

Classes = dict[str, set[str]]
ELEMENTS: Final = 1 << 20
"""Hidden states of one case that are counted; rows beyond are left out, evenly."""
EXPERTS: Final = Ranges((0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 384, 896))
REPLICAS: Final = Ranges((0, 1, 2, 3, 4, 8, 16, 64))

PADDING: Final = {
    "none told": "A call without padding rows is taken for one with some.",
    "no row": "A count of 0 is taken for none, or of all rows.",
    "some rows": "Padding rows are counted, or keep their ids.",
    "all rows": "A batch of padding alone is counted.",
}
IDS: Final = {
    "local": "The remap is wrong.",
    "-1": "A masked slot becomes an expert, or reads before the map.",
    "below -1": "A negative id reads before the map.",
    "beyond the map": "An id beyond the map reads behind it.",
    "wraps into the map": "An id beyond 2^31 is not cut to 32 bits.",
    "mapped beyond the load": "An expert beyond the load view is counted outside of it.",
}


def staging(case: Case, contract: Contract) -> Classes:
    """Numbers and sizes of one ``prepare``."""
    p = case.params
    out: Classes = defaultdict(set)
    whole = p["tokens"] * p["hidden"] <= ELEMENTS
    if whole:
        inputs = kind_of("staging").inputs(case)
        hidden, ids = bits(inputs["hidden_states"].contiguous()), inputs["topk_ids"].numpy()
        weights = inputs["topk_weights"].float().numpy()
        out["staging-inputs"] = form_classes(forms_of(inputs), p)
    else:
        tokens = np.arange(p["tokens"])
        few = tokens[:: -(-len(tokens) * p["hidden"] // ELEMENTS)]
        hidden = hidden_states(case.seed, few, p["hidden"], p.get("hidden_recipe", {}))
        recipe = p.get("routing_recipe", {})
        ids, weights = routing(case.seed, few, p["experts"], p["top_k"], recipe)
        out["staging-inputs"] = form_classes({}, p)
    x, sf = quantize(hidden, contract)
    out["staging-codes"] |= {*groups.hexes(groups.present(x))}
    out["staging-bytes"] |= {*groups.hexes(groups.present(sf))}
    out["staging-branches"] |= groups.staging_branches(hidden, contract)
    out["staging-rounding"] |= groups.roundings(bf16_decode(hidden), sf, x)
    out["staging-specials"] |= {f"hidden {n}" for n in gates.special_bf16(hidden)}
    out["staging-specials"] |= {f"weight {n}" for n in gates.special_f32(weights)}
    out["staging-tokens"] = {FEWER.of(p["tokens"])}
    out["staging-hidden"], out["staging-top-k"] = {str(p["hidden"])}, {str(p["top_k"])}
    out["staging-padding"] = {_padding(p)}
    free = p["capacity"] - p["tokens"]
    out["staging-capacity"] = {"exactly full" if free == 0 else "free rows"}
    out["staging-ids"] = {
        name for name, mask in (
            ("-1", ids == -1), ("below -1", ids < -1), ("above 2^31", ids >= 1 << 31),
        ) if mask.any()
    }  # fmt: skip
    return out


def eplb(case: Case, contract: Contract) -> Classes:
    """Maps, ids and sizes of one ``eplb_map``."""
    p = case.params
    inputs = kind_of("eplb").inputs(case)
    ids = inputs["topk_ids"].numpy().astype(np.int64)
    table = inputs["logical_to_physical_map"].numpy()
    counts = inputs["logical_replica_count"].numpy()
    narrow = ids.astype(np.int32).astype(np.int64)
    inside = (narrow >= 0) & (narrow < len(counts))
    experts = np.unique(narrow[inside])
    out: Classes = {
        "eplb-tokens": {FEWER.of(p["tokens"])},
        "eplb-top-k": {str(p["top_k"])},
        "eplb-logical": {EXPERTS.of(p["logical"])},
        "eplb-physical": {EXPERTS.of(p["physical"])},
        "eplb-replicas": {REPLICAS.of(int(counts[at])) for at in experts},
        "eplb-padding": {_padding(p)},
        "eplb-record": {"on" if p["record"] else "off"},
        "eplb-inputs": form_classes(forms_of(inputs), p),
    }
    conditions = {
        "local": (inside & (ids == narrow)).any(), "-1": (ids == -1).any(),
        "below -1": (ids < -1).any(), "beyond the map": (narrow >= len(counts)).any(),
        "wraps into the map": (inside & (ids != narrow)).any(),
        "mapped beyond the load": (table[experts] >= p["physical"]).any(),
    }  # fmt: skip
    out["eplb-ids"] = {name for name, is_so in conditions.items() if is_so}
    return out


def layout(case: Case, contract: Contract) -> Classes:
    """Sizes and bytes of one ``transform_weights``."""
    p = case.params
    out: Classes = {
        "layout-hidden": {str(p["hidden"])}, "layout-intermediate": {str(p["intermediate"])},
        "layout-experts": {str(len(p["touched"]) if p.get("touched") else p["experts"])},
    }  # fmt: skip
    if p["hidden"] * p["intermediate"] <= ELEMENTS:
        inputs = kind_of("layout").inputs(case)
        scales: list[Any] = [inputs[name].numpy() for name in WEIGHTS[1::2]]
        out["layout-bytes"] = {name for sf in scales for name in groups.hexes(groups.present(sf))}
    return out


def errors(case: Case, contract: Contract) -> Classes:
    """The wrong call."""
    return {"errors": {case.params["action"]}}


def _padding(p: Any) -> str:
    if "unpadded" not in p:
        return "none told"
    if p["unpadded"] == p["tokens"]:
        return "no row"
    return "all rows" if p["unpadded"] == 0 else "some rows"
