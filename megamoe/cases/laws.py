"""The calls of each law of kind ``property``, in words: for ``megamoe show``, messages and pages.

No torch in here. The words are the labels that a red of the law names; N stands for a number, and
the tests hold them against the labels of the law's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MODES: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "autocast": (("autocast to bfloat16",), ("autocast to float16",)),
    "grad-mode": (("inference mode",), ("no grad", "grad mode")),
    "torch-defaults": (
        ("a default dtype of float64",), ("a default dtype of bfloat16",),
        ("a default device of meta",),
    ),
}  # fmt: skip
"""Laws of torch's modes, and the modes of each by process. What a backend makes once and keeps (a
workspace, a table) is made in the first mode of its process; so each mode is the first of one. Only
grad mode is not: it is the mode of an ordinary call."""


def after(modes: tuple[str, ...]) -> str:
    """The label of the ordinary call that ends a process of ``modes``: it sees what they left."""
    return f"no mode after {modes[0]}"


ALL_WEIGHTS: Final = "every weight tensor"


def after_write(weights: str) -> str:
    """The label of a call after ``weights``, the name of a tensor, got other contents in place."""
    return f"a call after {weights} was written in place"


CALLS: Final[Mapping[str, tuple[str, ...]]] = {
    "repeat": ("a second run", "a third run"),
    "many-calls": ("call N of 155",),
    "other-weights": (
        "other weights of the same shape, in the second call", "the first weights again",
        "other weights of the same shape, in the fourth call",
    ),
    "batch-invariance": (
        "token N alone", "a batch of tokens N to N", "the first half of the batch",
        "the batch appended to itself (N tokens)",
    ),
    "token-permutation": ("reversing the tokens", "rotating the tokens"),
    "replica-choice": (
        "the second replica for every slot", "alternating replicas", "16 replicas in turn",
    ),
    "ep-size": ("numbering the experts from another one", "only the experts that are used"),
    "capacity": ("N more rows of capacity",),
    "stale-buffer": ("an earlier call with NaN", "an earlier call with large numbers"),
    "padding-rows": ("1 padding row of NaN", "N padding rows of NaN"),
    "masked-slots": ("NaN weights in masked slots", "a masked slot put in at N"),
    "stale-bytes": (
        "the run face instead of forward", "0xFF in the whole buffer before a second call",
        "0xFF in the whole buffer before a third call",
    ),
    "graph-replay": (
        "the first replay of a CUDA graph", "the second replay of a CUDA graph",
        "a replay over a buffer of 0xFF", "a replay with the tokens reversed",
    ),
    "busy-stream": ("a busy second stream", "running on a second stream beside a busy first"),
    **{
        law: tuple(label for modes in processes for label in (*modes, after(modes)))
        for law, processes in MODES.items()
    },
    "engine-tensors": (
        "the module in place of the backend alone", "columns of wider tensors",
        "rows of padded tensors", "transposed tensors", "odd strides of axes of one",
        "ids of int32", "weights of bfloat16", "weights of float16", "weights of float64",
        "weights and ids in one tensor",
    ),
    "weights-in-place": tuple(
        after_write(weights) for weights in (
            "w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale",
            "w13_weight_scale_2", "w2_weight_scale_2", ALL_WEIGHTS,
        )
    ),
}  # fmt: skip
"""A law's calls, each compared with an ordinary call of the problem, bit for bit."""


def calls_of(law: str) -> str:
    """``reversing the tokens; rotating the tokens``."""
    return "; ".join(CALLS[law])
