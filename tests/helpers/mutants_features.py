# ruff: noqa: E501
"""Planted faults of features: what a call may ask besides, each under a contract that knows it."""

from __future__ import annotations

from tests.helpers.mutants import Mutant
from tests.helpers.mutants_numbers import at_bf16_ties, flushed, tf32

_one = Mutant.of

_NEW, _SGL = "2026-11", "sgl"

# --- alpha and beta -------------------------------------------------------------------------------

_ALPHA = "argument = gate if act.alpha == 1 else gate * _fp32(act.alpha, gate)"
_BETA = "return gated, up if act.beta == 0 else up + _fp32(act.beta, up)"
_BOUND = 'bound = torch.tensor(act.clamp, dtype=torch.bfloat16, device="cpu").float().item()'
_GATED = '    if act.name == "swiglustep" and act.clamp is not None:'
_STEP = "gated = torch.fmin(gated, _fp32(act.clamp, gate))"
_STEP_UP = 'if act.name == "swiglustep":\n        return gate, up'
_A = "forward/swiglu-*"
_S = "forward/swiglustep-*"

ALPHA_BETA = [
    _one("alpha-dropped", "eager_activation", _ALPHA, "argument = gate", "forward/swiglu-oai-precise", _NEW),
    _one("alpha-on-the-gate-too", "eager_activation", _ALPHA, "gate = gate * _fp32(act.alpha, gate)\n    argument = gate", "forward/swiglu-oai-precise", _NEW),
    _one("alpha-rounded-to-bf16", "eager_activation", _ALPHA, "argument = gate * _fp32(act.alpha, gate).bfloat16().float()", "forward/swiglu-oai-precise", _NEW),
    _one("alpha-times-gate-rounded-to-bf16", "eager_activation", _ALPHA, "argument = (gate * _fp32(act.alpha, gate)).bfloat16().float()", "forward/swiglu-oai-precise", _NEW),
    _one("alpha-of-gpt-oss-always", "eager_activation", _ALPHA, "argument = gate * (1.702 if act.alpha != 1 else 1.0)", "forward/swiglu-alpha-beta-both-precise-clamp", _NEW),
    _one("alpha-divides", "eager_activation", _ALPHA, "argument = gate / _fp32(act.alpha, gate)", "forward/swiglu-oai-precise", _NEW),
    _one("beta-dropped", "eager_activation", _BETA, "return gated, up", "forward/swiglu-oai-precise", _NEW),
    _one("beta-of-gpt-oss-always", "eager_activation", _BETA, "return gated, up if act.beta == 0 else up + 1.0", "forward/swiglu-alpha-beta-both-precise-clamp", _NEW),
    _one("beta-subtracted", "eager_activation", _BETA, "return gated, up - _fp32(act.beta, up)", "forward/swiglu-oai-precise", _NEW),
    _one("beta-before-the-clamp", "eager_activation", _BOUND, _BOUND + "\n    up = up + act.beta", "forward/swiglu-oai-precise", _NEW),
    _one("beta-on-the-gate", "eager_activation", _BETA, "return gated + _fp32(act.beta, up), up", "forward/swiglu-oai-precise", _NEW),
    _one("up-with-beta-rounded-to-bf16", "eager_activation", _BETA, "return gated, (up + _fp32(act.beta, up)).bfloat16().float()", "forward/swiglu-oai-precise", _NEW),
    _one("alpha-and-beta-swapped", "eager_activation", _ALPHA, "argument = gate * _fp32(act.beta or 1.0, gate)", "forward/swiglu-oai-precise", _NEW),
    _one("alpha-of-negative-gates-alone", "eager_activation", _ALPHA, "argument = torch.where(gate < 0, gate * act.alpha, gate)", "forward/swiglu-oai-precise", _NEW),
]  # fmt: skip

