"""The layer as an engine uses it, with a backend plugged in: the module under test and its parts.

``experts`` is the module as of vLLM 0.24, ``deep_gemm_experts`` as of 0.33, ``routed`` what the two
share; ``staging``, ``eplb`` and ``kernel_weights`` its steps in torch; ``ops`` chooses between
those and Triton's kernels; ``symm_buffer`` and ``ranks`` what it needs of memory and of a process
group; ``capture`` records an engine's call. ``acts`` and ``launch_laws`` are what the suite asks of
the module in a worker.
"""
