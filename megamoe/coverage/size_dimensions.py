"""Dimensions of the place of a forward's work: :mod:`.places` computes the classes of a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from megamoe.cases.forms import LAWS
from megamoe.coverage import places
from megamoe.coverage.dimension import Dimension, each
from megamoe.coverage.ranges import CALLS, MODEL_TOKENS, ROWS, TILES, TOKENS
from megamoe.spec.contract import Contract
from megamoe.spec.features import ACTIVATIONS
from megamoe.spec.models import MODELS

_HIDDEN: Final = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 2048, 2560)
_INTER: Final = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1792)


def sizes() -> Iterable[Dimension]:
    """Sizes, rows and offsets."""
    models = MODELS.values()
    yield Dimension(
        "tokens",
        "tokens of a call",
        each(TOKENS.classes, "A call of {} tokens loses or repeats rows."),
    )
    yield Dimension(
        "model-tokens",
        "tokens of a call at a model's H, I and top-k",
        each(
            (f"{m.name} {n}" for m in models for n in MODEL_TOKENS.classes),
            "The path that a kernel takes for {} tokens is wrong.",
        ),
    )
    yield Dimension(
        "rows-per-expert",
        "rows of an expert",
        each(ROWS.classes, "An expert with {} rows loses or repeats one."),
    )
    yield Dimension(
        "tiles",
        "place of a judged row in tiles of its expert",
        {
            f"{tile}: {place}": fault
            for tile in TILES
            for place, fault in places.TILE_PLACES.items()
        },
    )
    experts = {1, 2, 3, 4, 5, 8, 16, 64, *(m.local_experts(n) for m in models for n in (1, 8))}
    yield Dimension(
        "experts", "local experts", each(sorted(experts), "A bound of {} experts is wrong.")
    )
    yield Dimension("top-k", "slots of a token", each((*range(1, 17), 32), "Top-{} is mishandled."))
    yield Dimension(
        "live-slots",
        "slots of a judged token that take part",
        each((*range(17), 32), "A token with {} live slots is summed wrongly."),
    )
    hidden = {*_HIDDEN, *(m.hidden_size for m in models), 8192, 16384}
    inter = {*_INTER, *(m.intermediate_size for m in models), 4096}
    yield Dimension("hidden", "hidden size H", each(sorted(hidden), "Tiles of H do not fit {}."))
    yield Dimension(
        "intermediate", "intermediate size I", each(sorted(inter), "Tiles of I do not fit {}.")
    )
    yield Dimension(
        "shapes",
        "H, I and top-k together",
        each(
            dict.fromkeys(
                f"H {m.hidden_size} I {m.intermediate_size} top-{m.top_k}" for m in models
            ),
            "The configuration of {} is wrong.",
        ),
    )
    yield Dimension(
        "offsets",
        "how far a judged row reaches into a tensor",
        {
            name: fault
            for tensor, size in places.OFFSET_TENSORS.items()
            for unit in ("bytes", *(("elements",) if size > 1 else ()))
            for n in places.POWERS
            for name, fault in (
                (f"{tensor} {unit} beyond 2^{n}", f"An offset into {tensor} has {n} bits."),
            )
        },
    )


def calls(contract: Contract) -> Iterable[Dimension]:
    """Buffers, ids, inputs, and how often is called."""
    yield Dimension("capacity", "capacity of the buffer against tokens", places.CAPACITIES)
    yield Dimension("routing", "pattern of the ids", places.ROUTES)
    yield Dimension("inputs", "dtype and strides of a forward's inputs", forms("forward"))
    yield Dimension(
        "features",
        "what a call asks besides",
        each(("none", *contract.features.value), "Feature {} is wrong."),
    )
    activations = [a for a in ACTIVATIONS if a == "swiglu" or a in contract.features.value]
    yield Dimension(
        "activations",
        "activation and mode",
        each(
            (f"{a} {m}" for a in activations for m in ("fast", "precise")),
            "{} takes the other mode's instructions.",
        ),
    )
    yield Dimension(
        "calls",
        "calls on one buffer",
        {
            **each((c for c in CALLS.classes if c != "0"), "Call number {} finds old state."),
            "exactly full more than once": "A full buffer keeps a row of the call before.",
            "other weights of the same shapes": "Weights are kept in a cache by their shape.",
            **{f"law {law}": f"The law {law} does not hold." for law in LAWS},
        },
    )


def forms(what: str) -> dict[str, str]:
    """Dtypes and strides that an engine's tensors have."""
    ids = each(("topk_ids int64", "topk_ids int32"), f"{what} reads '{{}}' by the wrong width.")
    weights = [f"topk_weights {d}" for d in ("float32", "bfloat16", "float16", "float64")]
    strides = [f"{n} strided" for n in ("hidden_states", "topk_ids", "topk_weights")]
    return {
        **ids,
        "hidden_states bfloat16": f"{what} reads hidden states as another type.",
        **each(weights, f"{what} reads '{{}}' as another type."),
        **each(strides, f"{what} reads '{{}}' as contiguous."),
    }
