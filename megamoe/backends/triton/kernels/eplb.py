"""Remap and record on the device; in interpreter mode the same code runs on a CPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _remap(
    ids, load, table, counts, record, out, total, top_k, logical_experts, table_stride,
    physical_experts, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    # The cast wraps a wide id, as the contract has it; an invalid one must not be looked up.
    logical = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
    valid = (logical >= 0) & (logical < logical_experts)
    logical = tl.where(valid, logical, 0).to(tl.int64)
    # Knuth's hash of the token's row, modulo 2^32, in 64 bits: no wrap can be signed.
    token_hash = ((at // top_k).to(tl.int64) * 2654435769) & 0xFFFFFFFF
    count = tl.maximum(tl.load(counts + logical, mask=valid, other=1).to(tl.int64), 1)
    replica = token_hash % count
    # A count beyond the table's width is wrong; it must not reach the neighbour's replicas.
    in_table = valid & (replica < table_stride)
    physical = tl.load(table + logical * table_stride + replica, mask=in_table, other=-1)
    physical = physical.to(tl.int64)
    tl.store(out + at, physical.to(out.dtype.element_ty), mask=inside)
    in_load = inside & (physical >= 0) & (physical < physical_experts)
    in_load = in_load & (tl.load(record) != 0)
    tl.atomic_add(load + tl.where(in_load, physical, 0), 1, mask=in_load, sem="relaxed")
