# ruff: noqa: E501
"""Planted faults of single roundings and of special values, stage by stage."""

from __future__ import annotations

from tests.helpers.mutants import Mutant

_one = Mutant.of

# --- what is replaced ---------------------------------------------------------------------------

_STAGED = "codes = e4m3_codes(scaled, contract).flatten(-2)"
_REQUANTISED = (
    "codes = e4m3_codes(scale_down(groups, exponent), contract).flatten(-2)\n    return codes, "
)
_GATE_UP = "gate, up = gate_up.to(torch.bfloat16).float().chunk(2, dim=-1)"
_CLAMPED = "gate, up = _clamped(gate, up, act, contract)"
_PRODUCT = "value = gated * up"
_WEIGHTED = "value = value * routing"
_SLOT = "slots[token, slot] = down.to(torch.bfloat16)"
_Y = "y = acc.to(torch.bfloat16)"
_BLOCK = "for term in (block * (x_scale[here] * w_scale[here])).float():"
_CEIL = "return (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()"
_AMAX_R = "exponent = requant_exponent(group_amax(groups, contract), contract)"
_AMAX_S = "amax = group_amax(groups, contract).clamp_min(contract.staging_amax_floor.value)"
_SCALE_VALUES = "return torch.where(codes == 0xFF, torch.nan, value)"
_E4M3 = "return torch.from_numpy(E4M3_TABLE.copy()).float().to(device)"


def at_e4m3_ties(values: str, factor: str) -> str:
    """``values`` times ``factor`` where they lie half-way between two E4M3 codes, and there alone."""
    normal = f"({values}.float().view(torch.int32) & 0xFFFFF) == 0x80000"
    tie = f"torch.where({values}.abs() >= 2.0**-6, {normal}, ({values}.abs() * 512).frac() == 0.5)"
    return f"torch.where({tie}, {values} * {factor}, {values})"


def at_bf16_ties(values: str, factor: str) -> str:
    """The same between two bfloat16 numbers, of float32 values."""
    tie = f"({values}.view(torch.int32) & 0xFFFF) == 0x8000"
    return f"torch.where({tie}, {values} * {factor}, {values})"


_AWAY, _TOWARD = "(1 + 2.0**-20)", "(1 - 2.0**-20)"
_UP, _DOWN = "(1 + {0}.sign() * 2.0**-20)", "(1 - {0}.sign() * 2.0**-20)"


def tf32(value: str) -> str:
    """``value``, float32, with 11 significant bits."""
    return f"((({value}).contiguous().view(torch.int32) + 0x1000) & -8192).view(torch.float32)"


def flushed(value: str, least: str = "2.0**-126") -> str:
    return f"torch.where({value}.abs() < {least}, 0.0, {value})"


def _staged(values: str, after: str = "") -> str:
    return f"codes = e4m3_codes({values}, contract).flatten(-2){after}"


def _requantised(values: str, after: str = "") -> str:
    return (
        f"v = scale_down(groups, exponent)\n    codes = e4m3_codes({values}, contract)"
        f".flatten(-2){after}\n    return codes, "
    )


_ODD = (
    "\n    one, two = (e4m3_codes(part, contract).flatten(-2) for part in ("
    f"{at_e4m3_ties('v', _AWAY)}, {at_e4m3_ties('v', _TOWARD)}))"
    "\n    codes = torch.where(one != two, one + two - codes, codes)"
)
_FLUSHED_CODES = "\n    codes = torch.where((codes & 0x7F) < 8, codes & 0x80, codes)"

_ANY = "forward/*"
_ANY_STAGING = "staging/*"

