"""Model families: one file each, a dataclass of sizes whose methods record the body and the head."""

from handgrad.models.bert import Bert
from handgrad.models.gemma import Gemma
from handgrad.models.gpt2 import GPT2
from handgrad.models.llama import Llama
from handgrad.models.lora import Lora
from handgrad.models.model import Batch, EncoderDecoder, Model, declare, forward_logits, forward_loss, shapes
from handgrad.models.neox import GPTNeoX
from handgrad.models.presets import gpt2, names, preset
from handgrad.models.registry import (
    build_from_file,
    create,
    family,
    family_of_architecture,
    family_of_model_type,
    from_dict,
    register,
    to_dict,
)
from handgrad.models.t5 import T5

__all__ = [
    "Bert",
    "GPT2",
    "Gemma",
    "GPTNeoX",
    "Llama",
    "Lora",
    "T5",
    "Batch",
    "EncoderDecoder",
    "Model",
    "build_from_file",
    "declare",
    "family",
    "forward_logits",
    "forward_loss",
    "from_dict",
    "gpt2",
    "create",
    "names",
    "family_of_architecture",
    "family_of_model_type",
    "preset",
    "register",
    "shapes",
    "to_dict",
]
