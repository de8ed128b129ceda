# ruff: noqa: E501
"""Planted faults in the dialects: formats of other kernels than MegaMoE's."""

from __future__ import annotations

from tests.helpers.mutants import Mutant

_B = "eager_fp8_block"
_NOW, _OLD = "sgl-sm90", "sgl-sm90-0.1.4"
_C = "forward/fp8-block-"
_SCALE = _C + "scale-of-another-block-h640-i384"
_BELL = _C + "bell-precise"
_FACTOR = "factor = 1.0 / scale\n    else"
_OF_BLOCK = "of_block = weight_scale[:, at * run // BLOCK].repeat_interleave(BLOCK)"
_ACC = "acc = fma(scale[:, at, None] * of_block, total, acc)"
_TOTAL = "total = (x[:, here] @ w[:, here].T).float()"
_SLOTS = "slots[token, slot] = down.to(torch.bfloat16)"
_WEIGHT = "        value = value * routing\n"
_STAGE = "scale = torch.maximum(_amax(groups), floor) / 448.0"
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

DIALECTS = [*FP8_BLOCK, *FP8_BLOCK_LAWS]
