"""The rows of the staged buffer beyond the batch.

No golden has them: they belong to no token. So what becomes of them is a fact of the contract, and
no clause.
"""

from __future__ import annotations

from typing import Final

MASKED_REST: Final = ("sgl",)
"""Revisions whose staging gives the slots of rows beyond the batch id -1 and weight 0, up to the
end of the tensors that it gets, and does not write their codes and scale factors. SGLang 0.5.23,
``deepseek_v4/mega_moe_pre_dispatch.cuh``: the blocks from ``num_tokens`` on. Under the other
revisions staging writes no byte of these rows."""
FILLS: Final = {"topk_idx": -1, "topk_weights": 0}
"""What such a slot gets, by tensor."""
