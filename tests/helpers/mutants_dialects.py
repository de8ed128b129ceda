# ruff: noqa: E501
"""Planted faults in the dialects: formats of other kernels than MegaMoE's."""

from __future__ import annotations

from tests.helpers.mutants import Mutant

_B = "eager_fp8_block"
_NOW, _OLD = "sgl-sm90", "sgl-sm90-0.1.4"
_C = "forward/fp8-block-"
_SCALE = _C + "scale-of-another-block-h512-i512"
_BELL = _C + "bell-precise"
_FACTOR = "factor = 1.0 / scale\n    else"
_OF_BLOCK = "of_block = weight_scale[:, at * run // BLOCK].repeat_interleave(BLOCK)"
_ACC = "acc = fma(scale[:, at, None] * of_block, total, acc)"
_TOTAL = "total = (x[:, here] @ w[:, here].T).float()"
_SLOTS = "slots[token, slot] = down.to(torch.bfloat16)"
_WEIGHT = "        value = value * routing\n"
_STAGE = "scale = torch.maximum(_amax(groups), floor) / torch.full_like(floor, 448.0)"
_AMAX = "amax = torch.maximum(_amax(groups), _fp32(contract.requant_amax_floor.value, acts))"
_CODES = "codes = e4m3_codes(groups * factor, contract)"
_CLAMP = "gate, up = _clamped(gate, lower, bound, bound), _clamped(up, -bound, bound, of_nan)"


def _one(name: str, old: str, new: str, case: str, contract: str = _NOW) -> Mutant:
    return Mutant.of(f"fp8-block-{name}", _B, old, new, case, contract)


