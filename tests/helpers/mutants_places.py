# ruff: noqa: E501
"""Planted faults of places: order, index, size, mask, map, layout, and what is refused."""

from __future__ import annotations

from tests.helpers.mutants import Mutant

_one = Mutant.of

# --- what is replaced ---------------------------------------------------------------------------

_Y = "    y = acc.to(torch.bfloat16)"
_ROWS = "    rows = torch.where(live[:, :, None], slots.float(), 0.0)\n"
_LOOP = "for row, weight, takes_part in rows:"
_ROUTED = "token, slot = (ids == expert).nonzero(as_tuple=True)"
_WEIGHT = "routing = problem.topk_weights[token, slot].unsqueeze(-1)"
_SLOT = "slots[token, slot] = down.to(torch.bfloat16)"
_W13 = "problem.w13_weight[expert],"
_W2 = "problem.w2_weight[expert], "
_X = "x[token],"
_SF = "sf_bytes[token],"
_LIVE = "live = (problem.topk_ids >= 0) & (problem.topk_ids < problem.num_experts)"
_REQUANT_AMAX = "exponent = requant_exponent(group_amax(groups, contract), contract)"
_STAGE_AMAX = "amax = group_amax(groups, contract).clamp_min(contract.staging_amax_floor.value)"
_SUM = "        for term in"
_RETURN = '        return {"y": y, "x": x'

_ANY = "forward/*"
_ANY_STAGING = "staging/*"
_ANY_EPLB = "eplb/*"
_ANY_LAYOUT = "layout/*"


def _order(name: str, sums: str, case: str) -> Mutant:
    """``sums``: lines that make ``acc`` (T, H) of ``rows`` (T, K, H), zeros in masked slots."""
    body = "".join(f"    {line}\n" for line in sums.split("\n"))
    return _one(name, "eager_combine", _Y, _ROWS + body + _Y, case)


COMBINE = [
    _order("combine-in-groups-of-four", "acc = 0.0\nfor part in rows.split(4, 1):\n    inner = 0.0\n    for k in range(part.shape[1]): inner = inner + part[:, k]\n    acc = acc + inner", "forward/combine-of-16-slots-in-another-order"),
    _order("combine-in-groups-of-eight", "acc = 0.0\nfor part in rows.split(8, 1):\n    inner = 0.0\n    for k in range(part.shape[1]): inner = inner + part[:, k]\n    acc = acc + inner", "forward/combine-of-16-slots-in-another-order"),
    _order("combine-as-a-tree-of-sixteen", "parts = list(rows.unbind(1)) + [torch.zeros_like(acc)] * (-rows.shape[1] % 16)\nif rows.shape[1] > 8:\n    while len(parts) > 1: parts = [a + b for a, b in zip(parts[::2], parts[1::2])]\n    acc = parts[0]", "forward/combine-of-16-slots-in-another-order"),
    _order("combine-reversed-beyond-eight-slots", "acc = 0.0\nfor k in [*range(min(8, rows.shape[1])), *reversed(range(8, rows.shape[1]))]: acc = acc + rows[:, k]", "forward/combine-of-16-slots-in-another-order"),
    _order("combine-takes-every-eighth-slot", "acc = 0.0\nfor k in sorted(range(rows.shape[1]), key=lambda k: (k % 8, k)): acc = acc + rows[:, k]", "forward/combine-of-16-slots-in-another-order"),
    _order("combine-starts-with-the-last-slot", "acc = rows[:, -1]\nfor k in range(rows.shape[1] - 1): acc = acc + rows[:, k]", "forward/combine-of-16-slots-in-another-order"),
    _order("combine-compensates-its-rounding", "acc, lost = 0.0 * acc, 0.0 * acc\nfor k in range(rows.shape[1]):\n    term = rows[:, k] - lost\n    total = acc + term\n    acc, lost = total, (total - acc) - term", "forward/combine-of-16-slots-in-another-order"),
    _order("combine-keeps-eleven-bits", "acc = acc * 0\nfor k in range(rows.shape[1]): acc = ((acc + rows[:, k]).view(torch.int32) & -4096).view(torch.float32)", "forward/combine-of-16-slots-in-another-order"),
    _one("combine-forgets-slots-beyond-a-multiple-of-four", "eager_combine", _LOOP, "for row, weight, takes_part in rows[: len(rows) // 4 * 4 if len(rows) > 4 else None]:", "forward/combine-of-7-slots-in-another-order"),
    _one("combine-forgets-slots-beyond-a-multiple-of-eight", "eager_combine", _LOOP, "for row, weight, takes_part in rows[: len(rows) // 8 * 8 if len(rows) > 8 else None]:", "forward/combine-of-9-slots-in-another-order"),
    _one("combine-takes-one-slot-twice-where-top-k-is-odd", "eager_combine", _LOOP, "for row, weight, takes_part in rows + rows[-1:] * (len(rows) % 2 and len(rows) > 3):", "forward/combine-of-7-slots-in-another-order"),
    _one("combine-counts-slots-and-not-places", "eager_combine", "live[:, k, None])", "(torch.arange(live.shape[1], device=live.device) < live.sum(1, keepdim=True))[:, k, None])", "forward/combine-adds-masked-rows"),
    _one("mask-of-the-neighbour-slot", "eager_combine", "live[:, k, None])", "live[:, k - 1, None])", "forward/combine-adds-masked-rows"),
    _one("mask-of-the-neighbour-token", "eager_combine", "live[:, k, None])", "live.roll(1, 0)[:, k, None])", "forward/combine-adds-masked-rows"),
]  # fmt: skip


