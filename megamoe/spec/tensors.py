"""Every tensor that an operation takes or returns: shape, dtypes, and how the judge reads it.

Letters of the shapes: ``T`` tokens, ``K`` slots of a token (top-k), ``H`` hidden size, ``I``
intermediate size, ``E`` local physical experts; of the expert map: ``L`` logical experts, ``P``
physical experts, ``R`` replicas; ``S`` intermediate size of the shared expert. A buffer may have
more rows than ``T``; they are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy.typing as npt
import torch

from megamoe.spec.formats import GROUP, unpack_sf
from megamoe.spec.forms import BF16, BYTE, E4M3, F32, INT32, INT64, UE8M0, Bits, Form
from megamoe.spec.stages import STAGES

_AXIS: Final = re.compile(r"(\d*)([TKHIELPRS])(?:/(\d+))?")


@dataclass(frozen=True)
class Tensor:
    """One row of the table."""

    name: str
    shape: tuple[str, ...]
    """The axes in letters: ``("T", "H/128")``."""
    dtypes: tuple[torch.dtype, ...]
    """The dtypes that are accepted; megamoe itself creates the first."""
    form: Form | None
    """The form of its elements; None: whole numbers of their own width."""
    meaning: str
    places: tuple[str, ...] = ()
    """The judge's names of the axes; empty for a tensor that it never shows."""
    channels: int = 1
    """Channels for which one element stands, words unpacked; a byte of two E2M1 counts as one."""
    packed: bool = False
    """Four scale factors are one int32 word, the first in the low byte."""
    reads_masked: bool = True
    """Whether the content of a slot with id -1 counts."""
    digest_axes: int = 1
    """Leading axes of a block with a digest of its own: 1 a row, 2 a row and slot."""

    def sizes(self, letters: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers: ``{"T": 5, "H": 256}`` makes (5, 2) of ("T", "H/128")."""
        out = []
        for axis in self.shape:
            match = _AXIS.fullmatch(axis)
            assert match is not None, f"{self.name} has an axis {axis}"
            out.append(int(match[1] or 1) * letters[match[2]] // int(match[3] or 1))
        return tuple(out)

    def elements(self, bits: npt.NDArray[Any]) -> Bits:
        """The elements to compare: the scale factors of packed words, otherwise the bits
        themselves."""
        return unpack_sf(bits) if self.packed else bits

    def form_of(self, bits: npt.NDArray[Any]) -> Form:
        """The form of these bits: ``form``, or whole numbers of their width."""
        return self.form or (INT64 if bits.dtype.itemsize == 8 else INT32)


_BF16, _F32, _BOOL = (torch.bfloat16,), (torch.float32,), (torch.bool,)
_U8, _I32, _I64 = (torch.uint8,), (torch.int32,), (torch.int64,)
_IDS = (torch.int64, torch.int32)
_CODES = (torch.float8_e4m3fn, torch.uint8)
_SCALES = (torch.uint8, torch.float8_e8m0fnu)
_SLOT = ("token", "slot")
_ROW = ("token", "channel")
_ACTS = ("token", "slot", "channel")
_WEIGHT = ("expert", "row", "channel")
_BY_SLOT: Final[dict[str, Any]] = {"reads_masked": False, "digest_axes": 2}

TENSORS: Final[Mapping[str, Tensor]] = {
    t.name: t
    for t in (
        # --- eplb_map: logical ids to physical ones
        Tensor("logical_to_physical_map", ("L", "R"), _I64, INT64,
               "the replicas of each logical expert; -1 beyond its count"),
        Tensor("logical_replica_count", ("L",), _I64, INT64, "how many replicas each has"),
        Tensor("record_enabled", (), _BOOL, BYTE, "whether the load is counted"),
        Tensor("expert_load_view", ("P",), _I32, INT32,
               "the load so far; the one input that a call may write, and then it is `load`"),
        Tensor("ids", ("T", "K"), _IDS, None,
               "physical ids, of the dtype that topk_ids had", _SLOT),
        Tensor("load", ("P",), _I32, INT32, "expert_load_view after the call", ("expert",)),
        # --- prepare: staging
        Tensor("hidden_states", ("T", "H"), _BF16, BF16, "what the layer is given"),
        Tensor("topk_ids", ("T", "K"), _IDS, None,
               "the expert of each slot, -1: empty; logical for eplb_map, int64 in a problem"),
        Tensor("x_sf", ("T", "H/128"), _I32, UE8M0,
               "scale factors of x, four to a word", _ROW, GROUP, packed=True),
        Tensor("x", ("T", "H"), _CODES, E4M3, "staged hidden states, E4M3 codes", _ROW),
        Tensor("topk_idx", ("T", "K"), _I64, INT64, "topk_ids, copied", _SLOT),
        Tensor("topk_weights", ("T", "K"), _F32, F32,
               "routing weights, the routed scaling in them: given, and copied", _SLOT),
        # --- the checkpoint's weights
        Tensor("w13_weight", ("E", "2I", "H/2"), _U8, BYTE,
               "two E2M1 a byte, the low nibble first; rows [0, I) gate (w1), [I, 2I) up (w3)"),
        Tensor("w13_weight_scale", ("E", "2I", "H/32"), _U8, UE8M0,
               "scale factors of w13_weight; of NVFP4 E4M3 bytes, (E, 2I, H/16); of FP8 in blocks "
               "float32, (E, 2I/128, H/128)", channels=GROUP),
        Tensor("w2_weight", ("E", "H", "I/2"), _U8, BYTE, "two E2M1 a byte, the low nibble first"),
        Tensor("w2_weight_scale", ("E", "H", "I/32"), _U8, UE8M0,
               "scale factors of w2_weight; of NVFP4 E4M3 bytes, (E, H, I/16); of FP8 in blocks "
               "float32, (E, H/128, I/128)", channels=GROUP),
        # --- optional arguments of a call
        Tensor("shared_w13_weight", ("2S", "H"), _CODES[::-1], E4M3,
               "E4M3 codes of the shared expert; rows [0, S) gate, [S, 2S) up"),
        Tensor("shared_w13_weight_scale", ("2S", "H/32"), _U8, UE8M0,
               "scale factors of shared_w13_weight", channels=GROUP),
        Tensor("shared_w2_weight", ("H", "S"), _CODES[::-1], E4M3,
               "E4M3 codes of the shared expert"),
        Tensor("shared_w2_weight_scale", ("H", "S/32"), _U8, UE8M0,
               "scale factors of shared_w2_weight", channels=GROUP),
        Tensor("shared_output", ("T", "H"), _BF16, BF16,
               "what a shared expert apart from the kernel gave; it is added to y", _ROW),
        Tensor("w13_weight_scale_2", ("E",), _F32, F32,
               "of NVFP4: the factor of an expert's w13_weight beside its scale bytes"),
        Tensor("w2_weight_scale_2", ("E",), _F32, F32,
               "of NVFP4: the factor of an expert's w2_weight beside its scale bytes"),
        # --- forward: linear 1, SwiGLU, requantisation
        Tensor("l2_acts_sf", ("T", "K", "I/32"), _SCALES, UE8M0,
               "scale factors of l2_acts", _ACTS, GROUP, **_BY_SLOT),
        Tensor("l2_acts", ("T", "K", "I"), _CODES, E4M3,
               "requantised activations, E4M3 codes", _ACTS, **_BY_SLOT),
        # --- transform_weights: the weights in the kernel's layout
        Tensor("w13", ("E", "2I", "H/2"), _U8, BYTE,
               "w13_weight with gate and up rows 8 by 8 in turn", _WEIGHT),
        Tensor("w13_sf", ("E", "2I", "H/128"), _I32, UE8M0,
               "scale factors of w13, four to a word, MN-major", _WEIGHT, GROUP, packed=True),
        Tensor("w2", ("E", "H", "I/2"), _U8, BYTE, "w2_weight, unchanged", _WEIGHT),
        Tensor("w2_sf", ("E", "H", "I/128"), _I32, UE8M0,
               "scale factors of w2, four to a word, MN-major", _WEIGHT, GROUP, packed=True),
        # --- forward: linear 2, combine
        Tensor("y", ("T", "H"), _BF16, BF16, "the layer's output", _ROW),
    )
}  # fmt: skip
"""All tensors by name, in the order of computation: the first that moved is the place to look."""

ACTIVATIONS: Final = ("hidden_states", "topk_ids", "topk_weights")
WEIGHTS: Final = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
"""The checkpoint's weights, in the order in which ``transform_weights`` takes them."""
SHARED_WEIGHTS: Final = tuple(f"shared_{name}" for name in WEIGHTS)
"""The weights of a fused shared expert, an option of ``forward``."""
NVFP4_FACTORS: Final = ("w13_weight_scale_2", "w2_weight_scale_2")
"""The further factors of an expert's weights in NVFP4."""


@dataclass(frozen=True)
class Operation:
    """The arguments and results of one callable of a backend, by the names of :data:`TENSORS`."""

    takes: tuple[str, ...]
    returns: tuple[str, ...]
    """In the order of its arguments or of its result; of ``forward``'s only ``y`` must be there."""
    may_take: tuple[str, ...] = ()
    """Optional arguments."""


OPERATIONS: Final[Mapping[str, Operation]] = {
    "eplb_map": Operation(
        ("topk_ids", "expert_load_view", "logical_to_physical_map", "logical_replica_count",
         "record_enabled"),
        ("ids", "load"),
    ),
    "prepare": Operation(
        ("hidden_states", "topk_weights", "topk_ids"), ("x", "x_sf", "topk_idx", "topk_weights")
    ),
    "forward": Operation(
        (*ACTIVATIONS, *WEIGHTS), STAGES,
        (*SHARED_WEIGHTS, "shared_output", *NVFP4_FACTORS),
    ),
    "transform_weights": Operation(WEIGHTS, ("w13", "w13_sf", "w2", "w2_sf")),
}  # fmt: skip