TIES = [
    _one("staged-tie-away-from-zero", "staging", _STAGED, _staged(at_e4m3_ties("scaled", _AWAY)), "staging/ties-not-to-even"),
    _one("staged-tie-toward-zero", "staging", _STAGED, _staged(at_e4m3_ties("scaled", _TOWARD)), "staging/ties-not-to-even"),
    _one("staged-tie-up", "staging", _STAGED, _staged(at_e4m3_ties("scaled", _UP.format("scaled"))), "staging/ties-not-to-even"),
    _one("staged-tie-down", "staging", _STAGED, _staged(at_e4m3_ties("scaled", _DOWN.format("scaled"))), "staging/ties-not-to-even"),
    _one("staged-tie-to-odd", "staging", _STAGED, _STAGED + _ODD.replace("v ", "scaled ").replace("v.", "scaled.").replace(" v)", " scaled)"), "staging/ties-not-to-even"),
    _one("staged-tie-away-in-subnormal-codes", "staging", _STAGED, _staged("torch.where(scaled.abs() < 2.0**-6, " + at_e4m3_ties("scaled", _AWAY) + ", scaled)"), "staging/ties-not-to-even"),
    _one("staged-tie-away-in-forward", "staging", _STAGED, _staged(at_e4m3_ties("scaled", _AWAY)), "forward/masked-slots-bell"),
    _one("requantised-tie-away-from-zero", "eager", _REQUANTISED, _requantised(at_e4m3_ties("v", _AWAY)), "forward/ties-of-activations-not-to-even"),
    _one("requantised-tie-toward-zero", "eager", _REQUANTISED, _requantised(at_e4m3_ties("v", _TOWARD)), "forward/ties-of-activations-not-to-even"),
    _one("requantised-tie-up", "eager", _REQUANTISED, _requantised(at_e4m3_ties("v", _UP.format("v"))), "forward/ties-of-activations-not-to-even"),
    _one("requantised-tie-down", "eager", _REQUANTISED, _requantised(at_e4m3_ties("v", _DOWN.format("v"))), "forward/ties-of-activations-not-to-even"),
    _one("requantised-tie-to-odd", "eager", _REQUANTISED, _requantised("v", _ODD), "forward/ties-of-activations-not-to-even"),
    _one("requantised-tie-away-in-subnormal-codes", "eager", _REQUANTISED, _requantised("torch.where(v.abs() < 2.0**-6, " + at_e4m3_ties("v", _AWAY) + ", v)"), "forward/ties-of-activations-not-to-even"),
    _one("requantised-tie-toward-zero-in-subnormal-codes", "eager", _REQUANTISED, _requantised("torch.where(v.abs() < 2.0**-6, " + at_e4m3_ties("v", _TOWARD) + ", v)"), "forward/ties-of-activations-not-to-even"),
    _one("requantised-tie-away-in-negative-codes", "eager", _REQUANTISED, _requantised("torch.where(v < 0, " + at_e4m3_ties("v", _AWAY) + ", v)"), "forward/ties-of-activations-not-to-even"),
    _one("gate-up-tie-away-from-zero", "eager_activation", _GATE_UP, _GATE_UP.replace("gate_up.to", at_bf16_ties("gate_up", _AWAY) + ".to"), "forward/capacity-5-not-a-multiple-of-384"),
    _one("gate-up-tie-toward-zero", "eager_activation", _GATE_UP, _GATE_UP.replace("gate_up.to", at_bf16_ties("gate_up", _TOWARD) + ".to"), "forward/capacity-5-not-a-multiple-of-384"),
    _one("slot-row-tie-away-from-zero", "eager", _SLOT, "slots[token, slot] = " + at_bf16_ties("down", _AWAY) + ".to(torch.bfloat16)", "forward/capacity-5-not-a-multiple-of-384"),
    _one("slot-row-tie-toward-zero", "eager", _SLOT, "slots[token, slot] = " + at_bf16_ties("down", _TOWARD) + ".to(torch.bfloat16)", "forward/capacity-5-not-a-multiple-of-384"),
    _one("y-tie-away-from-zero", "eager_combine", _Y, "y = " + at_bf16_ties("acc", _AWAY) + ".to(torch.bfloat16)", "forward/capacity-5-not-a-multiple-of-384"),
    _one("y-tie-toward-zero", "eager_combine", _Y, "y = " + at_bf16_ties("acc", _TOWARD) + ".to(torch.bfloat16)", "forward/capacity-5-not-a-multiple-of-384"),
]  # fmt: skip