def _when(name: str, size: str, case: str) -> Mutant:
    """The last channel of the last token is wrong where ``size`` is true of the problem."""
    fault = f"        if {size}:\n            y[-1:, -1:] = -2 * y[-1:, -1:] - 1\n"
    return _one(name, "eager", _RETURN, f"{fault}{_RETURN}", case)


_FEW = "forward/capacity-{}-not-a-multiple-of-384".format
SIZES = [
    _when("wrong-at-top-3", "problem.top_k == 3", "forward/combine-reversed-cancelling-pair"),
    *(_when(f"wrong-at-top-{k}", f"problem.top_k == {k}", f"forward/combine-of-{k}-slots-in-another-order") for k in (5, 7, 9, 10, 11, 13, 15, 16)),
    *(_when(f"wrong-where-an-expert-has-{n}-rows", f"{n} in problem.topk_ids[problem.topk_ids >= 0].bincount().tolist()", f"forward/expert-block-edge-t{n}") for n in (1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513)),
    _when("wrong-at-a-capacity-below-384", "problem.max_num_tokens < 384", _FEW(100)),
    _when("wrong-at-a-capacity-of-an-odd-number", "problem.max_num_tokens % 2", _FEW(385)),
    _when("wrong-at-a-capacity-of-128", "problem.max_num_tokens == 128", _FEW(128)),
    _when("wrong-at-a-full-buffer-below-384", "problem.num_tokens == problem.max_num_tokens < 384", _FEW(5)),
    _when("wrong-one-token-below-full", "problem.num_tokens + 1 == problem.max_num_tokens", _FEW(6)),
    _when("wrong-where-no-expert-is-unused", "problem.topk_ids.unique().numel() == problem.num_experts", _FEW(5)),
    _when("wrong-where-the-batch-is-odd-and-above-8", "problem.num_tokens % 2 and problem.num_tokens > 8", "forward/expert-block-edge-t9"),
]  # fmt: skip

