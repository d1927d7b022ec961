"""Text generation."""

from handgrad.infer.engine import Engine
from handgrad.infer.load import Loaded, load
from handgrad.infer.sampling import Sampling

__all__ = ["Engine", "Loaded", "Sampling", "load"]
