"""Dimensions of the kinds other than forward: :mod:`.kinds` computes the classes of a case."""

from __future__ import annotations

from collections.abc import Iterable

from megamoe.cases.needs import ACTIONS
from megamoe.coverage import gates, groups, kinds
from megamoe.coverage.dimension import Dimension, each
from megamoe.coverage.groups import BYTES, CODES
from megamoe.coverage.ranges import FEWER
from megamoe.coverage.size_dimensions import forms
from megamoe.spec.contract import Contract
from megamoe.spec.models import MODELS


def staging(contract: Contract) -> Iterable[Dimension]:
    """Kind ``staging``."""
    bytes_ = groups.hexes(groups.staging_bytes(contract))
    yield Dimension(
        "staging-codes",
        "E4M3 code that prepare writes",
        each(CODES, "Staging never gives code {}."),
    )
    yield Dimension(
        "staging-bytes",
        "UE8M0 byte that prepare writes",
        each(bytes_, "Staging never gives scale byte {}."),
    )
    yield Dimension("staging-branches", "branch of a scale in prepare", groups.branch_goal(True))
    yield Dimension("staging-rounding", "rounding of a code in prepare", groups.rounding_goal())
    yield Dimension(
        "staging-specials",
        "special number that prepare is given",
        each(
            (f"{s} {n}" for s in ("hidden", "weight") for n in gates.SPECIALS),
            "Staging changes '{}'.",
        ),
    )
    yield Dimension(
        "staging-tokens",
        "tokens of prepare",
        each(FEWER.classes, "Staging of {} tokens loses rows."),
    )
    hidden = {128, 256, 384, 512, 1024, 2048, *(m.hidden_size for m in MODELS.values())}
    yield Dimension(
        "staging-hidden", "H of prepare", each(sorted(hidden), "Staging of H {} loses channels.")
    )
    yield Dimension(
        "staging-top-k",
        "top-k of prepare",
        each((1, 2, 3, 4, 6, 7, 8, 9, 16, 32), "Staging of top-{} loses slots."),
    )
    yield Dimension(
        "staging-ids",
        "id that prepare copies",
        {
            "-1": "A masked slot is changed.",
            "below -1": "A negative id is changed.",
            "above 2^31": "Ids are cut to 32 bits.",
        },
    )
    yield Dimension(
        "staging-capacity",
        "capacity against tokens in prepare",
        {
            "exactly full": "The last row of a full buffer is lost.",
            "free rows": "Rows beyond the batch are written.",
        },
    )
    if contract.padding_known.value:
        yield Dimension("staging-padding", "rows of padding in prepare", kinds.PADDING)
    yield Dimension("staging-inputs", "dtype and strides of prepare's inputs", forms("prepare"))


def eplb(contract: Contract) -> Iterable[Dimension]:
    """Kind ``eplb``."""
    yield Dimension(
        "eplb-tokens",
        "tokens of the remap",
        each(FEWER.classes, "The remap of {} tokens loses rows."),
    )
    yield Dimension(
        "eplb-top-k",
        "top-k of the remap",
        each((1, 2, 3, 4, 6, 8, 9, 16, 32), "The remap of top-{} loses slots."),
    )
    experts = [c for c in kinds.EXPERTS.classes if c != "0"]
    yield Dimension(
        "eplb-logical",
        "logical experts",
        each(experts, "A map of {} logical experts is read beyond."),
    )
    yield Dimension(
        "eplb-physical",
        "physical experts",
        each(experts, "A load of {} physical experts is counted beyond."),
    )
    yield Dimension(
        "eplb-replicas",
        "replicas of an expert that is named",
        each(kinds.REPLICAS.classes, "The choice among {} replicas is wrong."),
    )
    yield Dimension("eplb-ids", "id that the remap is given", kinds.IDS)
    yield Dimension(
        "eplb-record",
        "whether the load is counted",
        each(("on", "off"), "The load is counted where recording is {}, or not."),
    )
    if contract.padding_known.value:
        yield Dimension("eplb-padding", "rows of padding in the remap", kinds.PADDING)
    yield Dimension(
        "eplb-inputs",
        "dtype and strides of the remap's ids",
        {name: fault for name, fault in forms("eplb").items() if name.startswith("topk_ids")},
    )


def others() -> Iterable[Dimension]:
    """Kinds ``layout`` and ``errors``."""
    hidden = {128, 256, 384, 512, *(m.hidden_size for m in MODELS.values())}
    inter = {128, 256, 384, 512, *(m.intermediate_size for m in MODELS.values())}
    yield Dimension(
        "layout-hidden",
        "H of transform_weights",
        each(sorted(hidden), "The layout at H {} is wrong."),
    )
    yield Dimension(
        "layout-intermediate",
        "I of transform_weights",
        each(sorted(inter), "The layout at I {} is wrong."),
    )
    yield Dimension(
        "layout-experts",
        "experts of transform_weights",
        each((1, 2, 3), "The layout of {} experts is wrong."),
    )
    yield Dimension(
        "layout-bytes",
        "scale byte that transform_weights moves",
        each(BYTES, "Scale byte {} is changed on its way."),
    )
    yield Dimension("errors", "wrong call", each(ACTIONS, "The wrong call {} is not refused."))