INDEX = [
    _one("last-row-of-an-odd-expert-lost", "eager", _ROUTED, _ROUTED + "\n            if len(token) % 2 and len(token) > 1: token, slot = token[:-1], slot[:-1]", "forward/expert-block-edge-t9"),
    _one("row-15-of-an-expert-reads-row-14", "eager", _X, "x[token[[*range(15), 14, *range(16, len(token))]] if len(token) > 15 else token],", "forward/one-corrupt-row-of-a-tile-t24"),
    _one("row-16-of-an-expert-reads-row-0", "eager", _X, "x[token[[*range(16), 0, *range(17, len(token))]] if len(token) > 16 else token],", "forward/expert-block-edge-t17"),
    _one("row-127-of-an-expert-lost", "eager", _SLOT, _SLOT + "\n            slots[token[127:128], slot[127:128]] = 0", "forward/expert-block-edge-t128"),
    _one("slots-of-weight-0-left-out", "eager", _WEIGHT, "keep = problem.topk_weights[token, slot] != 0\n            token, slot, gate_up = token[keep], slot[keep], gate_up[keep]\n            " + _WEIGHT, "forward/zero-routing-weight-hides-nan"),
    _one("row-128-of-an-expert-lost", "eager", _SLOT, _SLOT + "\n            slots[token[128:129], slot[128:129]] = 0", "forward/expert-block-edge-t129"),
    _one("scales-of-the-row-before-from-row-64-on", "eager", _SF, "sf_bytes[torch.cat([token[:64], token[63:-1]]) if len(token) > 64 else token],", "forward/expert-block-edge-t95"),
    _one("token-index-of-7-bits", "eager", _X, "x[token & 127],", "forward/expert-block-edge-t129"),
    _one("token-index-of-8-bits-for-scales", "eager", _SF, "sf_bytes[token & 255],", "forward/token-block-edge-t383"),
    _one("slot-index-of-3-bits-for-weights", "eager", _WEIGHT, "routing = problem.topk_weights[token, slot & 7].unsqueeze(-1)", "forward/combine-of-9-slots-in-another-order"),
    _one("weight-of-the-next-token-at-slot-0", "eager", _WEIGHT, "routing = problem.topk_weights[torch.where(slot == 0, (token + 1) % len(x), token), slot].unsqueeze(-1)", "forward/weight-folded-after-amax-t6"),
    _one("weights-read-with-stride-of-8", "eager", _WEIGHT, "flat = problem.topk_weights.flatten()\n            routing = flat[(token * max(8, problem.top_k) + slot) % len(flat)].unsqueeze(-1)", "forward/weight-folded-after-amax-t6"),
    _one("weights-read-transposed", "eager", _WEIGHT, "routing = problem.topk_weights.t().reshape(problem.topk_weights.shape)[token, slot].unsqueeze(-1)", "forward/weight-folded-after-amax-t6"),
    _one("expert-index-of-5-bits", "eager", _W13, "problem.w13_weight[expert & 31],", "forward/experts-48-lost"),
    _one("expert-index-of-6-bits-for-w2", "eager", _W2, "problem.w2_weight[expert & 63], ", "forward/experts-112-lost"),
    _one("expert-index-of-8-bits-for-scales", "eager", "problem.w13_weight_scale[expert],", "problem.w13_weight_scale[expert & 255],", "forward/experts-896-lost-top-1"),
    _one("expert-index-modulo-experts-less-one", "eager", _W13, "problem.w13_weight[expert % max(problem.num_experts - 1, 1)],", "forward/last-expert-skipped"),
    _one("expert-of-the-neighbour-from-33-on", "eager", _W13, "problem.w13_weight[expert - (expert > 32)],", "forward/experts-48-lost"),
    _one("group-index-of-2-bits-for-hidden-scales", "eager", "x_scale = _ue8m0_values(sf).t()", "x_scale = _ue8m0_values(sf[:, torch.arange(sf.shape[1]) & 3]).t()", "forward/token-block-edge-t7"),
    _one("group-index-of-4-bits-for-weight-scales", "eager", "w_scale = _ue8m0_values(weight_sf).t()", "w_scale = _ue8m0_values(weight_sf[:, torch.arange(weight_sf.shape[1]) & 15]).t()", "forward/shape-h2048-long-k"),
    _one("last-group-takes-the-scale-before", "eager", "w_scale = _ue8m0_values(weight_sf).t()", "w_scale = _ue8m0_values(weight_sf[:, [*range(weight_sf.shape[1] - 1), -2]]).t()", "forward/scale-of-weights-one-group-off"),
    _one("last-row-of-weights-takes-the-scale-before", "eager", "w_scale = _ue8m0_values(weight_sf).t()", "w_scale = _ue8m0_values(weight_sf[[*range(weight_sf.shape[0] - 1), -2]]).t()", "forward/scale-of-weights-one-group-off"),
    _one("gate-and-up-scales-swapped", "eager", "problem.w13_weight_scale[expert],", "problem.w13_weight_scale[expert].roll(problem.intermediate_size, 0),", "forward/scale-of-weights-one-group-off"),
    _one("scales-of-up-read-from-the-gate", "eager", "problem.w13_weight_scale[expert],", "problem.w13_weight_scale[expert][: problem.intermediate_size].repeat(2, 1),", "forward/scale-of-weights-one-group-off"),
    _one("third-block-of-128-read-twice", "eager", "large = x.abs()", "x = torch.cat([x[:, :256], x[:, 128:256], x[:, 384:]], 1) if depth >= 384 else x\n    large = x.abs()", "forward/shape-h384-i128-mistiled"),
    _one("last-channel-of-k-lost", "eager", "large = x.abs()", "x = x.clone()\n    x[:, -1] = 0\n    large = x.abs()", "forward/masked-slots-bell"),
    _one("last-column-of-y-not-written", "eager", _SLOT, "down[:, -1] = 0\n            " + _SLOT, "forward/masked-slots-bell"),
    _one("column-127-of-y-of-column-126", "eager", _SLOT, "down[:, 127] = down[:, 126]\n            " + _SLOT, "forward/masked-slots-bell"),
    _one("amax-over-the-token", "eager", _REQUANT_AMAX, "exponent = requant_exponent(group_amax(groups, contract).amax(-1, keepdim=True).expand(groups.shape[:-1]).contiguous(), contract)", "forward/ties-of-activations-not-to-even"),
    _one("amax-over-rows-of-a-pair", "eager", _REQUANT_AMAX, "pair = group_amax(groups, contract)\n    pair = torch.maximum(pair, torch.cat([pair[1:], pair[:1]])) if len(pair) > 1 else pair\n    exponent = requant_exponent(pair, contract)", "forward/weight-folded-after-amax-t6"),
    _one("amax-with-stride-of-groups", "eager", _REQUANT_AMAX, "strided = values.unflatten(-1, (GROUP, -1)).transpose(-1, -2)\n    exponent = requant_exponent(group_amax(strided, contract), contract)", "forward/ties-of-activations-not-to-even"),
    _one("amax-misses-the-last-member", "eager", _REQUANT_AMAX, "exponent = requant_exponent(group_amax(groups[..., :-1], contract), contract)", "forward/masked-slots-bell"),
    _one("amax-misses-the-first-member", "eager", _REQUANT_AMAX, "exponent = requant_exponent(group_amax(groups[..., 1:], contract), contract)", "forward/ties-of-activations-not-to-even"),
    _one("amax-over-16", "eager", _REQUANT_AMAX, "exponent = requant_exponent(group_amax(groups[..., :16], contract), contract)", "forward/weight-folded-after-amax-t6"),
    _one("staging-amax-misses-the-last-member", "staging", _STAGE_AMAX, _STAGE_AMAX.replace("group_amax(groups,", "group_amax(groups[..., :-1],"), "staging/scale-words-mispacked-h384"),
    _one("staging-amax-over-16", "staging", _STAGE_AMAX, _STAGE_AMAX.replace("group_amax(groups,", "group_amax(groups[..., 16:],"), "staging/scale-words-mispacked-h384"),
    _one("staging-amax-over-64", "staging", _STAGE_AMAX, _STAGE_AMAX + "\n    amax = amax.unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)", "staging/scale-words-mispacked-h384"),
    _one("staging-amax-over-128", "staging", _STAGE_AMAX, _STAGE_AMAX + "\n    amax = amax.unflatten(-1, (-1, 4)).amax(-1).repeat_interleave(4, -1)", "staging/scale-words-mispacked-h384"),
    _one("staging-amax-over-tokens", "staging", _STAGE_AMAX, _STAGE_AMAX + "\n    amax = amax.amax(0, keepdim=True).expand_as(amax)", "staging/scale-words-mispacked-h384"),
    _one("staging-amax-with-stride-of-groups", "staging", _STAGE_AMAX, "amax = group_amax(hidden_states.float().unflatten(-1, (GROUP, -1)).transpose(-1, -2), contract).clamp_min(contract.staging_amax_floor.value)", "staging/scale-words-mispacked-h384"),
    _one("staging-halves-of-a-word-swapped", "staging", "return bytes_.view(torch.int32)", "return bytes_.view(torch.int16).unflatten(-1, (-1, 2)).flip(-1).flatten(-2).contiguous().view(torch.int32)", "staging/scale-words-mispacked-h384"),
    _one("staging-words-of-the-row-before", "staging", "x_sf[:tokens].copy_(pack_sf(exponent))", "x_sf[:tokens].copy_(pack_sf(exponent).roll(1, 0))", "staging/scale-words-mispacked-h384"),
    _one("staging-ids-through-int32", "staging", "topk_idx_out[:tokens].copy_(topk_ids)", "topk_idx_out[:tokens].copy_(topk_ids.to(torch.int16))", "staging/ids-out-of-range-changed"),
    _one("staging-ids-unsigned", "staging", "topk_idx_out[:tokens].copy_(topk_ids)", "topk_idx_out[:tokens].copy_(topk_ids.long() & 0xFFFFFFFF)", "staging/ids-out-of-range-changed"),
    _one("staging-weights-normalised", "staging", "topk_weights_out[:tokens].copy_(topk_weights)", "topk_weights_out[:tokens].copy_(topk_weights / topk_weights.sum(-1, keepdim=True).clamp_min(1e-20))", "staging/weights-not-copied-bit-for-bit"),
    _one("staging-weights-flushed", "staging", "topk_weights_out[:tokens].copy_(topk_weights)", "topk_weights_out[:tokens].copy_(torch.where(topk_weights.abs() < 2.0**-126, 0.0, topk_weights))", "staging/weights-not-copied-bit-for-bit"),
    _one("staging-weights-not-finite-become-zero", "staging", "topk_weights_out[:tokens].copy_(topk_weights)", "topk_weights_out[:tokens].copy_(topk_weights.nan_to_num(0.0, 0.0, 0.0))", "staging/weights-not-finite-changed"),
    _one("staging-of-last-slot-lost", "staging", "topk_weights_out[:tokens].copy_(topk_weights)", "topk_weights_out[:tokens, : max(topk_ids.shape[1] - 1, 1)].copy_(topk_weights[:, : max(topk_ids.shape[1] - 1, 1)])", "staging/weights-not-copied-bit-for-bit"),
]  # fmt: skip

