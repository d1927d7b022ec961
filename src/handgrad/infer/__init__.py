"""Text generation."""

from handgrad.infer.engine import Engine
from handgrad.infer.sampling import Sampling

__all__ = ["Engine", "Sampling"]