TWICE = [
    _one("requantised-through-tf32", "eager", _REQUANTISED, _requantised(tf32("v.float()")), "forward/capacity-5-not-a-multiple-of-384"),
    _one("requant-amax-of-bf16", "eager", _AMAX_R, _AMAX_R.replace("(groups,", "(groups.bfloat16().float(),"), "forward/bell-h512-i128-drifts"),
    _one("requantised-through-half", "eager", _REQUANTISED, _requantised("v.half()"), "forward/capacity-5-not-a-multiple-of-384"),
    _one("gate-up-through-tf32", "eager_activation", _GATE_UP, "gate, up = " + tf32("gate_up") + ".to(torch.bfloat16).float().chunk(2, dim=-1)", "forward/masked-slots-bell"),
    _one("slot-row-through-tf32", "eager", _SLOT, f"slots[token, slot] = {tf32('down')}.to(torch.bfloat16)", "forward/masked-slots-bell"),
    _one("y-through-tf32", "eager_combine", _Y, f"y = {tf32('acc')}.to(torch.bfloat16)", "forward/combine-of-16-slots-in-another-order"),
    _one("product-and-weight-rounded-once", "eager_activation", _WEIGHTED, "value = (gated.double() * up.double() * routing.double()).float()", "forward/directed-product-order"),
    _one("up-times-weight-first", "eager_activation", _WEIGHTED, "value = gated * (up * routing)", "forward/directed-product-order"),
    _one("gate-rounded-and-up-not", "eager_activation", _GATE_UP, "gate, up = gate_up.chunk(2, dim=-1)\n    gate = gate.to(torch.bfloat16).float()", "forward/capacity-5-not-a-multiple-of-384"),
    _one("up-rounded-and-gate-not", "eager_activation", _GATE_UP, "gate, up = gate_up.chunk(2, dim=-1)\n    up = up.to(torch.bfloat16).float()", "forward/capacity-5-not-a-multiple-of-384"),
]  # fmt: skip

TRUNCATED = [
    _one("slot-row-truncated-to-bf16", "eager", _SLOT, "slots[token, slot] = (down.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", "forward/capacity-5-not-a-multiple-of-384"),
    _one("y-truncated-to-bf16", "eager_combine", _Y, "y = (acc.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", "forward/capacity-5-not-a-multiple-of-384"),
    _one("requantised-code-truncated", "eager", _REQUANTISED, _requantised("(v.float().view(torch.int32) & ~0xFFFFF).view(torch.float32)"), "forward/ties-of-activations-not-to-even"),
    _one("staged-code-truncated-in-forward", "staging", _STAGED, _staged("(scaled.float().view(torch.int32) & ~0xFFFFF).view(torch.float32)"), "forward/masked-slots-bell"),
    _one("routing-weight-truncated-to-bf16", "eager_activation", _WEIGHTED, "value = value * (routing.contiguous().view(torch.int32) & -65536).view(torch.float32)", "forward/capacity-5-not-a-multiple-of-384"),
    _one("routing-weight-through-half", "eager_activation", _WEIGHTED, "value = value * routing.half().float()", "forward/combine-of-16-slots-in-another-order"),
]  # fmt: skip

FLUSHED = [
    _one("staged-subnormal-codes-flushed", "staging", _STAGED, _STAGED + _FLUSHED_CODES, "staging/ties-not-to-even"),
    _one("staged-subnormal-codes-flushed-in-forward", "staging", _STAGED, _STAGED + _FLUSHED_CODES, "forward/situ-saturated"),
    _one("requantised-subnormal-codes-flushed", "eager", _REQUANTISED, _requantised("v", _FLUSHED_CODES), "forward/ties-of-activations-not-to-even"),
    _one("block-sum-flushed", "eager", _BLOCK, "for term in (lambda t: torch.where(t.abs() < 2.0**-126, 0.0, t))((block * (x_scale[here] * w_scale[here])).float()):", "forward/directed-subnormal-up"),
    _one("up-flushed", "eager_activation", _CLAMPED, _CLAMPED + f"\n    up = {flushed('up')}", "forward/directed-subnormal-up"),
    _one("product-flushed", "eager_activation", _PRODUCT, _PRODUCT + f"\n    value = {flushed('value')}", "forward/directed-subnormal-product"),
    _one("routing-weight-flushed", "eager_activation", _WEIGHTED, f"value = value * {flushed('routing')}", "forward/routing-weight-flushed"),
    _one("activation-flushed", "eager_activation", _WEIGHTED, _WEIGHTED + f"\n    value = {flushed('value')}", "forward/directed-subnormal-activation"),
    _one("scale-of-requantisation-flushed", "eager", "byte = ue8m0_ceil(amax * RECIP_448.to(amax.device))", "scale = amax * RECIP_448.to(amax.device)\n        byte = ue8m0_ceil(torch.where(scale < 2.0**-126, 0.0, scale))", "forward/directed-subnormal-activation"),
    _one("slot-row-flushed", "eager", _SLOT, f"slots[token, slot] = {flushed('down')}.to(torch.bfloat16)", "forward/directed-subnormal-rows"),
    _one("y-flushed", "eager_combine", _Y, f"y = {flushed('acc')}.to(torch.bfloat16)", "forward/directed-subnormal-rows"),
    _one("scale-2e-127-read-as-zero", "eager", _SCALE_VALUES, "value = torch.where(codes == 0, 0.0, value)\n    " + _SCALE_VALUES, "forward/weight-scale-bytes-at-their-ends"),
]  # fmt: skip

