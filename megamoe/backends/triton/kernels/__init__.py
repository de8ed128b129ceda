"""What Triton compiles: device code alone. Its launches are in the modules beside this folder.

A module here imports Triton, other modules here, and the constants of
:mod:`megamoe.backends.triton.packing`. :func:`megamoe.backends.triton.backend.kernel_sources`
hashes these modules.
"""
