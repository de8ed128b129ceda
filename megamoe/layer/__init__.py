"""The layer as an engine uses it, with a backend plugged in: the module under test and its parts.

``experts`` is the module as of vLLM 0.24, ``deep_gemm_experts`` the module as of 0.33, ``routed``
the common part of both; ``staging``, ``eplb`` and ``kernel_weights`` its steps in torch; ``ops``
chooses between those and Triton's kernels; ``symm_buffer`` and ``ranks`` have its memory and its
process group; ``rebalance`` decides where replicas lie, and ``moves`` moves their weights;
``capture`` records an engine's call. ``acts`` and ``launch_laws`` are the suite's operations on the
module in a worker.
"""
