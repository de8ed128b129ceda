"""The ``triton`` backend: :mod:`.backend` has it; :mod:`.kernels` what Triton compiles.

This module imports nothing, so that no module below it is in a circle with it.
"""
