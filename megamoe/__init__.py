"""megamoe: the golden-output testbed for fused FP8 x FP4 mixture-of-experts kernels."""

__version__ = "0.1.0"