SPECIALS = [
    _one("nan-counts-in-requant-amax", "eager", _AMAX_R, "exponent = requant_exponent(groups.abs().amax(-1), contract)", "forward/routing-weight-not-finite"),
    _one("nan-makes-the-requant-group-zero", "eager", _AMAX_R, "groups = torch.where(groups.isnan().any(-1, keepdim=True), 0.0, groups)\n    " + _AMAX_R, "forward/routing-weight-not-finite"),
    _one("nan-requantised-as-448", "eager", _REQUANTISED, _requantised("v.nan_to_num(nan=448.0)"), "forward/routing-weight-not-finite"),
    _one("nan-requantised-as-zero", "eager", _REQUANTISED, _requantised("v.nan_to_num(nan=0.0)"), "forward/routing-weight-not-finite"),
    _one("nan-code-read-as-480", "eager", _E4M3, "return torch.from_numpy(E4M3_TABLE.copy()).nan_to_num(nan=480.0).float().to(device)", "forward/routing-weight-not-finite"),
    _one("infinity-in-requantisation-is-nan", "eager", _REQUANTISED, _requantised("torch.where(v.isinf(), torch.nan, v)"), "forward/routing-weight-not-finite", "2026-11"),
    _one("infinity-left-out-of-requant-amax", "eager", _AMAX_R, "exponent = requant_exponent(group_amax(torch.where(groups.isinf(), 0.0, groups), contract), contract)", "forward/routing-weight-not-finite"),
    _one("nan-up-becomes-the-upper-bound", "eager_activation", "up = torch.where((up < -bound) | (up.isnan() & nan), -bound, up)", "up = torch.where(up < -bound, -bound, torch.where(up.isnan() & nan, bound, up))", "forward/nan-token-with-clamp-becomes-bounds"),
    _one("nan-up-becomes-zero", "eager_activation", "up = torch.where((up < -bound) | (up.isnan() & nan), -bound, up)", "up = torch.where(up < -bound, -bound, torch.where(up.isnan() & nan, 0.0, up))", "forward/nan-token-with-clamp-becomes-bounds"),
    _one("nan-gate-becomes-minus-the-bound", "eager_activation", "return torch.where((gate > bound) | (gate.isnan() & nan), bound, gate), up", "return torch.where(gate > bound, bound, torch.where(gate.isnan() & nan, -bound, gate)), up", "forward/nan-token-with-clamp-becomes-bounds"),
    _one("nan-up-passes-the-clamp", "eager_activation", "up = torch.where((up < -bound) | (up.isnan() & nan), -bound, up)", "up = torch.where(up < -bound, -bound, up)", "forward/nan-token-with-clamp-becomes-bounds"),
    _one("nan-weight-read-as-zero", "eager_activation", _WEIGHTED, "value = value * routing.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  #", "forward/routing-weight-not-finite"),
    _one("infinite-weight-held-to-the-largest", "eager_activation", _WEIGHTED, "value = value * routing.clamp(-3.4e38, 3.4e38)", "forward/routing-weight-not-finite"),
    _one("nan-row-left-out-of-combine", "eager_combine", "total = acc + row  #", "total = acc + row.float().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  #", "forward/routing-weight-not-finite"),
    _one("infinite-row-held-to-the-largest", "eager_combine", "total = acc + row  #", "total = acc + row.float().clamp(-3.3895314e38, 3.3895314e38)  #", "forward/row-rounded-to-infinity-bf16"),
    _one("y-held-to-the-largest", "eager_combine", _Y, "y = acc.clamp(-3.3895314e38, 3.3895314e38).to(torch.bfloat16)", "forward/row-rounded-to-infinity-bf16"),
    _one("scale-255-read-as-2e128", "eager", _SCALE_VALUES, "return value", "forward/routing-weight-not-finite"),
    _one("scale-254-read-as-nan", "eager", _SCALE_VALUES, "return torch.where(codes >= 0xFE, torch.nan, value)", "forward/weight-scale-bytes-at-their-ends"),
    _one("sum-starts-from-minus-zero", "eager_combine", "dtype=torch.float32, device=slots.device)\n    for", "dtype=torch.float32, device=slots.device).neg()\n    for", "forward/masked-slot-weight-not-finite"),
    _one("masked-weight-times-row", "eager", "live = (problem.topk_ids >= 0) & (problem.topk_ids < problem.num_experts)", "live = problem.topk_ids >= -1\n        slots += torch.where(problem.topk_ids < 0, problem.topk_weights * 0, 0).to(torch.bfloat16)[:, :, None]", "forward/masked-slot-weight-not-finite"),
    _one("negative-zero-staged-as-zero", "staging", _STAGED, _STAGED + "\n    codes = torch.where(codes == 0x80, 0, codes)", "staging/ties-not-to-even"),
    _one("small-negative-staged-as-plus-zero", "staging", _STAGED, _STAGED + "\n    codes = torch.where((codes == 0x80) & (scaled.flatten(-2) != 0), 0, codes)", "staging/ties-not-to-even"),
    _one("signed-scale-bytes", "eager", "value = ((codes.long() + (1023 - 127)) << 52).view(torch.float64)", "value = ((codes.view(torch.int8).long() + (1023 - 127)) << 52).view(torch.float64)", "forward/ties-of-activations-not-to-even"),
    _one("scale-bytes-below-64-read-as-64", "eager", "value = ((codes.long() + (1023 - 127)) << 52).view(torch.float64)", "value = ((codes.long().clamp_min(64) + (1023 - 127)) << 52).view(torch.float64)", "forward/weight-scale-bytes-at-their-ends"),
    _one("scale-product-in-fp32", "eager", _BLOCK, "for term in block.float() * (x_scale[here].float() * w_scale[here].float()):", "forward/weight-scale-bytes-at-their-ends"),
    _one("scale-of-hidden-applied-after-the-sum-of-a-word", "eager", "x_scale = _ue8m0_values(sf).t().unsqueeze(-1)  # (G, R, 1)", "x_scale = _ue8m0_values(sf[:, ::4].repeat_interleave(4, -1)).t().unsqueeze(-1)", "forward/ties-of-activations-not-to-even"),
]  # fmt: skip