STEP = [
    _one("step-up-not-clamped", "eager_activation", _BOUND, '_, bound = up, torch.inf if act.name == "swiglustep" else act.clamp', "forward/swiglustep-up-bound-not-rounded-to-bf16", _NEW),
    _one("step-gate-clamped-too", "eager_activation", _STEP_UP, 'if act.name == "swiglustep":\n        return gate.clamp_max(bound), up', "forward/swiglustep-precise", _NEW),
    _one("step-not-clamped-after-silu", "eager_activation", _STEP, "pass", "forward/swiglustep-up-bound-not-rounded-to-bf16", _NEW),
    _one("step-bound-rounded-to-bf16", "eager_activation", _STEP, _STEP.replace("_fp32(act.clamp, gate)", "_fp32(act.clamp, gate).bfloat16().float()"), "forward/swiglustep-precise", _NEW),
    _one("step-up-bound-in-fp32", "eager_activation", _BOUND, "bound = act.clamp", "forward/swiglustep-up-bound-not-rounded-to-bf16", _NEW),
    _one("step-nan-passes", "eager_activation", _STEP, "gated = torch.minimum(gated, _fp32(act.clamp, gate))", "forward/swiglustep-nan-becomes-the-bound", _NEW),
    _one("step-bounded-below-too", "eager_activation", _STEP, _STEP + "\n        gated = gated.clamp_min(-0.2)", "forward/swiglustep-nan-becomes-the-bound", _NEW),
    _one("step-product-clamped", "eager_activation", _STEP, "up, gated = torch.ones_like(up), torch.fmin(gated * up, _fp32(act.clamp, gate))", "forward/swiglustep-up-bound-not-rounded-to-bf16", _NEW),
    _one("step-up-bounded-above-alone", "eager_activation", "up = torch.where((up < -bound) | (up.isnan() & nan), -bound, up)", "pass", "forward/swiglustep-up-bound-not-rounded-to-bf16", _NEW),
]  # fmt: skip

# --- SiTU -----------------------------------------------------------------------------------------

_T = "forward/situ-*"
_TANH = "return 2.0 * _sigmoid(2.0 * argument, act) - 1.0"
_FORM = "form, alpha, beta = contract.situ_tanh.value, _fp32(act.alpha, gate), _fp32(act.beta, up)"
_LATER = "gated = (tanh * alpha) * _sigmoid(gate, act)"
_UPPER = "return gated, _tanh_of_sigmoid(up * (1.0 / beta), act) * beta"
SITU = [
    _one("situ-scales-swapped", "eager_activation", _FORM, _FORM + "\n    alpha, beta = beta, alpha", "forward/situ-4-25-fast", _NEW),
    _one("situ-alpha-not-multiplied-back", "eager_activation", _LATER, "gated = tanh * _sigmoid(gate, act)", "forward/situ-4-25-fast", _NEW),
    _one("situ-beta-not-multiplied-back", "eager_activation", _UPPER, _UPPER.replace(" * beta", ""), "forward/situ-4-25-fast", _NEW),
    _one("situ-sigmoid-of-the-scaled-gate", "eager_activation", _LATER, "gated = (tanh * alpha) * _sigmoid(gate * (1.0 / alpha), act)", "forward/situ-4-25-fast", _NEW),
    _one("situ-sigmoid-lost", "eager_activation", _LATER, "gated = tanh * alpha", "forward/situ-4-25-fast", _NEW),
    _one("situ-up-without-tanh", "eager_activation", _UPPER, "return gated, up", "forward/situ-4-25-fast", _NEW),
    _one("situ-tanh-of-half", "eager_activation", _TANH, "return 2.0 * _sigmoid(argument, act) - 1.0", "forward/situ-4-25-fast", _NEW),
    _one("situ-up-read-as-gate", "eager_activation", _UPPER, _UPPER.replace("(up *", "(gate *"), "forward/situ-4-25-fast", _NEW),
    _one("situ-in-place-of-silu-of-4-and-25", "eager_activation", _FORM, _FORM.replace("_fp32(act.alpha, gate), _fp32(act.beta, up)", "_fp32(4.0, gate), _fp32(25.0, up)"), "forward/situ-2-8-precise", _NEW),
    _one("situ-quotient-of-t-not-doubled", "eager_activation", "gated = ((t + t) * (above * above)) / below", "gated = (t * (above * above)) / below", "forward/situ-4-25-fast", _SGL),
    _one("situ-quotient-above-not-squared", "eager_activation", "gated = ((t + t) * (above * above)) / below", "gated = ((t + t) * above) / below", "forward/situ-4-25-fast", _SGL),
    _one("situ-quotient-below-minus", "eager_activation", "below = fma(t, t, torch.ones_like(t))", "below = fma(-t, t, torch.ones_like(t))", "forward/situ-4-25-fast", _SGL),
    _one("situ-quotient-for-other-scales-too", "eager_activation", 'if form == "quotient" and (act.alpha, act.beta) == (4.0, 25.0):', 'if form == "quotient":', "forward/situ-2-8-precise", _SGL),
    _one("situ-quotient-up-not-scaled", "eager_activation", "quarter = up * _fp32(0.04, up) if act.fast_math else up / beta", "quarter = up", "forward/situ-4-25-fast", _SGL),
    _one("situ-tanhf-alpha-not-multiplied-back", "eager_activation", "return (alpha * _tanh(gate / alpha)) * _sigmoid(gate, act)", "return _tanh(gate / alpha) * _sigmoid(gate, act)", "forward/situ-2-8-precise", _SGL),
]  # fmt: skip

