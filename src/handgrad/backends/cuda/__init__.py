"""cuda: kernels compiled at run time, cuBLASLt, cuDNN, and one CUDA graph per segment.

backend.py binds calls; planner.py plans without a GPU. Functions import the CUDA packages when they need them, so a
machine without these packages can still plan.
"""
