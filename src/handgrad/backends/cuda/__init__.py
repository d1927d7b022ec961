"""cuda: kernels compiled at run time, cuBLASLt, cuDNN, and one CUDA graph per segment.

backend.py binds calls, planner.py plans without a GPU. Modules are imported only where they are used, so a laptop
without the CUDA packages can still plan.
"""