EXPONENTS = [
    _one("requant-exponent-to-nearest", "eager", "byte = ue8m0_ceil(amax * RECIP_448.to(amax.device))", "byte = ((amax * RECIP_448).view(torch.int32) + 0x400000) >> 23", "forward/capacity-5-not-a-multiple-of-384"),
    _one("requant-byte-capped-at-254", "eager", "return byte.clamp(contract.requant_exponent_min.value, 255)", "return byte.clamp(contract.requant_exponent_min.value, 254)", "forward/routing-weight-not-finite"),
    _one("requant-byte-at-least-one", "eager", "return byte.clamp(contract.requant_exponent_min.value, 255)", "return byte.clamp(1, 255)", "forward/ties-of-activations-not-to-even"),
    _one("requant-byte-0-kept-at-september", "eager", "return byte.clamp(contract.requant_exponent_min.value, 255)", "return byte.clamp(0, 255)", "forward/ties-of-activations-not-to-even", "2026-11"),
    _one("requant-floor-104-at-september", "eager", "return byte.clamp(contract.requant_exponent_min.value, 255)", "return byte.clamp(104, 255)", "forward/ties-of-activations-not-to-even", "2026-11"),
    _one("requant-floor-106-at-september", "eager", "return byte.clamp(contract.requant_exponent_min.value, 255)", "return byte.clamp(106, 255)", "forward/ties-of-activations-not-to-even", "2026-11"),
    _one("requant-bits-without-the-carry", "eager", ".long() + 0x1FFFFF) >> 23", ".long()) >> 23", "forward/capacity-5-not-a-multiple-of-384", "2026-11"),
    _one("requant-bits-carry-one-too-much", "eager", "+ 0x1FFFFF", "+ 0x200000", "forward/ties-of-activations-not-to-even", "2026-11"),
    _one("requant-bits-carry-one-too-little", "eager", "+ 0x1FFFFF", "+ 0x1FFFFE", "forward/requant-amax-one-unit-above-448x2k", "2026-11"),
    _one("requant-byte-of-zeros-127", "eager", "return byte.clamp(contract.requant_exponent_min.value, 255)", "return torch.where(amax == 0, 127, byte.clamp(contract.requant_exponent_min.value, 255))", "forward/clamp-0-ignored-by-precise-silu", "2026-11"),
    _one("requant-byte-by-a-logarithm", "eager", "byte = ((amax.contiguous().view(torch.int32).long() + 0x1FFFFF) >> 23).int() - 8", "byte = ((amax / 448).log2().ceil().nan_to_num(0, 120, -127) + 127).int()", "forward/requant-amax-one-unit-above-448x2k-at-40-exponents", "2026-11"),
    _one("requant-infinity-255-at-september", "eager", ">> 23).int() - 8", ">> 23).int() - 8\n        byte = torch.where(amax.isinf(), 255, byte)", "forward/routing-weight-not-finite", "2026-11"),
    _one("staging-amax-in-fp16", "staging", _AMAX_S, _AMAX_S.replace("group_amax(groups, contract)", "group_amax(groups.half().float(), contract)"), "staging/amax-at-448x2k-or-a-step-beside-4a61"),
    _one("staging-exponent-to-nearest", "staging", "ue8m0_ceil(amax / E4M3_MAX)", "(((amax / E4M3_MAX).view(torch.int32) + 0x400000) >> 23)", "staging/ties-not-to-even"),
    _one("staging-exponent-at-most-253", "staging", "contract.staging_exponent_min.value, contract.staging_exponent_max.value", "contract.staging_exponent_min.value, 253", "staging/infinity-among-values"),
    _one("staging-exponent-255-for-infinity", "staging", "contract.staging_exponent_min.value, contract.staging_exponent_max.value", "contract.staging_exponent_min.value, 255", "staging/infinity-among-values"),
    _one("staging-floor-taken-for-a-floor-of-the-scale", "staging", _AMAX_S, "amax = group_amax(groups, contract).clamp_min(448e-4)", "forward/ties-of-activations-not-to-even"),
    _one("staging-floor-missing-in-forward", "staging", _AMAX_S, "amax = group_amax(groups, contract).clamp_min(1e-30)", "forward/ties-of-activations-not-to-even"),
    _one("sgl-floor-1e-4", "staging", _AMAX_S, "amax = group_amax(groups, contract).clamp_min(1e-4)", "staging/subnormal-inputs-flushed", "sgl"),
    _one("sgl-nan-not-clipped", "staging", "if contract.staging_clips.value:", "if False:", "staging/nan-poisons-its-group", "sgl"),
    _one("sgl-infinity-254", "staging", "contract.staging_exponent_min.value, contract.staging_exponent_max.value", "0, 254", "staging/infinity-among-values", "sgl"),
    _one("sgl-factor-of-infinity-is-plus-infinity", "staging", "groups.double() * -math.inf", "groups.double() * math.inf", "staging/infinity-among-values", "sgl"),
]  # fmt: skip

