"""Text generation, chats, embeddings and classes of texts."""

from handgrad.infer.engine import Engine
from handgrad.infer.load import Loaded, load
from handgrad.infer.sampling import Sampling
from handgrad.infer.texts import TextEncoder, load_encoder

__all__ = ["Engine", "Loaded", "Sampling", "TextEncoder", "load", "load_encoder"]
