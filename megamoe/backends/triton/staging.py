"""Staging in one launch; :mod:`.kernels.staging` is its kernel."""

from __future__ import annotations

import torch

from megamoe.backends.triton.binaries import launch
from megamoe.backends.triton.kernels.staging import _stage
from megamoe.backends.triton.packing import power_of_two
from megamoe.layer.staging import OUTPUTS, check_staging_inputs, check_staging_outputs
from megamoe.spec.contract import NEWEST, Contract


def prepare_megamoe_inputs(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp8: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    *,
    early: bool = False,
    contract: Contract = NEWEST,
) -> None:
    """``prepare_megamoe_inputs`` of the layer in one launch; the same arguments and bits.

    Raises the same errors, in the words of ``contract``, before anything is written, and one for
    outputs whose rows are not dense.
    ``early``: the next kernel may start before this one has ended, from SM90 on; one that is
    launched that way must wait for it (:mod:`.chain`).
    """
    tokens, hidden = hidden_states.shape
    if tokens == 0:
        return
    check_staging_inputs(hidden_states, topk_weights, topk_ids, contract)
    top_k = topk_ids.shape[1]
    outputs = (x_fp8, x_sf, topk_idx_out, topk_weights_out)
    check_staging_outputs(tokens, hidden, top_k, *outputs)
    for name, out in zip(OUTPUTS, outputs, strict=True):
        if out.stride(-1) != 1:
            raise ValueError(f"{name} has strides {out.stride()}; its rows must be contiguous")
    block = 1024
    if hidden_states.stride(-1) != 1:
        hidden_states = hidden_states.contiguous()
    launch(
        _stage, (tokens, -(-hidden // block)),
        hidden_states, topk_weights.contiguous(), topk_ids.contiguous(),
        x_fp8.view(torch.uint8), x_sf, topk_idx_out, topk_weights_out,
        hidden_states.stride(0), hidden, top_k, x_fp8.stride(0), x_sf.stride(0),
        topk_idx_out.stride(0), topk_weights_out.stride(0),
        BLOCK=block, SLOTS=power_of_two(top_k), EARLY=early, num_warps=2,
    )  # fmt: skip