_ARGUMENT = "argument = gate if act.alpha == 1 else gate * _fp32(act.alpha, gate)"
_ADDITION = "            acc += term"
_BELL = "forward/bell-h256-i128-drifts"


def _of_128(term: str) -> str:
    return _BLOCK.replace("for term in (", "for term in ((").replace(
        ".float():", f").unflatten(0, (-1, 4)).sum(1).{term}:"
    )


NARROW = [
    Mutant("exp-of-the-gate-in-fp32", _BELL, [("eager_activation", _CLAMPED, _CLAMPED + "\n    gate.wide = gate_up.chunk(2, dim=-1)[0]"), ("eager_activation", _ARGUMENT, "argument = gate.wide")]),
    _one("log2e-in-bf16", "eager_activation", _ARGUMENT, "argument = gate * (1.4453125 / 1.4426950408889634)", _BELL),
    _one("log2e-in-fp16", "eager_activation", _ARGUMENT, "argument = gate * (1.4423828125 / 1.4426950408889634)", "forward/bell-h768-i128-drifts"),
    _one("exp-in-fp16", "eager_activation", "return argument.double().exp().float()", "return ((argument * 1.4426950408889634).half().double().exp2()).half().float()", "forward/bell-h768-i128-drifts"),
    _one("sum-of-128-in-bf16", "eager", _BLOCK, _of_128("bfloat16().float()"), _BELL),
    _one("sum-of-32-in-fp16", "eager", _BLOCK, _BLOCK.replace(".float():", ".half().float():"), _BELL),
    Mutant("sum-kept-in-bf16-after-128", "forward/bell-h768-i128-drifts", [("eager", _BLOCK, _of_128("float()")), ("eager", _ADDITION, "            acc = (acc + term).bfloat16().float()")]),
]  # fmt: skip