FP8_BLOCK = [
    _one("scale-of-the-block-beside", _OF_BLOCK, _OF_BLOCK.replace("[:, at * run // BLOCK]", ".roll(1, 1)[:, at * run // BLOCK]"), _SCALE),
    _one("scale-of-the-block-above", _OF_BLOCK, _OF_BLOCK.replace("[:, at * run // BLOCK]", ".roll(1, 0)[:, at * run // BLOCK]"), _SCALE),
    _one("scale-of-the-gate-for-up", _OF_BLOCK, _OF_BLOCK + "\n        of_block = torch.where(torch.arange(len(of_block)) < len(of_block) // 2, of_block, of_block.roll(len(of_block) // 2)) if run == BLOCK else of_block", _SCALE),
    _one("scale-of-64-rows", _OF_BLOCK, _OF_BLOCK + "\n        of_block = of_block.roll(64)", _SCALE),
    _one("scale-of-the-row-above", _ACC, _ACC.replace("scale[:, at, None]", "scale.roll(1, 0)[:, at, None]"), _SCALE),
    _one("scale-of-w2-by-its-run", _OF_BLOCK, _OF_BLOCK.replace("at * run // BLOCK", "at % weight_scale.shape[1]"), _SCALE),
    _one("scale-a-power-of-two", _FACTOR, "byte = ue8m0_ceil(scale)\n        scale, factor = _power(byte), _power(254 - byte)\n    else", _C + "activation-scale-rounded-to-a-power-of-two"),
    _one("scale-continuous-in-0-1-4", 'if contract.requant_scale.value == "continuous":', "if True:", _C + "activation-scale-rounded-to-a-power-of-two", _OLD),
    _one("staged-scale-a-power-of-two", _STAGE, _STAGE + "\n    scale = _power(ue8m0_ceil(scale))", _BELL),
    _one("staged-by-the-quotient", 'quotient = contract.activation_scale.value == "quotient"', "quotient = True", _C + "staged-by-a-quotient"),
    _one("staged-per-64", "(-1, contract.activation_group.value)", "(-1, 64)", _BELL),
    _one("staged-without-a-floor", _STAGE, "scale = (_amax(groups) / 448.0).clamp_min(1e-38)", _C + "tiny-hidden-states-below-the-floor"),
    _one("staged-with-vllm-s-floor", _STAGE, _STAGE.replace("floor)", "floor * 1e6)"), _C + "tiny-hidden-states-below-the-floor"),
    *(_one(f"staged-scale-times-{of}", _STAGE, _STAGE + f" * {of}", _C + "staged-an-octave-off") for of in (2, 4)),
    *(_one(f"staged-floor-times-{of}", _STAGE, _STAGE.replace(", floor)", f", floor * {of})"), _C + "floor-an-octave-off") for of in (2, 0.5)),
    _one("requantised-per-128", "(-1, contract.requant_group.value)", "(-1, 128)", _C + "one-scale-for-128-activations"),
    _one("requantised-per-32", "(-1, contract.requant_group.value)", "(-1, 32)", _BELL),
    _one("requantised-without-a-floor", _AMAX, "amax = _amax(groups).clamp_min(1e-38)", _C + "routing-weight-after-the-floor"),
    _one("requantised-with-a-floor-in-0-1-4", _AMAX, "amax = torch.maximum(_amax(groups), _fp32(1e-10, acts))", _C + "routing-weight-after-the-floor", _OLD),
    _one("codes-truncated", _CODES, "codes = e4m3_codes(((groups * factor).view(torch.int32) & -(1 << 20)).view(torch.float32), contract)", _SCALE),
    _one("stored-scale-is-not-the-used-one", _CODES, _CODES + "\n    scale = scale * (1 + 2.0**-7)", _SCALE),
    _one("gate-and-up-rounded-to-bf16", 'if contract.gate_up.value == "bf16":', "if True:", _C + "gate-and-up-rounded-to-bf16"),
    _one("gate-and-up-swapped", "gate, up = gate_up.chunk(2, dim=-1)", "up, gate = gate_up.chunk(2, dim=-1)", _SCALE),
    _one("activations-rounded-to-bf16", "if contract.bf16_before_requant.value else value", "", _C + "gate-and-up-rounded-to-bf16"),
    _one("clamp-bound-in-bf16", "bound = _fp32(act.clamp, gate)", "bound = _fp32(act.clamp, gate).bfloat16().float()", _C + "clamp-bound-rounded-to-bf16"),
    _one("clamp-of-the-gate-below-too", "lower = -bound if contract.gate_clamped_below.value else _fp32(-torch.inf, gate)", "lower = -bound", _C + "clamp-bound-rounded-to-bf16"),
    _one("clamp-of-up-missing", _CLAMP, "gate = _clamped(gate, lower, bound, bound)", _C + "clamp-bound-rounded-to-bf16"),
    _one("clamp-of-the-gate-missing", _CLAMP, "up = _clamped(up, -bound, bound, of_nan)", _C + "clamp-bound-rounded-to-bf16"),
    _one("clamp-lets-nan-through", "return torch.where(value.isnan(), of_nan, value.clamp(low, high))", "return value.clamp(low, high)", _C + "nan-token-becomes-the-bound"),
    _one("clamp-nan-of-up-becomes-the-lower-bound", 'of_nan = bound if contract.clamp_nan.value == "upper" else -bound', "of_nan = -bound", _C + "nan-token-becomes-the-bound"),
    _one("weight-dropped", _WEIGHT, "        pass\n", _SCALE),
    _one("weight-of-slot-0", "problem.topk_weights[token, slot]", "problem.topk_weights[token, 0]", _SCALE),
    Mutant("fp8-block-weight-after-the-rows", _C + "routing-weight-in-the-combine", [(_B, _WEIGHT, "        pass\n"), (_B, _SLOTS, "slots[token, slot] = (down.to(torch.bfloat16) * routing.bfloat16()).to(torch.bfloat16)")], _NOW),
    Mutant("fp8-block-weight-after-linear-2", _C + "routing-weight-after-the-floor", [(_B, _WEIGHT, "        pass\n"), (_B, _SLOTS, "slots[token, slot] = (down * routing).to(torch.bfloat16)")], _NOW),
    _one("weight-in-bf16", _WEIGHT, "        value = value * routing.bfloat16().float()\n", _SCALE),
    _one("row-truncated-to-bf16", _SLOTS, "slots[token, slot] = (down.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", _SCALE),
    _one("row-not-rounded-to-bf16", _SLOTS, "slots[token, slot] = (down + down * 2.0**-8).to(torch.bfloat16)", _SCALE),
    _one("runs-in-another-order", "for at in range(scale.shape[1]):", "for at in reversed(range(scale.shape[1])):", _C + "runs-added-in-another-order"),
    _one("run-rounded-to-bf16", _TOTAL, _TOTAL + "\n        total = total.bfloat16().float()", _BELL),
    _one("sum-in-bf16", _ACC, _ACC.replace("acc = fma", "acc = fma") + "\n        acc = acc.bfloat16().float()", _BELL),
    _one("sum-of-many-rows-divided-by-the-next-scale", _ACC, "if at and len(codes) >= 64:\n            acc = acc * (1.0 / (scale[:, at, None] * of_block)) * (scale[:, at, None] * of_block)\n        " + _ACC, _C + "zero-row-among-64-of-one-expert", _OLD),
    _one("last-run-lost", "for at in range(scale.shape[1]):", "for at in range(scale.shape[1] - 1):", _SCALE),
    _one("codes-lose-subnormals", "x, w = (t.view(torch.float8_e4m3fn).double() for t in (codes, weight.contiguous()))", "x, w = (torch.where((t & 0x78) == 0, 0.0, t.view(torch.float8_e4m3fn).double()) for t in (codes, weight.contiguous()))", _C + "every-code"),
    _one("masked-slot-takes-part", "live = (ids >= 0) & (ids < problem.num_experts)", "live = (ids >= 0) & (ids < problem.num_experts)\n    slots[~live] = 1.0\n    live = live | True\n    ids = ids.clamp_min(0)", _C + "masked-slots-and-zero-rows"),
    _one("expert-of-the-id-before", "problem.w13_weight[expert],\n", "problem.w13_weight[expert - 1],\n", _SCALE),
    Mutant("fp8-block-combine-backwards", _C + "slots-of-one-expert-cancel", [("eager_combine", "    order = list(range(slots.shape[1]))\n", "    order = list(range(slots.shape[1]))[::-1]\n")], _NOW),
]  # fmt: skip

