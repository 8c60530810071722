"""Integer arithmetic of EasyQuant (Wu et al. 2020, 2006.16669): 16-bit chains, direct and Winograd convolutions.

For tests and benches only: no stage of fewbit imports this room, and a runtime has kernels of its own.
"""

try:
    import numba  # noqa: F401
except ImportError as error:
    raise ImportError(
        "bench.kernels compiles its loops with numba, which is not installed: pip install 'numba>=0.61'"
    ) from error
