"""The module before and after the refactor of vLLM #44367, in this project's own words.

Before it, ``forward`` allots the output and hands everything to a private method; after it, the
method's body stands in ``forward``. The claim of such a change is that no bit moves, which is what
``megamoe ab`` is for. ``ClampLost`` is the slip that is easily made on the way.
"""

from __future__ import annotations

from typing import Any

import torch

from megamoe.backends.eager import activate, combine, linear, requantise
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.staging import prepare_megamoe_inputs, unpack_sf
from megamoe.spec.contract import NEWEST
from megamoe.spec.features import Activation
from megamoe.spec.problem import Problem


class Kernel:
    """A stand-in for the fused kernel: reads the staged buffer, leaves its codes in it."""

    name = "buffer-kernel"
    accumulator = "fp32-ordered"

    def run(self, y, weights, buffer, num_tokens, *, activation_clamp, fast_math) -> None:
        """As the protocol of ``megamoe.layer.experts`` has it; ``weights`` are the checkpoint's."""
        w13, w13_sf, w2, w2_sf = weights
        act = Activation("swiglu", activation_clamp, 1.0, 0.0, fast_math)
        ids, routing = buffer.topk_idx[:num_tokens], buffer.topk_weights[:num_tokens]
        x, sf = buffer.x[:num_tokens].view(torch.uint8), unpack_sf(buffer.x_sf[:num_tokens])
        acts = buffer.l2_acts.view(torch.uint8)
        slots = torch.zeros(*ids.shape, y.shape[1], dtype=torch.bfloat16)
        for expert in ids[ids >= 0].unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate_up = linear(x[token], sf[token], w13[expert], w13_sf[expert])
            weight = routing[token, slot].unsqueeze(-1)
            codes, exponents = requantise(activate(gate_up, weight, act, NEWEST), NEWEST)
            acts[token, slot], buffer.l2_acts_sf[token, slot] = codes, exponents
            down = linear(codes, exponents, w2[expert], w2_sf[expert])
            slots[token, slot] = down.to(torch.bfloat16)
        y.copy_(combine(slots, ids >= 0, routing, NEWEST))

    def pack_weights(self, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The checkpoint's layout is what this kernel reads."""
        return weights


class WithPrivateMethod(DeepseekV4MegaMoEExperts):
    """The shape before."""

    def forward(self, hidden_states, topk_weights, topk_ids, *, activation_clamp, fast_math=True):
        if hidden_states.shape[0] > self.max_num_tokens:
            raise ValueError("too many tokens for the symmetric buffer")
        y = torch.empty_like(hidden_states, dtype=torch.bfloat16)
        self._run_mega_moe(hidden_states, topk_weights, topk_ids, y, activation_clamp, fast_math)
        return y

    def _run_mega_moe(self, hidden_states, topk_weights, topk_ids, y, activation_clamp, fast_math):
        buffer = self.get_symm_buffer()
        tokens = hidden_states.shape[0]
        staged = (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)
        prepare_megamoe_inputs(
            hidden_states, topk_weights, topk_ids, *(tensor[:tokens] for tensor in staged)
        )
        self.finalize_weights(without_loader=True)  # again, for weights that were never loaded
        self.backend.run(
            y, self._weights, buffer, tokens, activation_clamp=activation_clamp, fast_math=fast_math
        )


class Inlined(DeepseekV4MegaMoEExperts):
    """The shape after."""

    def forward(self, hidden_states, topk_weights, topk_ids, *, activation_clamp, fast_math=True):
        tokens = hidden_states.shape[0]
        if tokens > self.max_num_tokens:
            raise ValueError("too many tokens for the symmetric buffer")
        buffer = self.get_symm_buffer()
        staged = (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)
        prepare_megamoe_inputs(
            hidden_states, topk_weights, topk_ids, *(tensor[:tokens] for tensor in staged)
        )
        self.finalize_weights(without_loader=True)
        y = torch.empty_like(hidden_states, dtype=torch.bfloat16)
        self.backend.run(
            y, self._weights, buffer, tokens, activation_clamp=activation_clamp, fast_math=fast_math
        )
        return y


class InlinedClampLost(Inlined):
    """The shape after, with one argument dropped on the way."""

    def forward(self, *arguments, activation_clamp, fast_math=True):
        return super().forward(*arguments, activation_clamp=None, fast_math=fast_math)


class _Module:
    """A module as a backend: what it leaves in the buffer are the stages."""

    accumulator = Kernel.accumulator
    shape: type[DeepseekV4MegaMoEExperts]

    def forward(self, p: Problem) -> dict[str, Any]:
        module = self.shape(
            p.max_num_tokens, num_experts=p.num_experts, num_local_experts=p.num_experts,
            experts_start_idx=0, top_k=p.top_k, hidden_size=p.hidden_size,
            intermediate_size=p.intermediate_size, prefix="experts", backend=Kernel(),
        )  # fmt: skip
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            getattr(module, name).data.copy_(getattr(p, name))
        buffer, tokens = module.get_symm_buffer(), p.num_tokens
        for name in ("l2_acts", "l2_acts_sf"):
            getattr(buffer, name).view(torch.uint8).zero_()
        y = module(
            p.hidden_states, p.topk_weights, p.topk_ids, activation_clamp=p.activation_clamp,
            fast_math=p.fast_math,
        )  # fmt: skip
        names = ("x", "x_sf", "l2_acts", "l2_acts_sf")
        return {"y": y, **{name: getattr(buffer, name)[:tokens].clone() for name in names}}


class Before(_Module):
    name = "private-method"
    shape = WithPrivateMethod


class After(_Module):
    name = "inlined"
    shape = Inlined


class ClampLost(_Module):
    name = "inlined-clamp-lost"
    shape = InlinedClampLost