# Each is right in one call, or within the class: only a law of the layer shows it.
_P = "property/fp8-block-"
_ZEROS = "torch.zeros(len(codes), len(weight), dtype=torch.float32, device=codes.device)"
_RUNS = "for at in range(scale.shape[1]):"
FP8_BLOCK_LAWS = [
    _one("order-of-runs-by-the-number-of-rows", _RUNS, "for at in range(scale.shape[1])[:: 1 if len(codes) < 2 else -1]:", _P + "batch-invariance-broken-by-the-order-of-runs"),
    Mutant("fp8-block-order-of-runs-by-the-capacity", _P + "capacity-broken-by-the-order-of-runs", [(_B, "codes, scale = stage(problem.hidden_states, contract)", "globals()['WIDE'] = problem.max_num_tokens > 400\n    codes, scale = stage(problem.hidden_states, contract)"), (_B, _RUNS, "for at in range(scale.shape[1])[:: -1 if WIDE else 1]:")], _NOW),
    _one("weights-kept-by-their-shape", "problem.w13_weight[expert],\n", "globals().setdefault('KEPT', {}).setdefault((problem.w13_weight.shape, expert), problem.w13_weight[expert]),\n", _P + "other-weights-broken"),
    Mutant("fp8-block-sum-starts-from-the-last-call", _P + "stale-buffer-broken", [(_B, f"acc = {_ZEROS}", f"acc = 0.0 * globals().setdefault('LAST', {{}}).get((len(codes), len(weight)), {_ZEROS})"), (_B, "    return acc\n", "    LAST[len(codes), len(weight)] = acc\n    return acc\n")], _NOW),
]  # fmt: skip

# --- MXFP4 beside bfloat16 -----------------------------------------------------------------------

_W = "forward/w4a16-"
_ROUND = "gate_up = gate_up.to(torch.bfloat16).float()"
_ACTS = "return (gated * up).to(torch.bfloat16)"
_POWERS = "powers = ((scale.long()"
_TABLE = "table = torch.from_numpy(E2M1_TABLE.copy()).double().to(packed.device)"
_X = "x = rows.double()"
_ADD = "acc = (acc.double() + block).float()"
_COMBINE = "return combine(slots, live, weights, contract)"
_FOLD = 'if contract.routing_weight.value == "accumulator":'
_HALVES = "gate, up = gate_up.chunk(2, dim=-1)"
_DOWN = "down = product(activate(gate_up, problem.act, contract), w2, contract)"


def _w4a16(name: str, old: str, new: str, case: str) -> Mutant:
    return Mutant.of(f"w4a16-{name}", "eager_w4a16", old, new, _W + case, "w4a16")


