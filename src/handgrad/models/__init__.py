"""Model families: one file each, a config dataclass and a function that records the forward pass."""

from handgrad.models.blocks import batch
from handgrad.models.gpt2 import GPT2
from handgrad.models.presets import gpt2, names, preset

__all__ = ["GPT2", "batch", "gpt2", "names", "preset"]