_RECIPROCAL = "gated = gate * (1.0 / denominator)"
_QUOTIENT = "gated = gate / denominator"
_FORMS = "forward/directed-precise-silu-by-a-reciprocal"

SILUS = [
    _one("fast-silu-always", "eager_activation", "if act.fast_math:\n        gated", "if True:\n        gated", _FORMS),
    _one("precise-silu-by-a-reciprocal", "eager_activation", _QUOTIENT, _RECIPROCAL, _FORMS, "2026-11"),
    _one("precise-silu-by-a-quotient-in-sgl", "eager_activation", _RECIPROCAL, _QUOTIENT, _FORMS, "sgl"),
    _one("precise-silu-two-ulps-high", "eager_activation", _QUOTIENT, f"{_QUOTIENT} * (1 + 2.0**-22)", _FORMS),
    _one("precise-silu-two-ulps-low", "eager_activation", _QUOTIENT, f"{_QUOTIENT} * (1 - 2.0**-22)", _FORMS),
]  # fmt: skip

_CLAMP_OF_PRODUCT = "_of_product(\n        {}, act{})"
_OWN = "\n\ndef _of_product(v, act, low=-1):\n    b = torch.tensor(act.clamp).bfloat16().item() if act.clamp is not None else torch.inf\n    return v.clamp(b * low, b)\n\n\ndef _clamped("


def _product_clamped(name: str, of: str, clamp: str, *, alone: bool) -> Mutant:
    """The product is clamped at ``of``; ``alone``: gate and up are not."""
    edits = [("eager_activation", of, clamp), ("eager_activation", "\n\ndef _clamped(", _OWN)]
    edits += [("eager_activation", _CLAMPED, "")] if alone else []
    return Mutant(name, "forward/clamp-10-bell-misapplied", edits)


CLAMPS = [
    _product_clamped("product-clamped-alone", _PRODUCT, "value = " + _CLAMP_OF_PRODUCT.format("gated * up", ""), alone=True),
    _product_clamped("product-clamped-too", _PRODUCT, "value = " + _CLAMP_OF_PRODUCT.format("gated * up", ""), alone=False),
    _product_clamped("weighted-product-clamped-alone", _WEIGHTED, "value = " + _CLAMP_OF_PRODUCT.format("value * routing", ""), alone=True),
    _product_clamped("weighted-product-clamped-above-alone", _WEIGHTED, "value = " + _CLAMP_OF_PRODUCT.format("value * routing", ", -torch.inf"), alone=True),
]  # fmt: skip

ALLOWED = [
    _one("gate-flushed", "eager_activation", _CLAMPED, _CLAMPED + f"\n    gate = {flushed('gate')}", "forward/directed-subnormal-*"),
    _one("silu-flushed", "eager_activation", _PRODUCT, f"value = {flushed('gated')} * up", "forward/directed-subnormal-*"),
]  # fmt: skip
"""Survivors: a subnormal silu may be flushed (docs/numerics.md, 4.3), and a subnormal gate has one.

Left out are faults that change no bit: a division by 448 in place of the product, the reciprocal in
place of staging's division, a floor of staging anywhere between 448 * 2**-23 and 448 * 2**-22, and
subnormal hidden states, which staging's floor makes zeros.
"""

NUMBERS = [*TIES, *TWICE, *TRUNCATED, *FLUSHED, *SPECIALS, *EXPONENTS, *NARROW, *SILUS, *CLAMPS]
