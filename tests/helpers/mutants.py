# ruff: noqa: E501
"""Planted faults: copies of the code under test, each with one thing wrong.

A mutant is a list of replacements in the source of ``eager`` and of the functions it stands on.
The copy is a package of its own in a temporary folder; the project's modules are not touched.
Here stand faults of whole stages. ``mutants_numbers.py`` has those of single roundings and special
values, ``mutants_places.py`` those of indices and sizes, ``mutants_features.py`` those of features,
``mutants_dialects.py`` those of other formats.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import megamoe
from megamoe.spec.contract import BASE

SOURCES = {
    "eager": "backends/eager.py",
    "eager_activation": "backends/eager_activation.py",
    "eager_combine": "backends/eager_combine.py",
    "eager_nvfp4": "backends/eager_nvfp4.py",
    "eager_fp8_block": "backends/eager_fp8_block.py",
    "eager_w4a16": "backends/eager_w4a16.py",
    "eager_w4a8_token": "backends/eager_w4a8_token.py",
    "staging": "layer/staging.py",
    "eplb": "layer/eplb.py",
    "kernel_weights": "layer/kernel_weights.py",
}


@dataclass(frozen=True)
class Mutant:
    """``edits`` are (module, text, replacement); each text occurs exactly once in its module."""

    name: str
    cases: str
    """Glob of the cases that are run against it; small ones, so that the test is quick."""
    edits: Sequence[tuple[str, str, str]]
    contract: str = BASE.revision
    """Under which it is judged: some features have a rule in one contract only."""

    @classmethod
    def of(
        cls, name: str, module: str, old: str, new: str, cases: str, contract: str = BASE.revision
    ) -> Mutant:
        """A mutant of one edit."""
        return cls(name, cases, [(module, old, new)], contract)


def build(mutant: Mutant, folder: Path) -> Any:
    """The mutated backend. ``AssertionError`` when an edit no longer fits the source."""
    package = "mutant_" + mutant.name.replace("-", "_").replace(".", "_")
    home = folder / package
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("")
    texts = _sources()
    copied = _copied({module for module, _, _ in mutant.edits})
    for module in copied:
        text = texts[module]
        for target, old, new in mutant.edits:
            if target == module:
                assert text.count(old) == 1, f"{mutant.name}: {text.count(old)} times {old!r}"
                text = text.replace(old, new)
        for other in copied:
            text = text.replace(_imported(other), f"from {package}.{other} import")
        (home / f"{module}.py").write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.eager").create(contract=mutant.contract)
    finally:
        sys.path.remove(str(folder))


@cache
def _sources() -> dict[str, str]:
    root = Path(megamoe.__file__).parent
    return {module: (root / path).read_text() for module, path in SOURCES.items()}


def _imported(module: str) -> str:
    return f"from megamoe.{SOURCES[module].partition('/')[0]}.{module} import"


def _copied(edited: set[str]) -> set[str]:
    """``eager``, the edited modules, and those that import one of them: to copy all is slow."""
    names = set(edited)
    while more := {
        name for name, text in _sources().items()
        if name not in names and any(_imported(one) in text for one in names)
    }:  # fmt: skip
        names |= more
    return names | {"eager"}


_one = Mutant.of

_FORWARD = "forward/*"
_BF16 = "gate, up = gate_up.to(torch.bfloat16).float().chunk(2, dim=-1)"
_GATE_CLAMP = "return torch.where((gate > bound) | (gate.isnan() & nan), bound, gate), up"
_UP_LOW = "up = torch.where((up < -bound) | (up.isnan() & nan), -bound, up)"
_UP_HIGH = "up = torch.where(up > bound, bound, up)"
_PRODUCT = "value = gated * up"
_WEIGHT = "value = value * routing"
_AMAX = "requant_exponent(group_amax(groups, contract), contract)"
_EXPONENT = f"exponent = {_AMAX}"
_BYTE = "byte = ue8m0_ceil(amax * RECIP_448.to(amax.device))"
_CODES = (
    "codes = e4m3_codes(scale_down(groups, exponent), contract).flatten(-2)\n    return codes, "
)
_ADD = "acc = torch.where(takes_part, total, acc)"
_SLOTS = "slots[token, slot] = down.to(torch.bfloat16)"
_LOOP = "for row, weight, takes_part in rows:"

FORWARD = [
    _one("gate-up-not-rounded-to-bf16", "eager_activation", _BF16, "gate, up = gate_up.chunk(2, dim=-1)", _FORWARD),
    _one("gate-up-truncated-to-bf16", "eager_activation", _BF16, "gate, up = (gate_up.view(torch.int32) & -65536).view(torch.float32).chunk(2, dim=-1)", _FORWARD),
    _one("gate-up-swapped", "eager_activation", "gate, up = gate_up.to", "up, gate = gate_up.to", _FORWARD),
    _one("gate-up-read-interleaved", "eager_activation", _BF16, "gate, up = gate_up.to(torch.bfloat16).float().unflatten(-1, (-1, 2)).unbind(-1)", _FORWARD),
    _one("gate-not-clamped", "eager_activation", _GATE_CLAMP, "return gate, up", _FORWARD),
    _one("gate-clamped-below-too", "eager_activation", _GATE_CLAMP, "return gate.clamp(-bound, bound), up", _FORWARD),
    _one("up-not-clamped-below", "eager_activation", _UP_LOW, "pass", _FORWARD),
    _one("up-not-clamped-above", "eager_activation", _UP_HIGH, "pass", _FORWARD),
    _one("clamp-bound-not-bf16", "eager_activation", "bound = torch.tensor(act.clamp, dtype=torch.bfloat16, device=\"cpu\").float().item()", "bound = act.clamp", "forward/clamp-*"),
    _one("clamp-zero-taken-for-none", "eager_activation", "    if act.clamp is None:", "    if not act.clamp:", "forward/*clamp*"),
    _one("clamp-lets-nan-through", "eager_activation", _GATE_CLAMP, "return torch.where(gate > bound, bound, gate), up", _FORWARD),
    _one("silu-is-relu", "eager_activation", "gated = gate * _reciprocal(denominator)", "gated = gate.clamp_min(0)", _FORWARD),
    _one("silu-of-1-7-times-gate", "eager_activation", "denominator = 1.0 + _exp(-argument)\n    if", "denominator = 1.0 + _exp(-1.702 * argument)\n    if", _FORWARD),
    _one("silu-in-bf16", "eager_activation", _PRODUCT, "value = gated.bfloat16().float() * up", _FORWARD),
    _one("routing-weight-dropped", "eager_activation", _WEIGHT, "pass", _FORWARD),
    _one("routing-weight-of-slot-0", "eager", "problem.topk_weights[token, slot]", "problem.topk_weights[token, 0]", _FORWARD),
    Mutant("routing-weight-after-requantise", _FORWARD, [("eager_activation", _WEIGHT, "pass"), ("eager", _SLOTS, "slots[token, slot] = (down * routing).to(torch.bfloat16)")]),
    _one("routing-weight-in-bf16", "eager_activation", _WEIGHT, "value = value * routing.bfloat16().float()", _FORWARD),
    _one("requant-floor-1e-4", "eager", _AMAX, "requant_exponent(group_amax(groups, contract).clamp_min(1e-4), contract)", _FORWARD),
    _one("requant-exponent-floor-105", "eager", _EXPONENT, _EXPONENT + ".clamp_min(105)", _FORWARD),
    _one("requant-exponent-one-up", "eager", _EXPONENT, _EXPONENT + " + 1", _FORWARD),
    _one("requant-exponent-rounded-down", "eager", _BYTE, "byte = (amax * RECIP_448).view(torch.int32) >> 23", _FORWARD),
    _one("requant-stored-scale-is-not-the-used-one", "eager", _CODES, "codes = e4m3_codes(groups / (group_amax(groups, contract) * RECIP_448).clamp_min(1e-30).unsqueeze(-1), contract).flatten(-2)\n    return codes, ", _FORWARD),
    _one("requant-after-bf16", "eager", "groups = values.unflatten(-1, (-1, GROUP))", "groups = values.bfloat16().float().unflatten(-1, (-1, GROUP))", _FORWARD),
    _one("requant-amax-without-abs", "eager", _AMAX, "requant_exponent(groups.amax(-1).clamp_min(0), contract)", _FORWARD),
    _one("requant-amax-over-64", "eager", _AMAX, "requant_exponent(group_amax(groups, contract).unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1), contract)", _FORWARD),
    _one("requant-toward-zero", "eager", _CODES, "codes = e4m3_codes(scale_down(groups, exponent) * (1 - 2**-5), contract).flatten(-2)\n    return codes, ", _FORWARD),
    _one("combine-reversed", "eager_combine", _LOOP, "for row, weight, takes_part in rows[::-1]:", _FORWARD),
    _one("combine-in-bf16", "eager_combine", _ADD, "acc = torch.where(takes_part, total.bfloat16().float(), acc)", _FORWARD),
    _one("combine-in-float64", "eager_combine", "dtype=torch.float32, device=slots.device", "dtype=torch.float64, device=slots.device", _FORWARD),
    _one("combine-in-pairs", "eager_combine", "    y = acc.to(torch.bfloat16)", "    rows = torch.where(live[:, :, None], slots.float(), 0.0)\n    acc = rows[:, 0::2].sum(1) + rows[:, 1::2].sum(1)\n    y = acc.to(torch.bfloat16)", _FORWARD),
    _one("combine-adds-masked-slots", "eager", "live = (problem.topk_ids >= 0) & (problem.topk_ids < problem.num_experts)", "live = (problem.topk_ids >= -1)\n        slots[problem.topk_ids < 0] = 1.0", _FORWARD),
    _one("combine-loses-last-slot", "eager_combine", _LOOP, "for row, weight, takes_part in rows[: max(len(rows) - 1, 1)]:", _FORWARD),
    Mutant("slot-rows-not-rounded-to-bf16", _FORWARD, [("eager", _SLOTS, "slots[token, slot] = down"), ("eager", "problem.hidden_size, dtype=torch.bfloat16", "problem.hidden_size, dtype=torch.float32")]),
    _one("expert-0-lost", "eager", "if 0 <= expert < problem.num_experts:", "if 0 < expert < problem.num_experts:", _FORWARD),
    _one("last-expert-lost", "eager", "if 0 <= expert < problem.num_experts:", "if 0 <= expert < problem.num_experts - 1:", _FORWARD),
    Mutant("masked-slot-goes-to-expert-0", _FORWARD, [("eager", "ids = problem.topk_ids\n    for", "ids = problem.topk_ids.clamp_min(0)\n    for"), ("eager", "live = (problem.topk_ids >= 0) & ", "live = (problem.topk_ids >= -1) & ")]),
    _one("w2-of-the-neighbour", "eager", "problem.w2_weight[expert], ", "problem.w2_weight[expert - 1], ", _FORWARD),
    _one("w2-scale-of-the-neighbour", "eager", "problem.w2_weight_scale[expert]", "problem.w2_weight_scale[expert - 1]", _FORWARD),
    _one("weight-scales-one-group-late", "eager", "w_scale = _ue8m0_values(weight_sf)", "w_scale = _ue8m0_values(weight_sf.roll(1, -1))", _FORWARD),
    _one("weight-scales-one-row-late", "eager", "w_scale = _ue8m0_values(weight_sf)", "w_scale = _ue8m0_values(weight_sf.roll(1, 0))", _FORWARD),
    _one("one-weight-group-off-by-a-ue8m0-step", "eager", "    step = max(1,", "    w_scale = w_scale.clone()\n    w_scale[0, 0, 5] *= 2\n    step = max(1,", _FORWARD),
    _one("ue8m0-bias-128", "eager", "(1023 - 127)", "(1023 - 128)", _FORWARD),
    _one("nibbles-swapped", "eager", "[0, 4, 8, 12]", "[4, 0, 12, 8]", _FORWARD),
    _one("e2m1-half-read-as-zero", "eager", "halves = torch.from_numpy(E2M1_TABLE.copy())", "halves = torch.from_numpy(E2M1_TABLE * (abs(E2M1_TABLE) != 0.5))", _FORWARD),
    _one("e4m3-subnormals-flushed", "eager", "return torch.from_numpy(E4M3_TABLE.copy())", "return torch.from_numpy(E4M3_TABLE * (abs(E4M3_TABLE) >= 2.0**-6))", _FORWARD),
    _one("last-block-of-k-lost", "eager", "for first in range(0, groups, step):", "for first in range(0, groups - 1, step):\n        step = 1", _FORWARD),
    _one("accumulator-in-bf16", "eager", "acc += term", "acc = (acc + term).bfloat16().float()", _FORWARD),
    _one("accumulator-keeps-13-bits", "eager", "acc += term", "acc = ((acc + term).view(torch.int32) & -1024).view(torch.float32)", _FORWARD),
    _one("one-row-of-a-tile-lost", "eager", _SLOTS, _SLOTS + "\n            slots[token[8:9], slot[8:9]] = 0", _FORWARD),
    _one("one-percent-in-64-channels-of-one-row", "eager", _SLOTS, _SLOTS + "\n            slots[token[:1], slot[:1], 64:128] = (down[:1, 64:128] * 1.01).to(torch.bfloat16)", _FORWARD),
    _one("rows-beyond-128-read-row-0", "eager", "x[token],", "x[torch.where(token >= 128, 0, token)],", _FORWARD),
]  # fmt: skip

_STAGING = "staging/*"
_FLOOR = "clamp_min(contract.staging_amax_floor.value)"
_DIVISION = "ue8m0_ceil(amax / E4M3_MAX)"
STAGING = [
    _one("staging-floor-1e-10", "staging", _FLOOR, "clamp_min(1e-10)", "staging/amax-floor-*"),
    _one("staging-exponent-rounded-down", "staging", "return (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()", "return bits >> 23", _STAGING),
    _one("staging-exponent-always-up", "staging", "((bits & 0x7FFFFF) != 0).int()", "1", _STAGING),
    _one("staging-exponent-not-clamped", "staging", ".clamp(\n        contract.staging_exponent_min.value, contract.staging_exponent_max.value\n    )", "", "staging/infinity-*"),
    _one("staging-scale-by-240", "staging", _DIVISION, "ue8m0_ceil(amax / 240)", _STAGING),
    _one("staging-amax-without-abs", "staging", "magnitude = groups.abs()", "magnitude = groups", _STAGING),
    _one("staging-nan-counts-in-amax", "staging", "magnitude = torch.where(magnitude.isnan(), 0.0, magnitude)", "pass", "staging/nan-*"),
    _one("staging-scales-big-endian", "staging", "return bytes_.view(torch.int32)", "return bytes_.unflatten(-1, (-1, 4)).flip(-1).flatten(-2).contiguous().view(torch.int32)", _STAGING),
    _one("staging-cast-does-not-saturate", "staging", "return torch.where(nan, E4M3_NAN, codes)", "return torch.where(single.isfinite(), codes, E4M3_NAN)", "staging/infinity-*"),
    _one("staging-cast-toward-zero", "staging", "bounded = single.clamp", "bounded = (single.view(torch.int32) & ~0xFFFFF).view(torch.float32).clamp", _STAGING),
    _one("staging-through-half", "staging", "hidden_states.float().unflatten", "hidden_states.half().float().unflatten", "staging/amax-at-*"),
    _one("staging-weights-in-bf16", "staging", "copy_(topk_weights)", "copy_(topk_weights.bfloat16())", _STAGING),
    _one("staging-ids-masked", "staging", "copy_(topk_ids)", "copy_(topk_ids.clamp_min(0))", "staging/masked-ids-*"),
    _one("staging-writes-padding-rows", "staging", "    topk_weights_out[:tokens].copy_", "    x_fp8[tokens:].view(torch.uint8).zero_()\n    topk_weights_out[:tokens].copy_", _STAGING),
    _one("staging-last-token-lost", "staging", "x_sf[:tokens].copy_(pack_sf(exponent))", "x_sf[: tokens - 1].copy_(pack_sf(exponent)[:-1])", _STAGING),
]  # fmt: skip

_EPLB = "eplb/*"
EPLB = [
    _one("eplb-other-hash", "eplb", "contract.replica_hash.value", "2654435761", _EPLB),
    _one("eplb-hash-not-modulo-2-32", "eplb", "(row * contract.replica_hash.value) & 0xFFFFFFFF", "row * contract.replica_hash.value", _EPLB),
    _one("eplb-replica-by-slot", "eplb", "place = (row * contract.replica_hash.value) & 0xFFFFFFFF", "place = torch.arange(topk_ids.numel(), device=device).view(topk_ids.shape)", _EPLB),
    _one("eplb-first-replica-always", "eplb", "replica = place %", "replica = 0 * place %", _EPLB),
    _one("eplb-row-from-one", "eplb", "row = torch.arange(topk_ids.shape[0], device=device)", "row = 1 + torch.arange(topk_ids.shape[0], device=device)", _EPLB),
    _one("eplb-count-zero-gives-minus-one", "eplb", "physical = torch.where(valid,", "physical = torch.where(valid & (logical_replica_count[logical] > 0),", "eplb/count-*"),
    _one("eplb-no-cast-to-int32", "eplb", "topk_ids.to(torch.int32).long()", "topk_ids.long()", _EPLB),
    _one("eplb-invalid-goes-to-0", "eplb", "logical_to_physical_map[logical, replica].long(), -1)", "logical_to_physical_map[logical, replica].long(), 0)", _EPLB),
    _one("eplb-num-logical-is-valid", "eplb", "valid = (logical >= 0) & (logical < logical_to_physical_map.shape[0])", "logical = torch.where(logical == logical_to_physical_map.shape[0], 0, logical)\n    valid = (logical >= 0) & (logical < logical_to_physical_map.shape[0])", _EPLB),
    _one("eplb-records-always", "eplb", "    in_load &= torch.as_tensor(record_enabled, device=device).bool()\n", "", _EPLB),
    _one("eplb-counts-each-expert-once", "eplb", "    expert_load_view.index_add_(", "    in_load &= torch.zeros_like(in_load).index_fill_(0, torch.tensor([0]), True)\n    expert_load_view.index_add_(", _EPLB),
    _one("eplb-beyond-load-counted-last", "eplb", "in_load = (physical >= 0) & (physical < expert_load_view.shape[0])", "physical = physical.clamp_max(expert_load_view.shape[0] - 1)\n    in_load = physical >= 0", _EPLB),
]  # fmt: skip

_LAYOUT = "layout/*"
LAYOUT = [
    _one("layout-interleave-16", "kernel_weights", "INTERLEAVE: Final = 8", "INTERLEAVE: Final = 16", _LAYOUT),
    _one("layout-up-first", "kernel_weights", "return halves.transpose(1, 2)", "return halves.flip(1).transpose(1, 2)", _LAYOUT),
    _one("layout-scales-not-interleaved", "kernel_weights", "transform_sf(interleave_gate_up(w13_weight_scale))", "transform_sf(w13_weight_scale)", _LAYOUT),
    _one("layout-scales-not-permuted", "kernel_weights", "(-1, 4, SF_ROWS // 4)).transpose(2, 3).flatten(1, 3)", "(-1, 4, SF_ROWS // 4)).flatten(1, 3)", _LAYOUT),
    _one("layout-scales-permuted-backwards", "kernel_weights", "(-1, 4, SF_ROWS // 4)", "(-1, SF_ROWS // 4, 4)", _LAYOUT),
    _one("layout-scales-row-major", "kernel_weights", "return words.transpose(1, 2).contiguous().transpose(1, 2)", "return words.contiguous()", _LAYOUT),
]  # fmt: skip

MUTANTS = [*FORWARD, *STAGING, *EPLB, *LAYOUT]