_SORTED = "order = problem.topk_ids.flatten().argsort(stable=True)\n            place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))\n            "
_PADDED = (
    _SORTED
    + "count = problem.topk_ids.flatten().bincount()\n            gap = (-count % 64).cumsum(0) - -count % 64\n            place = (place + gap[problem.topk_ids.flatten()]).clamp_max(len(order) - 1)\n            "
)
_AT = "routing = problem.topk_weights.flatten()[{}[token * problem.topk_ids.shape[1] + slot]].unsqueeze(-1)"
GROUPED = [
    _one("weight-at-the-place-after-the-sort", "eager", _WEIGHT, _SORTED + _AT.format("place"), "forward/bell-h256-i128-drifts"),
    _one("weight-at-the-place-in-tiles-of-64", "eager", _WEIGHT, _PADDED + _AT.format("place"), "forward/token-block-edge-t31"),
    _one("weight-in-order-by-expert-read-by-slot", "eager", _WEIGHT, _SORTED + _AT.format("order"), "forward/bell-h256-i128-drifts"),
]  # fmt: skip

_SF13 = "problem.w13_weight_scale[expert],"
_DOWN = "down = linear(codes, sf, "
STALE = [
    _one("scales-of-up-of-stage-0-are-two-blocks-old", "eager", _SF13, "torch.cat([problem.w13_weight_scale[expert, : problem.intermediate_size], problem.w13_weight_scale[expert, problem.intermediate_size :][:, [g - 8 * (g // 4 >= 2 and g // 4 % 2 == 0) for g in range(problem.hidden_size // 32)]]]),", "forward/bell-h768-i128-drifts"),
    _one("hidden-scales-of-the-block-before", "eager", _SF, "sf_bytes[token][:, [max(g - 4, g % 4) for g in range(problem.hidden_size // 32)]],", "forward/bell-h768-i128-drifts"),
    _one("last-row-of-16-takes-the-scales-of-the-row-before", "eager", _DOWN, "sf = sf.clone()\n            sf[15::16] = sf[14::16][: len(sf[15::16])]\n            " + _DOWN, "forward/one-corrupt-row-of-a-tile-t24"),
    _one("scales-of-w2-start-again-at-row-256", "eager", "problem.w2_weight_scale[expert])", "problem.w2_weight_scale[expert][torch.arange(problem.hidden_size) % 256])", "forward/bell-h768-i128-drifts"),
]  # fmt: skip