# --- shared expert --------------------------------------------------------------------------------

_H = "forward/shared-*"
_SHARED_LINEAR = "values = activate(linear(x, sf, w13, w13_sf), one, problem.act, self.contract)"
_SHARED_OUT = "return linear(*requantise(values, self.contract), w2, w2_sf).to(torch.bfloat16)"
_PLACE = 'at = 0 if contract.shared_expert.value == "first" else len(rows)'
_OUTPUT = "return y if output is None else y + output"
_SHARED_ROW = "rows.insert(at, (shared, one, one.bool()))"
SHARED = [
    _one("shared-row-twice", "eager_combine", _SHARED_ROW, _SHARED_ROW + "\n        rows.insert(at, (shared, one, one.bool()))", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-row-lost-where-all-is-masked", "eager_combine", _SHARED_ROW, "rows.insert(at, (shared, one, live.any(1, keepdim=True)))", "forward/shared-expert-lost-without-routed-slots", _NEW),
    _one("shared-row-lost-where-a-slot-is-masked", "eager_combine", _SHARED_ROW, "rows.insert(at, (shared, one, live.all(1, keepdim=True)))", "forward/shared-expert-lost-without-routed-slots", _NEW),
    _one("shared-row-last-in-2026-11", "eager_combine", _PLACE, "at = len(rows)", "forward/shared-expert-added-at-another-place", _NEW),
    _one("shared-row-first-in-2026-09", "eager_combine", _PLACE, "at = 0", "forward/shared-expert-added-at-another-place", "2026-09"),
    _one("shared-row-third", "eager_combine", _PLACE, "at = 2", "forward/shared-expert-added-at-another-place", _NEW),
    _one("shared-row-added-to-y-after-its-rounding", "eager_combine", _SHARED_ROW, "output = shared", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-row-weighted-by-slot-0", "eager", "one = torch.ones(len(x), 1, dtype=torch.float32, device=x.device)", "one = problem.topk_weights[:, :1]", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-gate-and-up-swapped", "eager", _SHARED_LINEAR, _SHARED_LINEAR.replace("linear(x, sf, w13, w13_sf)", "linear(x, sf, w13, w13_sf).roll(len(w13) // 2, 1)"), "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-expert-of-the-routed-width", "eager", _SHARED_LINEAR, _SHARED_LINEAR + "\n        values[:, problem.intermediate_size :] = 0", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-expert-of-128-channels", "eager", _SHARED_LINEAR, _SHARED_LINEAR + "\n        values[:, 128:] = 0", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-activations-not-requantised", "eager", _SHARED_OUT, "codes, scale = requantise(values.bfloat16().float(), self.contract)\n        return linear(codes, scale, w2, w2_sf).to(torch.bfloat16)", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-row-truncated-to-bf16", "eager", _SHARED_OUT, "out = linear(*requantise(values, self.contract), w2, w2_sf)\n        return (out.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-weights-lose-their-sign", "eager", "w = table[weight.int()].view(len(weight), groups, GROUP)", "w = table[weight.int() & 0x7F].view(len(weight), groups, GROUP)", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-scales-of-group-0", "eager", "_ue8m0_values(weight_sf).t()\n    acc = torch.zeros(len(codes)", "_ue8m0_values(weight_sf[:, :1].expand_as(weight_sf)).t()\n    acc = torch.zeros(len(codes)", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-last-group-lost", "eager", "for group in range(groups):", "for group in range(groups - 1):", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("shared-rows-of-the-token-before", "eager", _SHARED_OUT, _SHARED_OUT + ".roll(1, 0)", "forward/shared-expert-wider-than-the-routed-ones", _NEW),
    _one("output-added-before-y-is-rounded", "eager_combine", "    y = acc.to(torch.bfloat16)", "    if output is not None:\n        return (acc + output.float()).to(torch.bfloat16)\n    y = acc.to(torch.bfloat16)", "forward/shared-output-added-in-fp32", _NEW),
    _one("output-added-where-a-slot-is-live", "eager_combine", _OUTPUT, "return y if output is None else y + torch.where(live.all(1, keepdim=True), output, 0.0)", "forward/shared-output-lost-where-slots-are-masked", _NEW),
    _one("output-subtracted", "eager_combine", _OUTPUT, "return y if output is None else y - output", "forward/shared-output-added-in-fp32", _NEW),
    _one("output-replaces-y", "eager_combine", _OUTPUT, "return y if output is None else output", "forward/shared-output-added-in-fp32", _NEW),
    _one("output-sum-truncated", "eager_combine", _OUTPUT, "return y if output is None else ((y.float() + output.float()).view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", "forward/shared-output-added-in-fp32", _NEW),
    _one("output-sum-tie-away-from-zero", "eager_combine", _OUTPUT, "total = y.float() if output is None else y.float() + output.float()\n    return " + at_bf16_ties("total", "(1 + 2.0**-20)") + ".to(torch.bfloat16)", "forward/shared-output-added-in-fp32", _NEW),
]  # fmt: skip

# --- slot rows as E4M3 ------------------------------------------------------------------------------

_F = "forward/fp8-combine-*"
_GROUPS = "groups = row.float().unflatten(-1, (-1, FP8_COMBINE_GROUP))"
_BYTE = "byte = ue8m0_ceil(group_amax(groups, contract) * RECIP_448.to(row.device)).unsqueeze(-1)"
_CODES = "codes = e4m3_codes((groups.double() * factor).float(), contract)"
_ADD = "total = fma(*_fp8(row, contract), acc)"
_FACTOR = "factor = torch.where(byte == 255, -torch.inf, torch.exp2(127.0 - byte.double()))"
FP8 = [
    _one("fp8-rows-left-in-bf16", "eager_combine", _ADD, "total = acc + row.float()", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-group-of-32", "eager_combine", _GROUPS, _GROUPS.replace("FP8_COMBINE_GROUP", "32"), "forward/fp8-combine-scale-of-another-group", _SGL),
    _one("fp8-group-of-64", "eager_combine", _GROUPS, _GROUPS.replace("FP8_COMBINE_GROUP", "64"), "forward/fp8-combine-scale-of-another-group", _SGL),
    _one("fp8-group-of-the-row", "eager_combine", _GROUPS, _GROUPS.replace("FP8_COMBINE_GROUP", "row.shape[-1]"), "forward/fp8-combine-scale-of-another-group", _SGL),
    _one("fp8-scale-of-the-next-group", "eager_combine", _BYTE, _BYTE + ".roll(1, 1)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-scale-rounded-down", "eager_combine", _BYTE, "byte = ((group_amax(groups, contract) * RECIP_448).view(torch.int32) >> 23).unsqueeze(-1)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-scale-one-up", "eager_combine", _BYTE, _BYTE + " + 1", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-scale-floored-at-1e-4", "eager_combine", _BYTE, _BYTE.replace("group_amax(groups, contract)", "group_amax(groups, contract).clamp_min(1e-4)"), "forward/fp8-combine-tiny-rows-floored", _SGL),
    _one("fp8-scale-not-a-power-of-two", "eager_combine", _FACTOR, "factor = 448.0 / group_amax(groups, contract).double().unsqueeze(-1).clamp_min(1e-30)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-codes-truncated", "eager_combine", _CODES, "codes = e4m3_codes(((groups.double() * factor).float().view(torch.int32) & ~0xFFFFF).view(torch.float32), contract)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-tie-away-from-zero", "eager_combine", _CODES, "v = groups.double() * factor\n    tie = (v.float().view(torch.int32) & 0xFFFFF) == 0x80000\n    codes = e4m3_codes(torch.where(tie, v * (1 + 2.0**-20), v), contract)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-subnormal-codes-flushed", "eager_combine", _CODES, _CODES + "\n    codes = torch.where((codes & 0x7F) < 8, codes & 0x80, codes)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-shared-row-left-in-bf16", "eager_combine", _ADD, "total = acc + row.float() if row is shared else fma(*_fp8(row, contract), acc)", "forward/fp8-combine-shared-expert", _SGL),
    _one("fp8-masked-row-takes-part", "eager_combine", "acc = torch.where(takes_part, total, acc)", "acc = torch.where(takes_part | (dtype == 'fp8'), total, acc) if not takes_part.all() else total + 1", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-weighted-once-more", "eager_combine", _ADD, "value, scale = _fp8(row, contract)\n            total = fma(value * weight, scale, acc)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-row-doubled-by-bias-126", "eager_combine", "torch.exp2(byte.double() - 127.0)", "torch.exp2(byte.double() - 126.0)", "forward/fp8-combine-wide-scales", _SGL),
    _one("fp8-scale-0-of-a-zero-row-is-nan", "eager_combine", _BYTE, _BYTE + "\n    byte = torch.where(byte == 0, 255, byte)", "forward/fp8-combine-zero-rows", _SGL),
]  # fmt: skip

# --- NVFP4 ------------------------------------------------------------------------------------------

_N = "forward/nvfp4-*"
_TOKEN = "x_scale = _amax(value).clamp_min(_fp32(1e-12, value)) * _fp32(1 / 2688, value)"
_SF = "sf = _e4m3(_amax(groups) * _fp32(1 / 6, value))"
_NUMBERS = "numbers = e2m1(groups / sf).nan_to_num(nan=0.0)"
_R_SF = "sf = _e4m3(torch.minimum(_amax(groups), divisor * _MOST) / divisor)"
_R_NUMBERS = "numbers = e2m1(groups * (1.0 / (sf * scale))).nan_to_num(nan=_NAN_BECOMES)"
_SCALED = "gate_up *= x_scale[token] * factor_13[expert]"
_DOWN = "slots[token, slot] = (down * (factor_2[expert] * layer_scale)).to(torch.bfloat16)"
_E4M3 = "return in_range.to(torch.float8_e4m3fn).float()"
_CLAMP = "in_range = quotient.clamp(_LEAST, _MOST)"
_CODE = "code = torch.where(below % 2 == 0, below, above)  # the two differ in a tie only"
_NIBBLES = "nibbles = torch.stack([packed & 15, packed >> 4], dim=-1)"
_FMA = "total = fma(row.float(), weight, acc)"
NVFP4 = [
    _one("nvfp4-factor-of-w13-lost", "eager_nvfp4", _SCALED, "gate_up *= x_scale[token]", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-factor-of-w2-lost", "eager_nvfp4", _DOWN, _DOWN.replace("(factor_2[expert] * layer_scale)", "layer_scale"), "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-factor-of-expert-0", "eager_nvfp4", _DOWN, _DOWN.replace("factor_2[expert]", "factor_2[0]"), "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-factors-kept-by-their-shape", "eager_nvfp4", "factor_13, factor_2 =", "factor_13, factor_2 = globals().setdefault('KEPT', {}).setdefault(problem.w13_weight.shape, problem.expert_factors.values())\n    _ =", "property/nvfp4-other-weights-broken", _NEW),
    _one("nvfp4-factors-swapped", "eager_nvfp4", "factor_13, factor_2 =", "factor_2, factor_13 =", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-token-scale-of-token-0", "eager_nvfp4", _SCALED, _SCALED.replace("x_scale[token]", "x_scale[0]"), "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    *(_one(f"nvfp4-token-scale-times-{of}", "eager_nvfp4", _TOKEN, _TOKEN + f" * {of}", "forward/nvfp4-token-scale-an-octave-off", _NEW) for of in (2, 4)),
    *(_one(f"nvfp4-token-floor-{floor}", "eager_nvfp4", _TOKEN, _TOKEN.replace("1e-12", floor), "forward/nvfp4-token-floor-an-octave-off", _NEW) for floor in ("2e-12", "5e-13")),
    _one("nvfp4-layer-scale-lost", "eager_nvfp4", _DOWN, _DOWN.replace(" * layer_scale", ""), "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-sum-rounded-to-bf16-before-its-factor", "eager_nvfp4", _SCALED, "gate_up = gate_up.to(torch.bfloat16).float() * (x_scale[token] * factor_13[expert])", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-row-rounded-to-bf16-before-its-factor", "eager_nvfp4", _DOWN, "slots[token, slot] = (down.to(torch.bfloat16).float() * (factor_2[expert] * layer_scale)).to(torch.bfloat16)", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-row-truncated-to-bf16", "eager_nvfp4", _DOWN, "slots[token, slot] = ((down * (factor_2[expert] * layer_scale)).view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-tie-away-from-zero", "eager_nvfp4", _CODE, "code = above", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-tie-toward-zero", "eager_nvfp4", _CODE, "code = below", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-tie-to-odd", "eager_nvfp4", _CODE, "code = torch.where(below % 2 == 1, below, above)", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-codes-truncated", "eager_nvfp4", _CODE, "code = torch.bucketize(size, numbers, right=True) - 1", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-three-quarters-read-as-a-half", "eager_nvfp4", "between = (numbers[1:] + numbers[:-1]) / 2", "between = (numbers[1:] + numbers[:-1]) / 2\n    between[1] = 0.8", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-scale-truncated", "eager_nvfp4", _E4M3, "return (in_range.view(torch.int32) & ~0xFFFFF).view(torch.float32)", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-scale-rounded-up", "eager_nvfp4", _E4M3, "near = in_range.to(torch.float8_e4m3fn)\n    return torch.where(near.float() < in_range, (near.view(torch.uint8) + 1).view(torch.float8_e4m3fn).float(), near.float())", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-scale-tie-away-from-zero", "eager_nvfp4", _CLAMP, "in_range = quotient.clamp(_LEAST, _MOST)\n    in_range = torch.where((in_range.view(torch.int32) & 0xFFFFF) == 0x80000, in_range * (1 + 2.0**-20), in_range)", "forward/nvfp4-bell-data-drifts", _NEW),
    _one("nvfp4-scale-not-rounded", "eager_nvfp4", _E4M3, "return in_range", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-scale-below-the-least-is-zero", "eager_nvfp4", _CLAMP, "in_range = quotient.clamp(0.0, _MOST)", "forward/nvfp4-nan-counts-in-a-scale", _NEW),
    _one("nvfp4-scale-at-least-2e-6", "eager_nvfp4", _CLAMP, "in_range = quotient.clamp(2.0**-6, _MOST)", "forward/nvfp4-nan-counts-in-a-scale", _NEW),
    _one("nvfp4-scale-capped-at-240", "eager_nvfp4", "_LEAST, _MOST = 2.0**-9, 448.0", "_LEAST, _MOST = 2.0**-9, 240.0", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-amax-over-32", "eager_nvfp4", _SF, "sf = _e4m3(_amax(groups.unflatten(1, (-1, 2)).flatten(2)).repeat_interleave(2, 1) * _fp32(1 / 6, value))", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-requantised-amax-over-32", "eager_nvfp4", _R_SF, "sf = _e4m3(torch.minimum(_amax(groups.unflatten(1, (-1, 2)).flatten(2)).repeat_interleave(2, 1), divisor * _MOST) / divisor)", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-nan-hidden-becomes-6", "eager_nvfp4", _NUMBERS, _NUMBERS.replace("nan=0.0", "nan=6.0"), "forward/nvfp4-nan-counts-in-a-scale", _NEW),
    _one("nvfp4-nan-activation-becomes-zero", "eager_nvfp4", _R_NUMBERS, _R_NUMBERS.replace("_NAN_BECOMES", "0.0"), "forward/nvfp4-nan-counts-in-a-scale", _NEW),
    _one("nvfp4-nan-counts-in-amax", "eager_nvfp4", "return torch.where(size.isnan(), 0.0, size).amax(-1, keepdim=True)", "return size.amax(-1, keepdim=True)", "forward/nvfp4-nan-counts-in-a-scale", _NEW),
    _one("nvfp4-token-scale-without-a-floor", "eager_nvfp4", _TOKEN, _TOKEN.replace(".clamp_min(_fp32(1e-12, value))", ""), "forward/nvfp4-token-scale-without-its-floor", _NEW),
    _one("nvfp4-token-scale-of-448-alone", "eager_nvfp4", _TOKEN, _TOKEN.replace("1 / 2688", "1 / 448"), "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-nibbles-swapped", "eager_nvfp4", _NIBBLES, "nibbles = torch.stack([packed >> 4, packed & 15], dim=-1)", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-weight-scale-of-the-group-before", "eager_nvfp4", "scales = weight_sf.contiguous()", "scales = weight_sf.roll(1, 1).contiguous()", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-weight-scales-lose-subnormals", "eager_nvfp4", "scales = weight_sf.contiguous().view(torch.float8_e4m3fn).double()", "scales = weight_sf.contiguous().view(torch.float8_e4m3fn).double()\n    scales = torch.where(scales < 2.0**-6, 0.0, scales)", "forward/nvfp4-bell-data-drifts", _NEW),
    _one("nvfp4-weights-lose-minus-signs", "eager_nvfp4", "return torch.cat([numbers, -numbers])", "return torch.cat([numbers, numbers])", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-product-rounded-before-the-sum", "eager_combine", _FMA, "total = row.float() * weight + acc", "forward/nvfp4-product-rounded-before-the-sum", _NEW),
    _one("nvfp4-product-rounded-to-bf16-before-the-sum", "eager_combine", _FMA, "total = (row.float() * weight).bfloat16().float() + acc", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-weight-in-the-activation-too", "eager_nvfp4", "acts = activate(gate_up, x_scale[token], problem.act, contract)", "acts = activate(gate_up, x_scale[token], problem.act, contract) * problem.topk_weights[token, slot, None]", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-masked-weight-times-0", "eager_combine", "            total = fma(row.float(), weight, acc)\n", "            takes_part, total = takes_part | True, fma(row.float(), weight * takes_part, acc)\n", "forward/nvfp4-masked-slot-weight-not-finite", _NEW),
    _one("nvfp4-y-flushed", "eager_combine", "    y = acc.to(torch.bfloat16)", f"    y = {flushed('acc')}.to(torch.bfloat16)", "forward/nvfp4-subnormal-rows-flushed", _NEW),
    _one("nvfp4-row-flushed", "eager_nvfp4", "    return combine(slots, live,", f"    slots = {flushed('slots.float()')}.to(torch.bfloat16)\n    return combine(slots, live,", "forward/nvfp4-subnormal-rows-flushed", _NEW),
    _one("nvfp4-y-through-tf32", "eager_combine", "    y = acc.to(torch.bfloat16)", f"    y = {tf32('acc')}.to(torch.bfloat16)", "forward/nvfp4-scale-or-factor-lost-precise", _NEW),
    _one("nvfp4-y-of-minus-zero-is-plus-zero", "eager_combine", "    y = acc.to(torch.bfloat16)", "    y = acc.to(torch.bfloat16)\n    y = torch.where(y == 0, 0.0, y)", "forward/nvfp4-subnormal-rows-flushed", _NEW),
]  # fmt: skip

FEATURES = [*ALPHA_BETA, *STEP, *SITU, *SHARED, *FP8, *NVFP4]
