"""A kernel that spans the ranks of a group with messages of its own. Sizes as in my_kernel.py.

megamoe check --backend group_kernel.py:Gathers --ep 2
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from my_kernel import Mine


class Gathers(Mine):
    """Every rank gets all tokens, and computes the slots of its own experts."""

    name = "gathers"

    def forward_group(self, p, group):
        """y of this rank's tokens: p.topk_ids name experts of all ranks, weights are its own."""
        (mine, top_k), device = p.topk_ids.shape, p.topk_ids.device
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
        dist.all_gather(counts, torch.tensor([mine], device=device), group=group)
        tokens = [int(count) for count in counts]  # T of each rank; 0 is one of the values
        first = sum(tokens[: group.rank()])
        whole = self.gathered(p, tokens, group)
        local = whole.topk_ids - group.rank() * p.num_experts
        local = torch.where((local >= 0) & (local < p.num_experts), local, -1)
        slots = self.slot_rows(replace(whole, topk_ids=local))  # (sum of T, K, H) float32
        dist.all_reduce(slots, group=group)  # one rank has the row, and all others have zeros
        y = torch.zeros(mine, p.hidden_size, dtype=torch.float32, device=device)
        for k in range(top_k):  # the combine adds the slots in ascending order
            y += slots[first : first + mine, k]
        return y.bfloat16()

    def gathered(self, p, tokens, group):
        """The problem of all ranks' tokens, in the order of ranks."""
        parts = {}
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            own = getattr(p, name)
            rows = own.new_zeros(max(tokens), own.shape[1])  # every rank sends as many rows
            rows[: len(own)] = own
            received = [torch.empty_like(rows).view(torch.uint8) for _ in tokens]
            dist.all_gather(received, rows.view(torch.uint8), group=group)
            rows_of_ranks = [part[:n] for part, n in zip(received, tokens, strict=True)]
            parts[name] = torch.cat(rows_of_ranks).view(own.dtype)
        return replace(p, max_num_tokens=sum(tokens), **parts)

    def slot_rows(self, p):
        """(T, K, H) float32: a slot is a token of one slot; zeros where the id is -1."""
        tokens, top_k = p.topk_ids.shape
        alone = replace(
            p, hidden_states=p.hidden_states.repeat_interleave(top_k, 0),
            topk_ids=p.topk_ids.view(-1, 1), topk_weights=p.topk_weights.view(-1, 1),
            max_num_tokens=max(1, tokens * top_k),
        )  # fmt: skip
        return self.forward(alone)["y"].float().view(tokens, top_k, p.hidden_size)