MASKS = [
    Mutant("masked-slot-computed-with-weight-0", "forward/masked-slot-weight-not-finite", [("eager", "ids = problem.topk_ids\n    for", "ids = problem.topk_ids.clamp_min(0)\n    for"), ("eager", _WEIGHT, "routing = (problem.topk_weights * (problem.topk_ids >= 0))[token, slot].unsqueeze(-1)"), ("eager", _LIVE, "live = problem.topk_ids >= -1")]),
    Mutant("masked-slot-computed-and-multiplied-by-0", "forward/masked-slot-weight-not-finite", [("eager", "ids = problem.topk_ids\n    for", "ids = problem.topk_ids.clamp_min(0)\n    for"), ("eager_combine", "acc + row  #", "acc + row.float() * takes_part  #"), ("eager_combine", "acc = torch.where(takes_part, total, acc)", "acc = total")]),
    _one("token-with-a-masked-slot-is-zero", "eager", _LIVE, _LIVE + "\n        live &= live.all(1, keepdim=True)", "forward/masked-slot-weight-not-finite"),
    _one("first-slot-masked-loses-the-token", "eager", _LIVE, _LIVE + "\n        live &= live[:, :1]", "forward/masked-slot-weight-not-finite"),
    _one("last-slot-masked-loses-the-token", "eager", _LIVE, _LIVE + "\n        live &= live[:, -1:]", "forward/masked-slot-weight-not-finite"),
    _one("masked-slots-shift-the-weights", "eager", _WEIGHT, "order = (problem.topk_ids < 0).long().argsort(dim=1, stable=True)\n            routing = problem.topk_weights.gather(1, order)[token, slot].unsqueeze(-1)", "forward/masked-slots-bell"),
]  # fmt: skip

