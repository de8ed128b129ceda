"""The layout of an expert's weights in each format: bytes, and what shares a scale factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from megamoe.spec.features import NVFP4_SIZE_MULTIPLE, SIZE_MULTIPLE
from megamoe.spec.formats import BLOCK, GROUP, NVFP4_GROUP


@dataclass(frozen=True)
class Layout:
    """w13 is a matrix of 2I rows and H columns, w2 one of H rows and I columns."""

    per_byte: int
    """Weights in a byte, along the columns."""
    scale_rows: int
    scale_columns: int
    """The rectangle of weights that shares a scale factor."""
    scale_dtype: torch.dtype
    multiple: int
    """H and I are multiples of this."""
    factors: bool = False
    """Each expert has a further factor for w13 and one for w2, float32 above 0."""

    def weight(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of one expert's matrix, in bytes."""
        return rows, columns // self.per_byte

    def scale(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of its scale factors."""
        return rows // self.scale_rows, columns // self.scale_columns

    def shapes(self, hidden: int, inter: int) -> dict[str, tuple[int, int]]:
        """The shapes of one expert's four tensors, by name."""
        w13, w2 = (2 * inter, hidden), (hidden, inter)
        return {
            "w13_weight": self.weight(*w13), "w13_weight_scale": self.scale(*w13),
            "w2_weight": self.weight(*w2), "w2_weight_scale": self.scale(*w2),
        }  # fmt: skip

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one of the four tensors."""
        return self.scale_dtype if name.endswith("_scale") else torch.uint8


_MXFP4: Final = Layout(2, 1, GROUP, torch.uint8, SIZE_MULTIPLE)
_OTHER: Final = {
    "nvfp4": Layout(2, 1, NVFP4_GROUP, torch.uint8, NVFP4_SIZE_MULTIPLE, factors=True),
    "fp8-block": Layout(1, BLOCK, BLOCK, torch.float32, SIZE_MULTIPLE),
}


def layout_of(weight_format: str) -> Layout:
    """The layout of one of :data:`megamoe.spec.features.WEIGHT_FORMATS`: that of MXFP4 where the
    format is another in its activations alone."""
    return _OTHER.get(weight_format, _MXFP4)