def _sources(name: str, case: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(f"w4a16-{name}", _W + case, [("eager_w4a16", *edit) for edit in edits], "w4a16")


W4A16 = [
    _w4a16("scale-of-the-group-beside", _POWERS, "powers = ((scale.roll(1, 1).long()", "scale-of-another-group-h640-i384"),
    _w4a16("scale-of-the-row-above", _POWERS, "powers = ((scale.roll(1, 0).long()", "scale-of-another-group-h640-i384"),
    _w4a16("scale-of-the-other-half", _POWERS, "powers = ((scale.roll(len(scale) // 2, 0).long()", "scale-of-another-group-h640-i384"),
    _w4a16("scale-of-64-values", _POWERS, "powers = ((scale[:, ::2].repeat_interleave(2, 1).long()", "scale-of-another-group-h640-i384"),
    _w4a16("scale-above-250-saturates", _POWERS, "powers = ((scale.clamp_max(250).long()", "scale-bytes-251-and-60"),
    _w4a16("scale-below-3-is-3", _POWERS, "powers = ((scale.clamp_min(3).long()", "scale-bytes-2-and-251"),
    _w4a16("nibbles-in-the-other-order", "[packed & 15, packed >> 4]", "[packed >> 4, packed & 15]", "scale-of-another-group-h640-i384"),
    _w4a16("code-of-a-half-is-zero", _TABLE, _TABLE + "\n    table[table.abs() == 0.5] = 0.0", "every-code"),
    _w4a16("code-of-six-is-eight", _TABLE, _TABLE + "\n    table[table.abs() == 6.0] *= 4 / 3", "every-code"),
    _w4a16("weights-in-e5m2", "return (table[codes].unflatten(-1, (-1, GROUP)) * powers.unsqueeze(-1)).flatten(-2)", "return (table[codes].unflatten(-1, (-1, GROUP)) * powers.unsqueeze(-1)).flatten(-2).clamp(-57344.0, 57344.0)", "scale-bytes-251-and-60"),
    _w4a16("operands-quantised-to-e4m3", _X, "x = rows.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()", "operand-quantised"),
    _w4a16("operands-in-fp16", _X, "x = rows.half().double()", "scale-bytes-2-and-251"),
    _w4a16("activations-quantised-to-e4m3", _ACTS, "return (gated * up).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16)", "operand-quantised"),
    _w4a16("gate-and-up-kept-in-fp32", 'if contract.gate_up.value == "bf16":', "if False:", "gate-and-up-kept-in-fp32"),
    _w4a16("gate-and-up-truncated", _ROUND, "gate_up = (gate_up.view(torch.int32) & -65536).view(torch.float32)", "gate-and-up-kept-in-fp32"),
    _w4a16("gate-and-up-tie-away-from-zero", _ROUND, "gate_up = ((gate_up.view(torch.int32) + 0x8000) & -65536).view(torch.float32)", "gate-and-up-kept-in-fp32"),
    _w4a16("gate-and-up-swapped", _HALVES, "up, gate = gate_up.chunk(2, dim=-1)", "scale-of-another-group-h640-i384"),
    _w4a16("gate-and-up-interleaved", _HALVES, "gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)", "scale-of-another-group-h640-i384"),
    _w4a16("silu-rounded-to-bf16", 'if contract.silu_type.value == "bf16":', "if True:", "silu-rounded-to-bf16"),
    _w4a16("silu-of-gpt-oss", "denominator = 1.0 + (-gate)", "denominator = 1.0 + (-1.702 * gate)", "silu-rounded-to-bf16"),
    _w4a16("up-plus-one", _ACTS, "return (gated * (up + 1.0)).to(torch.bfloat16)", "silu-rounded-to-bf16"),
    _w4a16("activations-kept-in-fp32", _ACTS, "return gated * up", "silu-rounded-to-bf16"),
    _w4a16("activations-truncated", _ACTS, "return ((gated * up).view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", "silu-rounded-to-bf16"),
    _w4a16("clamp-bound-in-bf16", "bound = torch.tensor(act.clamp, dtype=torch.float32, device=gate.device)", "bound = torch.tensor(act.clamp, device=gate.device).bfloat16().float()", "clamp-bound-rounded-to-bf16"),
    _w4a16("clamp-of-the-gate-below-too", "lower = -bound if contract.gate_clamped_below.value else torch.full_like(bound, -torch.inf)", "lower = -bound", "clamp-bound-rounded-to-bf16"),
    _w4a16("clamp-of-up-missing", "gate, up = _clamped(gate, lower, bound, bound), _clamped(up, -bound, bound, of_nan)", "gate = _clamped(gate, lower, bound, bound)", "clamp-bound-rounded-to-bf16"),
    _w4a16("clamp-lets-nan-through", "return torch.where(value.isnan(), of_nan, value.clamp(low, high))", "return value.clamp(low, high)", "nan-token-becomes-the-bound"),
    _w4a16("clamp-nan-of-up-becomes-the-lower-bound", 'of_nan = bound if contract.clamp_nan.value == "upper" else -bound', "of_nan = -bound", "nan-token-becomes-the-bound"),
    _w4a16("nan-becomes-zero", _X, "x = rows.double().nan_to_num(0.0, torch.inf, -torch.inf)", "nan-token-becomes-nan"),
    _w4a16("infinity-becomes-zero", _X, "x = rows.double().nan_to_num(torch.nan, 0.0, 0.0)", "nan-token-becomes-nan"),
    _w4a16("weight-dropped", _COMBINE, "return combine(slots, live, torch.ones_like(weights), contract)", "routing-weight-rounded-to-bf16"),
    _w4a16("weight-of-slot-0", _COMBINE, "return combine(slots, live, weights[:, :1].expand_as(weights), contract)", "scale-of-another-group-h640-i384"),
    _w4a16("weight-rounded-to-bf16", 'if contract.routing_type.value == "bf16":', "if True:", "routing-weight-rounded-to-bf16"),
    _sources("weight-before-the-row-is-rounded", "routing-weight-before-the-row-is-rounded", (_FOLD, "if True:"), (_COMBINE, "return combine(slots, live, torch.ones_like(weights), contract)")),
    _sources("weight-in-the-activations", "routing-weight-before-the-row-is-rounded", (_DOWN, "down = product((activate(gate_up, problem.act, contract).float() * weights[token, slot].unsqueeze(-1)).to(torch.bfloat16), w2, contract)"), (_COMBINE, "return combine(slots, live, torch.ones_like(weights), contract)")),
    _sources("weight-rounded-with-the-row", "routing-weight-before-the-row-is-rounded", ("slots[token, slot] = down.to(torch.bfloat16)", "slots[token, slot] = (down.to(torch.bfloat16) * weights[token, slot].unsqueeze(-1)).to(torch.bfloat16)"), (_COMBINE, "return combine(slots, live, torch.ones_like(weights), contract)")),
    _w4a16("row-truncated-to-bf16", "slots[token, slot] = down.to(torch.bfloat16)", "slots[token, slot] = (down.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)", "scale-of-another-group-h640-i384"),
    _w4a16("sum-in-bf16", _ADD, "acc = (acc.double() + block).bfloat16().float()", "bell-precise"),
    _w4a16("block-rounded-to-bf16", _ADD, "acc = (acc.double() + block.bfloat16()).float()", "bell-precise"),
    _w4a16("last-block-lost", "for at in range(0, x.shape[1], GROUP):", "for at in range(0, x.shape[1] - GROUP, GROUP):", "scale-of-another-group-h640-i384"),
    _w4a16("blocks-beyond-64-lost", "for at in range(0, x.shape[1], GROUP):", "for at in range(0, min(x.shape[1], 2048), GROUP):", "sums-of-4096"),
    _w4a16("rows-beyond-64-lost", "token, slot = (ids == expert).nonzero(as_tuple=True)", "token, slot = (t[:64] for t in (ids == expert).nonzero(as_tuple=True))", "rows-of-one-expert-t65"),
    _w4a16("masked-slot-takes-part", "live = (ids >= 0) & (ids < problem.num_experts)", "live = (ids >= 0) & (ids < problem.num_experts)\n    live, slots[~live] = live | True, 1.0\n    ids = ids.clamp_min(0)", "masked-slots-and-zero-rows"),
    _w4a16("masked-weight-times-zero", _COMBINE, "return combine(slots, live | True, weights, contract)", "masked-slots-and-zero-rows"),
    _w4a16("expert-of-the-id-before", "w13 = decoded(problem.w13_weight[expert], ", "w13 = decoded(problem.w13_weight[expert - 1], ", "scale-of-another-group-h640-i384"),
    Mutant("w4a16-combine-backwards", _W + "slots-of-one-expert-cancel", [("eager_combine", "    order = list(range(slots.shape[1]))\n", "    order = list(range(slots.shape[1]))[::-1]\n")], "w4a16"),
    Mutant("w4a16-combine-in-bf16", _W + "routing-weight-before-the-row-is-rounded", [("eager_combine", "        acc = torch.where(takes_part, total, acc)\n", "        acc = torch.where(takes_part, total, acc).bfloat16().float()\n")], "w4a16"),
]  # fmt: skip

# --- MXFP4 and E4M3 rows with one scale each -------------------------------------------------------

_SCALE_OF = "scale = torch.maximum(amax / torch.full_like(floor, 448.0), floor)"
_OF_ROW = "amax = values.abs().nan_to_num(0.0, torch.inf).amax(-1, keepdim=True)"
_QUANTISED = (
    "return e4m3_codes(values / scale if quotient else values * (1.0 / scale), contract), scale"
)
_SCALED = "return linear(codes.view(torch.float8_e4m3fn), weights) * scale"


def _w4a8(name: str, old: str, new: str, case: str, module: str = "eager_w4a8_token") -> Mutant:
    return Mutant.of(
        f"w4a8-token-{name}", module, old, new, f"forward/w4a8-token-{case}", "w4a8-token"
    )


W4A8_TOKEN = [
    _w4a8("scale-of-the-row-above", _SCALED, _SCALED.replace("* scale", "* scale.roll(1, 0)"), "scale-of-another-row"),
    _w4a8("scale-of-the-batch", _OF_ROW, "amax = values.abs().nan_to_num(0.0, torch.inf).amax().expand(len(values), 1)", "scale-of-another-row"),
    _w4a8("scale-of-half-a-row", _OF_ROW, "amax = values[:, :128].abs().nan_to_num(0.0, torch.inf).amax(-1, keepdim=True)", "codes-truncated"),
    _w4a8("scale-a-power-of-two", _SCALE_OF, _SCALE_OF + "\n    scale = scale.log2().ceil().exp2()", "codes-truncated"),
    _w4a8("scale-in-bf16", _SCALE_OF, _SCALE_OF + "\n    scale = scale.bfloat16().float()", "codes-truncated"),
    _w4a8("scale-without-a-floor", _SCALE_OF, "scale = (amax / 448.0).clamp_min(2.0**-120)", "tiny-rows-below-the-floor"),
    _w4a8("scale-with-a-floor-of-1e-10", _SCALE_OF, _SCALE_OF.replace("floor)", "floor * 1e20)"), "tiny-rows-below-the-floor"),
    *(_w4a8(f"floor-times-{of}", _SCALE_OF, _SCALE_OF.replace(", floor)", f", floor * {of})"), "floor-an-octave-off") for of in (2, 0.5)),
    _w4a8("scale-by-240", _SCALE_OF, _SCALE_OF.replace("448.0", "240.0"), "codes-truncated"),
    _w4a8("scale-dropped", _SCALED, _SCALED.replace(" * scale", ""), "scale-of-another-group-h256-i256"),
    _w4a8("scale-applied-in-bf16", _SCALED, _SCALED.replace("return linear(codes.view(torch.float8_e4m3fn), weights)", "return linear(codes.view(torch.float8_e4m3fn), weights).bfloat16().float()"), "codes-truncated"),
    _w4a8("codes-by-the-quotient", "if quotient else", "if True else", "codes-by-a-quotient"),
    _w4a8("codes-truncated", _QUANTISED, "return e4m3_codes(((values * (1.0 / scale)).view(torch.int32) & -(1 << 20)).view(torch.float32), contract), scale", "codes-truncated"),
    _w4a8("codes-in-bf16-first", _QUANTISED, "return e4m3_codes((values * (1.0 / scale)).bfloat16().float(), contract), scale", "ordinary-data-precise"),
    _w4a8("rows-not-quantised", _SCALED, "return linear(rows, weights)", "codes-truncated"),
    _w4a8("codes-below-normal-lost", _QUANTISED, "wide = values * (1.0 / scale)\n    return e4m3_codes(torch.where(wide.abs() < 2.0**-6, 0.0, wide), contract), scale", "codes-truncated"),
    _w4a8("nan-of-a-row-becomes-zero", "values = rows.float()", "values = rows.float().nan_to_num(0.0, torch.inf, -torch.inf)", "nan-token-becomes-nan"),
    _w4a8("infinity-becomes-the-largest", _QUANTISED, "return e4m3_codes((values * (1.0 / scale)).nan_to_num(448.0), contract), scale", "nan-token-becomes-nan"),
    _w4a8("activations-not-quantised", _DOWN, "down = linear(activate(gate_up, problem.act, contract), w2)", "codes-truncated", "eager_w4a16"),
    _w4a8("hidden-states-not-quantised", "gate_up = product(problem.hidden_states[token], w13, contract)", "gate_up = linear(problem.hidden_states[token], w13)", "codes-truncated", "eager_w4a16"),
    _w4a8("weight-scale-of-the-group-beside", _POWERS, "powers = ((scale.roll(1, 1).long()", "scale-of-another-group-h256-i256", "eager_w4a16"),
    _w4a8("weight-scale-of-the-row-above", _POWERS, "powers = ((scale.roll(1, 0).long()", "scale-of-another-group-h384-i128", "eager_w4a16"),
    _w4a8("gate-and-up-kept-in-fp32", 'if contract.gate_up.value == "bf16":', "if False:", "gate-and-up-kept-in-fp32", "eager_w4a16"),
    _w4a8("activations-kept-in-fp32", _ACTS, "return gated * up", "gate-and-up-kept-in-fp32", "eager_w4a16"),
    _w4a8("clamp-bound-in-bf16", "bound = torch.tensor(act.clamp, dtype=torch.float32, device=gate.device)", "bound = torch.tensor(act.clamp, device=gate.device).bfloat16().float()", "clamp-bound-rounded-to-bf16", "eager_w4a16"),
    _w4a8("weight-dropped", _COMBINE, "return combine(slots, live, torch.ones_like(weights), contract)", "routing-weight-before-the-row-is-rounded", "eager_w4a16"),
    _w4a8("masked-weight-times-zero", _COMBINE, "return combine(slots, live | True, weights, contract)", "masked-slots-and-zero-rows", "eager_w4a16"),
    _w4a8("rows-beyond-64-lost", "token, slot = (ids == expert).nonzero(as_tuple=True)", "token, slot = (t[:64] for t in (ids == expert).nonzero(as_tuple=True))", "rows-of-one-expert-t65", "eager_w4a16"),
    Mutant("w4a8-token-combine-backwards", "forward/w4a8-token-slots-of-one-expert-cancel", [("eager_combine", "    order = list(range(slots.shape[1]))\n", "    order = list(range(slots.shape[1]))[::-1]\n")], "w4a8-token"),
]  # fmt: skip

# Each is within the class, or right in one call: only a law of the layer shows it.
_BLOCKS = "for at in range(0, x.shape[1], GROUP):"
_FIRST_WEIGHTS = "globals().setdefault('FIRST_WEIGHTS', {}).setdefault((problem.w13_weight.shape, expert), problem.w13_weight[expert])"
MXFP4_LAWS = [
    Mutant(
        "w4a16-order-of-k-by-the-number-of-rows",
        "property/w4a16-batch-invariance-broken-by-the-order-of-k",
        [
            (
                "eager_w4a16",
                _BLOCKS,
                "for at in range(0, x.shape[1], GROUP)[:: 1 if len(x) < 2 else -1]:",
            )
        ],
        "w4a16",
    ),
    Mutant(
        "w4a16-weights-kept-by-their-shape",
        "property/w4a16-other-weights-broken",
        [("eager_w4a16", "decoded(problem.w13_weight[expert]", f"decoded({_FIRST_WEIGHTS}")],
        "w4a16",
    ),
    Mutant(
        "w4a8-token-weights-kept-by-their-shape",
        "property/w4a8-token-other-weights-broken",
        [("eager_w4a16", "decoded(problem.w13_weight[expert]", f"decoded({_FIRST_WEIGHTS}")],
        "w4a8-token",
    ),
]

DIALECTS = [*FP8_BLOCK, *FP8_BLOCK_LAWS, *W4A16, *W4A8_TOKEN, *MXFP4_LAWS]
