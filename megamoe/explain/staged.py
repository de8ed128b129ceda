"""Staging alone: which staged tensor of a batch is wrong, where, and by which known mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain.deviations import copies
from megamoe.explain.staged_batch import NAMES, VALUES, Batch, StagedOutput
from megamoe.explain.staged_causes import of_copies, of_values
from megamoe.judge import Finding, bitwise, place_of
from megamoe.spec.contract import Contract
from megamoe.spec.formats import GROUP, bf16_decode, unpack_sf
from megamoe.spec.forms import E4M3
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]
Plain = dict[str, Any]


def explain_staging(
    batch: Batch, right: Mapping[str, Array], output: StagedOutput, contract: Contract
) -> Plain:
    """What is wrong of the staged tensors, as plain data: the findings of each, the causes, and
    the group of the worst value of ``x`` or ``x_sf``. ``right``: bits by name of ``NAMES``."""
    findings = [_finding(name, output.tensors[name], right[name], batch) for name in NAMES]
    wrong = {f.stage: f for f in findings if f.outside}
    causes: list[Plain] = []
    if any(name in wrong for name in VALUES):
        causes.append(of_values(batch, output, right, contract))
    masked = batch.ids < 0
    if "topk_idx" in wrong:
        ways = copies.ids(batch.ids, batch.experts)
        causes.append(of_copies("topk_idx", ways, batch, output, right))
    if "topk_weights" in wrong:
        ways = ((name, array.astype(np.float32).view(np.uint32))
                for name, array in copies.weights(batch.weights, masked))  # fmt: skip
        causes.append(of_copies("topk_weights", ways, batch, output, right))
    first = next((wrong[name] for name in (*VALUES, *NAMES) if name in wrong), None)
    worst = None if first is None else first.worst
    return {
        "contract": contract.revision,
        "tokens": batch.tokens,
        "stages": [
            {"stage": f.stage, "outside": f.outside, "of": f.total,
             "worst": None if f.worst is None else f.worst.line()} for f in findings
        ],
        "explanations": causes,
        "beyond": [line for name in NAMES for line in _beyond(name, batch, output)],
        "worst": None if worst is None else worst.line(),
        "group": (
            group(batch, right, worst.token, worst.channel, output)
            if worst is not None and worst.stage in VALUES and worst.token is not None
            and worst.channel is not None else None
        ),
    }  # fmt: skip


def group(
    batch: Batch, right: Mapping[str, Array], token: int, channel: int, output: StagedOutput | None
) -> Plain:
    """The values of a channel's group: hidden states, amax, scale byte and codes, right and
    shown."""
    first = channel // GROUP * GROUP
    part = slice(first, first + GROUP)
    hidden = bf16_decode(batch.hidden[token, part])
    finite = np.where(np.isnan(hidden), 0, np.abs(hidden))
    at = int(np.argmax(finite))

    def byte(words: Array) -> int:
        return int(unpack_sf(words[token])[first // GROUP])

    return {
        "token": token, "channel": channel, "group": first // GROUP, "first": first,
        "amax": float(finite[at]), "set_by": first + at,
        "amax_over_448": float(np.float32(finite[at]) / np.float32(448)),
        "byte": byte(right["x_sf"]),
        "shown_byte": None if output is None else byte(output.tensors["x_sf"]),
        "hidden": [f"0x{b:04x}" for b in batch.hidden[token, part]],
        "hidden_values": [float(v) for v in hidden],
        "codes": [E4M3.hex(c) for c in right["x"][token, part]],
        "shown_codes": (
            None if output is None else [E4M3.hex(c) for c in output.tensors["x"][token, part]]
        ),
    }  # fmt: skip


# --- the comparison -----------------------------------------------------------------------------


def _finding(name: str, actual: Array, right: Array, batch: Batch) -> Finding:
    tensor, ids = TENSORS[name], batch.ids
    pair = tensor.elements(actual), tensor.elements(right)
    return bitwise(name, tensor.form_of(actual), *pair, place_of(name, ids=ids))


def _beyond(name: str, batch: Batch, output: StagedOutput) -> Iterator[str]:
    """What stands in rows of the buffer after the batch, if anything was written there."""
    rest = output.beyond.get(name)
    if rest is None or not rest.size:
        return
    bytes_ = np.ascontiguousarray(rest).view(np.uint8).reshape(len(rest), -1)
    changes = bytes_ != output.blank
    if not changes.any():
        return
    rows = np.flatnonzero(changes.any(axis=1))
    whole = np.ascontiguousarray(output.tensors[name]).view(np.uint8)
    whole = whole.reshape(batch.tokens, -1)
    content = bytes_[rows]
    what = "other bytes"
    if not content.any():
        what = "zeros"
    elif (content == 0xFF).all():
        what = "-1 in every element"
    elif batch.tokens and (content == whole[-1]).all():
        what = "the row of the last token"
    first, last = batch.tokens + int(rows[0]), batch.tokens + int(rows[-1])
    yield (
        f"{name}: rows beyond the {batch.tokens} tokens are written: {int(changes.sum())} bytes in "
        f"rows {first} to {last} of {batch.tokens + len(rest)}, with {what}"
    )


__all__ = ["NAMES", "Batch", "StagedOutput", "explain_staging", "group"]
