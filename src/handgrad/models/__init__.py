"""Model families: one file each, a dataclass of sizes whose methods record the body and the head."""

from handgrad.models.gpt2 import GPT2
from handgrad.models.model import Batch, Model, declare, forward_logits, forward_loss, shapes
from handgrad.models.presets import gpt2, names, preset
from handgrad.models.registry import build, family, from_dict, make, of_model_type, register, to_dict

__all__ = [
    "GPT2",
    "Batch",
    "Model",
    "build",
    "declare",
    "family",
    "forward_logits",
    "forward_loss",
    "from_dict",
    "gpt2",
    "make",
    "names",
    "of_model_type",
    "preset",
    "register",
    "shapes",
    "to_dict",
]
