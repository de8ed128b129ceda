"""Names of things in rooms that import torch, for help texts and for mistakes.

``tests/test_cli.py`` compares each with the room that defines it.
"""

from __future__ import annotations

from typing import Final

MODELS: Final = ("hopper-triton", "sm100")
""":data:`megamoe.predict.MODELS`."""
MODEL: Final = "sm100"
SHARES: Final = ("flash", "kimi-k3", "pro", "v3", "v4.1-flash")
""":data:`megamoe.bench.SHARES`."""
DEFAULT_SHARES: Final = ("flash", "pro")
PEERS: Final = ("humming-kernels", "sgl-deep-gemm", "torch-grouped-mm")
""":data:`megamoe.bench.peers.PEERS`."""
PICTURES: Final = 20
""":data:`megamoe.suite.reds.PICTURES`."""
STAGES: Final = ("x", "x_sf", "l2_acts", "l2_acts_sf", "y")
""":data:`megamoe.spec.tensors.STAGES`."""
