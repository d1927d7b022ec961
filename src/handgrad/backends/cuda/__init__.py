"""cuda: kernels compiled at run time, cuBLASLt, cuDNN, and graphs of whole stretches. backend.py binds, card.py plans.

Nothing here is imported but where it is used: a laptop without the packages can still plan for a card.
"""
