"""Every dimension of coverage with its goal.

To add one: a row here, and its classes in :mod:`.values`, :mod:`.places` or :mod:`.kinds`, under
the same name. A goal is what a contract allows (bytes, branches), or named classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Final

from megamoe.coverage import gates, groups, kinds, places
from megamoe.coverage.dimension import Dimension, each
from megamoe.coverage.ranges import CALLS, FEWER, MODEL_TOKENS, ROWS, TILES, TOKENS
from megamoe.kinds.errors import ACTIONS
from megamoe.kinds.property import LAWS
from megamoe.spec.contract import Contract
from megamoe.spec.features import ACTIVATIONS
from megamoe.spec.models import MODELS

CODES: Final = groups.hexes([*range(0x80), *range(0x80, 0xFF)])
"""E4M3 codes that a cast gives: its NaN is 0x7f."""
NIBBLES: Final = [f"{place} 0x{n:x}" for place in ("low", "high") for n in range(16)]
BYTES: Final = groups.hexes(range(256))
ROUNDED: Final = {
    "exact": "A sum that bfloat16 holds is changed.",
    "down": "Sums are rounded away from zero.",
    "up": "Sums are cut off.",
    "tie down": "Ties are rounded away from zero.",
    "tie up": "Ties are rounded toward zero.",
    "to infinity": "A sum beyond bfloat16 becomes the largest number.",
    "to zero": "A sum below half of the least number does not become zero.",
    "subnormal": "Subnormal results are flushed to zero.",
    "NaN": "A NaN is lost.",
}
_HIDDEN: Final = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 2048, 2560)
_INTER: Final = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1792)


@cache
def dimensions(contract: Contract) -> tuple[Dimension, ...]:
    """All of them, in the order of the table."""
    return (*_operands(contract), *_casts(contract), *_between(), *_sizes(), *_calls(contract),
            *_staging(contract), *_eplb(contract), *_others())  # fmt: skip


def by_name(contract: Contract) -> dict[str, Dimension]:
    """The same by name."""
    return {d.name: d for d in dimensions(contract)}


def _operands(contract: Contract) -> Iterable[Dimension]:
    acts = [c for c in CODES if c != "0x80"]  # no output shows the sign of a zero code
    yield Dimension("x-codes", "E4M3 code, operand of linear 1",
                    each(CODES, "Linear 1 decodes E4M3 code {} wrongly."))  # fmt: skip
    yield Dimension("act-codes", "E4M3 code, operand of linear 2",
                    each(acts, "Linear 2 decodes E4M3 code {} wrongly."))  # fmt: skip
    for name, linear in (("w13", 1), ("w2", 2)):
        yield Dimension(f"{name}-nibbles", f"E2M1 code by its place, operand of linear {linear}",
                        each(NIBBLES, f"Linear {linear} decodes the nibble '{{}}' wrongly."))  # fmt: skip  # noqa: E501
        yield Dimension(f"{name}-bytes", f"UE8M0 byte of {name}",
                        each(BYTES, f"Linear {linear} applies scale byte {{}} of {name} wrongly."))  # fmt: skip  # noqa: E501
    x, act = groups.staging_bytes(contract), groups.requant_bytes(contract)
    yield Dimension("x-bytes", "UE8M0 byte of x",
                    each(groups.hexes(x), "Linear 1 applies scale byte {} of x wrongly."))  # fmt: skip
    yield Dimension("act-bytes", "UE8M0 byte of the activations",
                    each(groups.hexes(act), "Linear 2 applies scale byte {} wrongly."))  # fmt: skip
    features = contract.features.value
    if "shared-expert" in features:
        for name in ("w13", "w2"):
            finite = [c for c in CODES if c != "0x7f"]
            yield Dimension(f"shared-{name}-codes", f"E4M3 code of a shared expert's {name}",
                            each(finite, f"The shared expert's {name} decodes {{}} wrongly."))  # fmt: skip  # noqa: E501
            yield Dimension(f"shared-{name}-bytes", f"UE8M0 byte of a shared expert's {name}",
                            each(BYTES, f"A shared {name} applies scale byte {{}} wrongly."))  # fmt: skip  # noqa: E501
    if "nvfp4" in features:
        for name in ("w13", "w2"):
            yield Dimension(f"nvfp4-{name}-nibbles", f"E2M1 code by its place, NVFP4 {name}",
                            each(NIBBLES, f"NVFP4 {name} decodes the nibble '{{}}' wrongly."))  # fmt: skip  # noqa: E501
            yield Dimension(f"nvfp4-{name}-bytes", f"E4M3 scale byte of NVFP4 {name}",
                            each(BYTES[:0x7F], f"NVFP4 {name} applies scale {{}} wrongly."))  # fmt: skip  # noqa: E501


def _casts(contract: Contract) -> Iterable[Dimension]:
    floored = contract.requant_exponent_min.value > 0
    yield Dimension("x-branches", "branch of a staged scale, seen by a forward",
                    groups.branch_goal(True))  # fmt: skip
    yield Dimension("act-branches", "branch of a requantised scale", groups.branch_goal(floored))
    yield Dimension("x-rounding", "rounding of a staged code, seen by a forward",
                    groups.rounding_goal())  # fmt: skip
    yield Dimension("act-rounding", "rounding of a requantised code", groups.rounding_goal())
    yield Dimension("gate-up-rounding", "rounding of linear 1's sums to bfloat16", ROUNDED)
    yield Dimension("row-rounding", "rounding of linear 2's sums to bfloat16", ROUNDED)


def _between() -> Iterable[Dimension]:
    yield Dimension("silu", "region of the clamped gate, fast and precise", {
        f"{mode} {name}": fault for mode in ("fast", "precise")
        for name, fault in gates.REGIONS.items()
    })  # fmt: skip
    yield Dimension("clamp", "side of the clamp", gates.CLAMPS)
    yield Dimension("weights", "finite routing weight", {
        "below 0": "The sign of a routing weight is lost.",
        "above 0": "Routing weights are ignored.",
        "1": "A weight of 1 takes a way of its own.",
        "above 1": "Routing weights are bounded by 1.",
        "below 2^-24": "A tiny routing weight is taken for zero.",
    })  # fmt: skip
    stages = ("hidden", "gate", "up", "gated", "activation", "slot row", "y", "routing weight")
    never = {"gated -inf"}  # silu of minus infinity is NaN
    yield Dimension("specials", "special number by stage", {
        **each((f"{s} {n}" for s in stages for n in gates.SPECIALS if f"{s} {n}" not in never),
               "The stage treats '{}' as another number, or flushes it."),
        **each((f"masked weight {n}" for n in ("+inf", "-inf", "NaN")),
               "A {} that takes no part reaches the output."),
    })  # fmt: skip


def _sizes() -> Iterable[Dimension]:
    models = MODELS.values()
    yield Dimension("tokens", "tokens of a call",
                    each(TOKENS.classes, "A call of {} tokens loses or repeats rows."))  # fmt: skip
    yield Dimension("model-tokens", "tokens of a call at a model's H, I and top-k",
                    each((f"{m.name} {n}" for m in models for n in MODEL_TOKENS.classes),
                         "The path that a kernel takes for {} tokens is wrong."))  # fmt: skip
    yield Dimension("rows-per-expert", "rows of an expert",
                    each(ROWS.classes, "An expert with {} rows loses or repeats one."))  # fmt: skip
    yield Dimension("tiles", "place of a judged row in tiles of its expert", {
        f"{tile}: {place}": fault for tile in TILES for place, fault in places.TILE_PLACES.items()
    })  # fmt: skip
    experts = {1, 2, 3, 4, 5, 8, 16, 64, *(m.local_experts(n) for m in models for n in (1, 8))}
    yield Dimension("experts", "local experts",
                    each(sorted(experts), "A bound of {} experts is wrong."))  # fmt: skip
    yield Dimension("top-k", "slots of a token",
                    each((*range(1, 17), 32), "Top-{} is mishandled."))  # fmt: skip
    yield Dimension("live-slots", "slots of a judged token that take part",
                    each((*range(17), 32), "A token with {} live slots is summed wrongly."))  # fmt: skip
    hidden = {*_HIDDEN, *(m.hidden_size for m in models), 8192, 16384}
    inter = {*_INTER, *(m.intermediate_size for m in models), 4096}
    yield Dimension("hidden", "hidden size H",
                    each(sorted(hidden), "Tiles of H do not fit {}."))  # fmt: skip
    yield Dimension("intermediate", "intermediate size I",
                    each(sorted(inter), "Tiles of I do not fit {}."))  # fmt: skip
    yield Dimension("shapes", "H, I and top-k together",
                    each(dict.fromkeys(f"H {m.hidden_size} I {m.intermediate_size} top-{m.top_k}"
                                       for m in models), "The configuration of {} is wrong."))  # fmt: skip  # noqa: E501
    yield Dimension("offsets", "how far a judged row reaches into a tensor", {
        name: fault for tensor, size in places.OFFSET_TENSORS.items()
        for unit in ("bytes", *(("elements",) if size > 1 else ()))
        for n in places.POWERS
        for name, fault in (
            (f"{tensor} {unit} beyond 2^{n}", f"An offset into {tensor} has {n} bits."),
        )
    })  # fmt: skip


def _calls(contract: Contract) -> Iterable[Dimension]:
    yield Dimension("capacity", "capacity of the buffer against tokens", places.CAPACITIES)
    yield Dimension("routing", "pattern of the ids", places.ROUTES)
    yield Dimension("inputs", "dtype and strides of a forward's inputs", _forms("forward"))
    yield Dimension("features", "what a call asks besides",
                    each(("none", *contract.features.value), "Feature {} is wrong."))  # fmt: skip
    known = [a for a in ACTIVATIONS if a == "swiglu" or a in contract.features.value]
    yield Dimension("activations", "activation and mode",
                    each((f"{a} {m}" for a in known for m in ("fast", "precise")),
                         "{} takes the other mode's instructions."))  # fmt: skip
    yield Dimension("calls", "calls on one buffer", {
        **each((c for c in CALLS.classes if c != "0"), "Call number {} finds old state."),
        "exactly full more than once": "A full buffer keeps a row of the call before.",
        "other weights of the same shapes": "Weights are kept in a cache by their shape.",
        **{f"law {law}": f"The law {law} does not hold." for law in LAWS},
    })  # fmt: skip


def _staging(contract: Contract) -> Iterable[Dimension]:
    bytes_ = groups.hexes(groups.staging_bytes(contract))
    yield Dimension("staging-codes", "E4M3 code that prepare writes",
                    each(CODES, "Staging never gives code {}."))  # fmt: skip
    yield Dimension("staging-bytes", "UE8M0 byte that prepare writes",
                    each(bytes_, "Staging never gives scale byte {}."))  # fmt: skip
    yield Dimension("staging-branches", "branch of a scale in prepare", groups.branch_goal(True))
    yield Dimension("staging-rounding", "rounding of a code in prepare", groups.rounding_goal())
    yield Dimension("staging-specials", "special number that prepare is given",
                    each((f"{s} {n}" for s in ("hidden", "weight") for n in gates.SPECIALS),
                         "Staging changes '{}'."))  # fmt: skip
    yield Dimension("staging-tokens", "tokens of prepare",
                    each(FEWER.classes, "Staging of {} tokens loses rows."))  # fmt: skip
    hidden = {128, 256, 384, 512, 1024, 2048, *(m.hidden_size for m in MODELS.values())}
    yield Dimension("staging-hidden", "H of prepare",
                    each(sorted(hidden), "Staging of H {} loses channels."))  # fmt: skip
    yield Dimension("staging-top-k", "top-k of prepare",
                    each((1, 2, 3, 4, 6, 7, 8, 9, 16, 32), "Staging of top-{} loses slots."))  # fmt: skip
    yield Dimension("staging-ids", "id that prepare copies", {
        "-1": "A masked slot is changed.",
        "below -1": "A negative id is changed.",
        "above 2^31": "Ids are cut to 32 bits.",
    })  # fmt: skip
    yield Dimension("staging-capacity", "capacity against tokens in prepare", {
        "exactly full": "The last row of a full buffer is lost.",
        "free rows": "Rows beyond the batch are written.",
    })  # fmt: skip
    if contract.padding_known.value:
        yield Dimension("staging-padding", "rows of padding in prepare", kinds.PADDING)
    yield Dimension("staging-inputs", "dtype and strides of prepare's inputs", _forms("prepare"))


def _eplb(contract: Contract) -> Iterable[Dimension]:
    yield Dimension("eplb-tokens", "tokens of the remap",
                    each(FEWER.classes, "The remap of {} tokens loses rows."))  # fmt: skip
    yield Dimension("eplb-top-k", "top-k of the remap",
                    each((1, 2, 3, 4, 6, 8, 9, 16, 32), "The remap of top-{} loses slots."))  # fmt: skip
    experts = [c for c in kinds.EXPERTS.classes if c != "0"]
    yield Dimension("eplb-logical", "logical experts",
                    each(experts, "A map of {} logical experts is read beyond."))  # fmt: skip
    yield Dimension("eplb-physical", "physical experts",
                    each(experts, "A load of {} physical experts is counted beyond."))  # fmt: skip
    yield Dimension("eplb-replicas", "replicas of an expert that is named",
                    each(kinds.REPLICAS.classes, "The choice among {} replicas is wrong."))  # fmt: skip
    yield Dimension("eplb-ids", "id that the remap is given", kinds.IDS)
    yield Dimension("eplb-record", "whether the load is counted",
                    each(("on", "off"), "The load is counted where recording is {}, or not."))  # fmt: skip
    if contract.padding_known.value:
        yield Dimension("eplb-padding", "rows of padding in the remap", kinds.PADDING)
    yield Dimension("eplb-inputs", "dtype and strides of the remap's ids", {
        name: fault for name, fault in _forms("eplb").items() if name.startswith("topk_ids")
    })  # fmt: skip


def _forms(what: str) -> dict[str, str]:
    """Dtypes and strides that an engine's tensors have."""
    ids = each(("topk_ids int64", "topk_ids int32"), f"{what} reads '{{}}' by the wrong width.")
    weights = [f"topk_weights {d}" for d in ("float32", "bfloat16", "float16", "float64")]
    strided = [f"{n} strided" for n in ("hidden_states", "topk_ids", "topk_weights")]
    return {
        **ids, "hidden_states bfloat16": f"{what} reads hidden states as another type.",
        **each(weights, f"{what} reads '{{}}' as another type."),
        **each(strided, f"{what} reads '{{}}' as contiguous."),
    }  # fmt: skip


def _others() -> Iterable[Dimension]:
    hidden = {128, 256, 384, 512, *(m.hidden_size for m in MODELS.values())}
    inter = {128, 256, 384, 512, *(m.intermediate_size for m in MODELS.values())}
    yield Dimension("layout-hidden", "H of transform_weights",
                    each(sorted(hidden), "The layout at H {} is wrong."))  # fmt: skip
    yield Dimension("layout-intermediate", "I of transform_weights",
                    each(sorted(inter), "The layout at I {} is wrong."))  # fmt: skip
    yield Dimension("layout-experts", "experts of transform_weights",
                    each((1, 2, 3), "The layout of {} experts is wrong."))  # fmt: skip
    yield Dimension("layout-bytes", "scale byte that transform_weights moves",
                    each(BYTES, "Scale byte {} is changed on its way."))  # fmt: skip
    yield Dimension("errors", "wrong call", each(ACTIONS, "The wrong call {} is not refused."))
