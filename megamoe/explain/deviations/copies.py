"""Staged tensors as a whole: scale words in another order, and ids and weights that are no copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.deviations.roundings import flushed, truncated
from megamoe.explain.ways import in_bf16
from megamoe.spec.formats import F32

Array = npt.NDArray[Any]
Copies = Iterator[tuple[str, Array]]
_LARGEST: Final = float(np.finfo(np.float32).max)


def words(right: Array, rows: int, blank: Array) -> Copies:
    """``(T, W)`` int32 words of scale bytes. ``rows``: those of the buffer; ``blank``: a word that
    nobody wrote."""
    tokens, width = right.shape
    yield "scale words of a token are in reverse order", right[:, ::-1]
    yield "all scale words of a token are its first", np.repeat(right[:, :1], width, axis=1)
    bytes_ = np.ascontiguousarray(right).view(np.uint8).reshape(tokens, -1)
    for stride, of in ((tokens, "the batch"), (rows, "the buffer")):
        buffer = np.full((stride, width), blank, right.dtype)
        buffer[:tokens] = right
        columns = np.ascontiguousarray(buffer.T).ravel()
        yield (
            f"scale words stand in columns: word 0 of all rows of {of}, then word 1",
            columns[: tokens * width].reshape(tokens, width),
        )
        bytewise = np.full((stride, 4 * width), 0, np.uint8)
        bytewise[:] = np.frombuffer(blank.tobytes() * width, np.uint8)
        bytewise[:tokens] = bytes_
        flat = np.ascontiguousarray(bytewise.T).ravel()[: tokens * width * 4]
        yield (
            f"scale bytes stand in columns: group 0 of all rows of {of}, then group 1",
            np.ascontiguousarray(flat).view(right.dtype).reshape(tokens, width),
        )
    flat = np.ascontiguousarray(right.T).ravel().reshape(tokens, width)
    yield "scale words are in rows of another stride: those of columns", flat


def ids(values: Array, experts: int) -> Copies:
    """``(T, K)`` int64 of the ids ``values``, which are int32 or int64."""
    wide = values.astype(np.int64)
    yield "ids are zero", np.zeros_like(wide)
    yield "ids below 0 become 0", np.maximum(wide, 0)
    yield "-1 loses its sign: it is 4294967295", wide & 0xFFFFFFFF
    yield (
        "ids outside the experts become -1",
        np.where((wide < 0) | (wide >= experts), -1, wide),
    )
    yield "ids are held to the last expert", np.clip(wide, -1, experts - 1)
    yield "ids are taken modulo the number of experts", wide % experts
    for bits, kind in ((8, np.int8), (16, np.int16), (32, np.int32)):
        yield f"ids keep {bits} bits", wide.astype(kind).astype(np.int64)
    yield "ids are one too large", wide + 1
    yield "ids are one too small", wide - 1
    yield "ids are in ascending order", np.sort(wide, axis=1)
    halves = np.ascontiguousarray(wide).view(np.int32).reshape(wide.shape[0], -1)
    yield (
        "int64 ids are read as int32: each second one is the upper half",
        halves[:, : wide.shape[1]].astype(np.int64),
    )
    pairs = np.ascontiguousarray(values.astype(np.int32)).ravel()
    if pairs.size:
        pairs = np.concatenate([pairs, pairs])  # beyond the tensor the memory is somebody else's
        yield "two int32 ids are read as one int64", pairs.view(np.int64).reshape(wide.shape)
    yield from _from_elsewhere("ids", wide)


def weights(values: F32, masked: Array) -> Copies:
    """``(T, K)`` float32 of routing weights; ``masked`` ``(T, K)`` bool: the id is below 0."""
    zero = np.float32(0)
    yield "routing weights are zero", np.zeros_like(values)
    yield "routing weights are rounded to bfloat16", in_bf16(values)
    yield "routing weights are truncated to bfloat16", truncated(values)
    yield "routing weights are rounded to fp16", values.astype(np.float16).astype(np.float32)
    yield "subnormal routing weights are flushed to zero", flushed(values)
    yield "routing weights lose their sign", np.abs(values)
    yield "NaN among routing weights becomes zero", np.where(np.isnan(values), zero, values)
    yield (
        "infinite routing weights are held to the largest number",
        np.clip(values, np.float32(-_LARGEST), np.float32(_LARGEST)),
    )
    yield (
        "NaN becomes zero, and infinity the largest number",
        np.nan_to_num(values, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST),
    )
    yield "routing weights of slots without an expert become zero", np.where(masked, zero, values)
    total = values.sum(axis=1, keepdims=True)
    yield "routing weights are normalised to a sum of 1", (values / total).astype(np.float32)
    total = np.where(masked, zero, values).sum(axis=1, keepdims=True)
    yield (
        "routing weights are normalised to a sum of 1 over slots with an expert",
        (values / total).astype(np.float32),
    )
    yield "routing weights are in descending order", -np.sort(-values, axis=1)
    yield from _from_elsewhere("routing weights", values)


def _from_elsewhere(what: str, right: Array) -> Copies:
    """Elements from another place of the tensor."""
    tokens, slots = right.shape
    yield f"{what} are those of the slot before", np.roll(right, 1, axis=1)
    yield f"{what} are those of the slot after", np.roll(right, -1, axis=1)
    yield f"{what} are in reverse order", right[:, ::-1]
    yield f"{what} are those of the token before", np.roll(right, 1, axis=0)
    yield f"{what} are those of the token after", np.roll(right, -1, axis=0)
    yield f"{what} of all tokens are those of token 0", np.repeat(right[:1], tokens, axis=0)
    yield f"{what} of all slots are those of slot 0", np.repeat(right[:, :1], slots, axis=1)
    flat = np.ascontiguousarray(right.T).ravel()
    yield f"{what} are transposed", flat.reshape(tokens, slots)
    back = np.ascontiguousarray(right).reshape(slots, tokens).T
    yield f"{what} are read transposed", back
    for stride in (8, 16):
        if slots < stride and right.size:
            at = np.arange(tokens)[:, None] * stride + np.arange(slots)
            yield f"{what} are read with a stride of {stride}", right.ravel()[at % right.size]