_ROW = "row = torch.arange(topk_ids.shape[0], device=device).unsqueeze(-1)"
_PLACE = "place = (row * contract.replica_hash.value) & 0xFFFFFFFF"
_REPLICA = "replica = place % logical_replica_count[logical].long().clamp_min(1)"
_PHYSICAL = "physical = torch.where(valid, logical_to_physical_map[logical, replica].long(), -1)"
_COUNT_MASK = "in_load = (physical >= 0) & (physical < expert_load_view.shape[0])"
_ADD = "    expert_load_view.index_add_("
_VALID = "valid = (logical >= 0) & (logical < logical_to_physical_map.shape[0])"
EPLB = [
    _one("eplb-hash-of-row-and-slot", "eplb", _PLACE, "place = ((row + torch.arange(topk_ids.shape[1], device=device)) * contract.replica_hash.value) & 0xFFFFFFFF", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-row-itself-in-place-of-the-hash", "eplb", _PLACE, "place = row", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-high-half-of-the-hash", "eplb", _PLACE, "place = ((row * contract.replica_hash.value) & 0xFFFFFFFF) >> 16", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-signed-hash", "eplb", _PLACE, "place = (row * contract.replica_hash.value).to(torch.int32).long().abs()", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-replica-by-mask", "eplb", _REPLICA, "replica = place & (logical_replica_count[logical].long().clamp_min(1) - 1)", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-width-of-the-map-for-the-count", "eplb", _REPLICA, "replica = place % logical_to_physical_map.shape[1] + 0 * logical", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-count-of-the-neighbour", "eplb", _REPLICA, "replica = place % logical_replica_count.roll(1)[logical].long().clamp_min(1)", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-one-replica-too-few", "eplb", _REPLICA, "replica = place % (logical_replica_count[logical].long() - 1).clamp_min(1)", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-map-entry-of-the-neighbour-replica", "eplb", _PHYSICAL, "physical = torch.where(valid, logical_to_physical_map[logical, (replica + 1) % logical_replica_count[logical].clamp_min(1)].long(), -1)", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-foreign-id-goes-to-the-last-expert", "eplb", _VALID, "logical = logical.clamp_max(logical_to_physical_map.shape[0] - 1)\n    " + _VALID, "eplb/ids-out-of-range-int64"),
    _one("eplb-foreign-id-passes-as-it-is", "eplb", _PHYSICAL, _PHYSICAL.replace(", -1)", ", topk_ids.long())"), "eplb/ids-out-of-range-int64"),
    _one("eplb-negative-id-counts-from-the-end", "eplb", _VALID, "logical = torch.where(logical < 0, logical + logical_to_physical_map.shape[0], logical)\n    " + _VALID, "eplb/ids-out-of-range-int64"),
    _one("eplb-ids-of-8-bits", "eplb", _PHYSICAL, _PHYSICAL + "\n    physical = torch.where(valid, physical & 0xFF, -1)", "eplb/kimi-896-experts-top-16"),
    _one("eplb-wide-id-by-saturation", "eplb", "topk_ids.to(torch.int32).long()", "topk_ids.long().clamp(-(2**31), 2**31 - 1)", "eplb/wide-ids-not-cast-to-int32-first"),
    _one("eplb-load-of-the-logical-expert", "eplb", "torch.where(in_load, physical, 0).flatten()", "torch.where(in_load, logical, 0).flatten()", "eplb/uneven-replicas-r5-int32"),
    _one("eplb-load-written-not-added", "eplb", _ADD, "    expert_load_view.zero_()\n" + _ADD, "eplb/uneven-replicas-r5-int32"),
    _one("eplb-load-of-the-first-slot-alone", "eplb", _ADD, "    in_load = in_load & (torch.arange(topk_ids.shape[1], device=device) == 0)\n" + _ADD, "eplb/uneven-replicas-r5-int32"),
    _one("eplb-load-of-the-last-row-lost", "eplb", _ADD, "    in_load = in_load & (row < topk_ids.shape[0] - 1)\n" + _ADD, "eplb/uneven-replicas-r5-int32"),
    _one("eplb-unmapped-counted-as-expert-0", "eplb", _ADD, "    physical, in_load = torch.where(in_load, physical, 0), torch.ones_like(in_load)\n" + _ADD, "eplb/ids-out-of-range-int64"),
    _one("eplb-no-record-gives-minus-one", "eplb", "    in_load &= torch.as_tensor(record_enabled, device=device).bool()\n", "    in_load &= torch.as_tensor(record_enabled, device=device).bool()\n    physical = torch.where(torch.as_tensor(record_enabled, device=device).bool(), physical, -1)\n", "eplb/record-off-still-counts-int32"),
    _one("eplb-ids-always-int64", "eplb", "return physical.to(topk_ids.dtype)", "return physical", "eplb/identity-map-int32"),
    _one("eplb-entry-beyond-the-load-becomes-minus-one", "eplb", "    return physical.to(topk_ids.dtype)", "    physical = torch.where(physical < expert_load_view.shape[0], physical, -1)\n    return physical.to(topk_ids.dtype)", "eplb/map-points-beyond-the-load"),
    _one("eplb-padding-counted", "eplb", "in_load &= row < num_unpadded_tokens", "pass", "eplb/padding-rows-counted-0-of-5", "2026-11"),
    _one("eplb-padding-one-row-early", "eplb", "in_load &= row < num_unpadded_tokens", "in_load &= row < num_unpadded_tokens - 1", "eplb/padding-rows-counted-1-of-2", "2026-11"),
    _one("eplb-padding-one-row-late", "eplb", "in_load &= row < num_unpadded_tokens", "in_load &= row <= num_unpadded_tokens", "eplb/padding-rows-counted-0-of-5", "2026-11"),
    _one("eplb-padding-by-slots", "eplb", "in_load &= row < num_unpadded_tokens", "in_load &= torch.arange(topk_ids.numel(), device=device).view(topk_ids.shape) < num_unpadded_tokens", "eplb/padding-rows-counted-1-of-2", "2026-11"),
    _one("eplb-padding-mapped-to-minus-one", "eplb", "in_load &= row < num_unpadded_tokens", "in_load &= row < num_unpadded_tokens\n        physical = torch.where(row < num_unpadded_tokens, physical, -1)", "eplb/padding-rows-counted-0-of-5", "2026-11"),
    _one("staging-padding-keeps-its-ids", "staging", "topk_ids = torch.where(is_padding.unsqueeze(-1), -1, topk_ids)", "pass", "staging/padding-rows-keep-their-experts-0-of-3", "2026-11"),
    _one("staging-padding-keeps-its-weights", "staging", "topk_weights = torch.where(is_padding.unsqueeze(-1), 0.0, topk_weights)", "pass", "staging/padding-rows-keep-their-experts-0-of-3", "2026-11"),
    _one("staging-padding-loses-its-codes", "staging", "topk_weights = torch.where(is_padding.unsqueeze(-1), 0.0, topk_weights)", "topk_weights = torch.where(is_padding.unsqueeze(-1), 0.0, topk_weights)\n        codes = torch.where(is_padding.unsqueeze(-1), 0, codes)", "staging/padding-rows-keep-their-experts-0-of-3", "2026-11"),
]  # fmt: skip

_INTERLEAVED = "return halves.transpose(1, 2).flatten(1, 3).contiguous()"
_PACKED = "packed = pack_sf(scale)"
_PERMUTED = "words = packed.unflatten(1, (-1, 4, SF_ROWS // 4)).transpose(2, 3).flatten(1, 3)"
LAYOUT = [
    _one("layout-nibbles-swapped", "kernel_weights", "        interleave_gate_up(w13_weight),", "        interleave_gate_up((w13_weight >> 4) | (w13_weight << 4)),", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-w2-interleaved-too", "kernel_weights", "        w2_weight,\n", "        interleave_gate_up(w2_weight),\n", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-w2-scales-interleaved-too", "kernel_weights", "        transform_sf(w2_weight_scale),", "        transform_sf(interleave_gate_up(w2_weight_scale)),", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-scales-8-by-16", "kernel_weights", _PERMUTED, _PERMUTED.replace("(-1, 4, SF_ROWS // 4)", "(-1, 8, SF_ROWS // 8)"), "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-scales-permuted-over-all-rows", "kernel_weights", _PERMUTED, "words = packed.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-scales-permuted-in-the-first-128-alone", "kernel_weights", _PERMUTED, _PERMUTED + "\n    words[:, SF_ROWS:] = packed[:, SF_ROWS:]", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-words-of-one-group-of-four-rows", "kernel_weights", _PACKED, "packed = pack_sf(scale.unflatten(1, (-1, 4)).transpose(2, 3).flatten(2).unflatten(2, (4, -1)).flatten(1, 2))", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-bytes-of-a-word-reversed", "kernel_weights", _PACKED, "packed = pack_sf(scale.unflatten(-1, (-1, 4)).flip(-1).flatten(-2))", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-byte-255-becomes-254", "kernel_weights", _PACKED, "packed = pack_sf(scale.clamp_max(254))", "layout/every-scale-byte-kept"),
    _one("layout-byte-0-becomes-1", "kernel_weights", _PACKED, "packed = pack_sf(scale.clamp_min(1))", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-experts-reversed", "kernel_weights", _PERMUTED, _PERMUTED + ".flip(0)", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-scales-of-expert-0-for-all", "kernel_weights", _PERMUTED, _PERMUTED + "[:1].expand(len(scale), -1, -1)", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-padded-to-256-rows", "kernel_weights", _PERMUTED, _PERMUTED + "\n    words = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[1] % 256))", "layout/gate-up-interleave-or-scale-transpose-h128-i384"),
    _one("layout-sixteen-rows-of-gate-first", "kernel_weights", _INTERLEAVED, "out = halves.transpose(1, 2).flatten(1, 3).contiguous()\n    out[:, :16] = rows[:, :16]\n    return out", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
    _one("layout-last-scale-word-of-a-row-lost", "kernel_weights", _PACKED, "packed = pack_sf(scale).clone()\n    packed[:, :, -1] = packed[:, :, 0]", "layout/gate-up-interleave-or-scale-transpose-h256-i256"),
]  # fmt: skip

_CHECK = "    check_staging_inputs(hidden_states, topk_weights, topk_ids, contract)\n"
_HIDDEN = "if hidden_states.shape[-1] % SIZE_MULTIPLE:"
_SHAPES = "if topk_weights.shape != topk_ids.shape:"
_WRITE = "    topk_weights_out[:tokens].copy_(topk_weights)"
_ERRORS = "errors/staging-*"
REFUSALS = [
    _one("hidden-of-no-whole-word-taken", "staging", _HIDDEN, "if hidden_states.shape[-1] % GROUP:", "errors/staging-takes-hidden-64"),
    _one("hidden-checked-from-128-on", "staging", _HIDDEN, "if hidden_states.shape[-1] > SIZE_MULTIPLE and hidden_states.shape[-1] % SIZE_MULTIPLE:", "errors/staging-takes-hidden-64"),
    _one("shapes-compared-by-top-k-alone", "staging", _SHAPES, "if topk_weights.shape[-1] != topk_ids.shape[-1]:", "errors/staging-takes-ids-with-fewer-tokens"),
    _one("shapes-compared-by-tokens-alone", "staging", _SHAPES, "if topk_weights.shape[0] != topk_ids.shape[0]:", "errors/staging-takes-ids-with-fewer-slots"),
    _one("shapes-not-compared", "staging", _SHAPES, "if False:", "errors/staging-takes-ids-with-fewer-slots"),
    Mutant("inputs-refused-after-the-codes-are-written", "errors/staging-takes-hidden-4100", [("staging", _CHECK, "    x_fp8[:1].view(torch.uint8).fill_(0)\n" + _CHECK)]),
    Mutant("inputs-refused-after-the-weights-are-written", "errors/staging-takes-hidden-4100", [("staging", _CHECK, "    topk_weights_out[:1].fill_(0)\n" + _CHECK)]),
    Mutant("inputs-refused-after-the-ids-are-written", "errors/staging-takes-hidden-4100", [("staging", _CHECK, "    topk_idx_out[:1].fill_(0)\n" + _CHECK)]),
    _one("refused-as-a-type-error", "staging", 'raise ValueError(text("staging-shapes", contract))', 'raise TypeError(text("staging-shapes", contract))', "errors/staging-takes-ids-with-fewer-slots"),
    _one("refused-in-the-words-of-the-other-check", "staging", 'raise ValueError(text("staging-shapes", contract))', 'raise ValueError(text("staging-hidden", contract))', "errors/staging-takes-ids-with-fewer-slots"),
]  # fmt: skip

PLACES = [*COMBINE, *SIZES, *INDEX, *GROUPED, *STALE, *MASKS, *EPLB, *LAYOUT, *REFUSALS]
