"""The names of a forward's stages, for code that must not import torch."""

from __future__ import annotations

from typing import Final

STAGES: Final = ("x", "x_sf", "l2_acts", "l2_acts_sf", "y")
"""The tensors that a forward may return, in the order of computation; ``y`` it must return.
:mod:`megamoe.spec.tensors` has their shapes and dtypes."""
STEPS: Final = (("x", "x_sf"), ("l2_acts", "l2_acts_sf"), ("y",))
"""The stages that one step computes."""
