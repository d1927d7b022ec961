"""GPT-2 (Radford et al. 2019) and the GPT-3 shapes: pre-norm decoder, learned positions, tied head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from handgrad.core.dtypes import I32
from handgrad.core.params import normal
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.models.blocks import (
    drop,
    embedding,
    head_table,
    layer_norm,
    lm_head_logits,
    lm_head_loss,
    mlp,
    self_attention,
    token_table,
)
from handgrad.models.model import MAX_LAYERS, Batch, check_fields, flag, head_columns, padded, rate, size
from handgrad.models.registry import register

GGUF: Mapping[str, Any] = {  # see io.gguf.Layout
    "architectures": {"gpt2": "gpt2"},
    "keys": {
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "tensors": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.h.{}.ln_1": "blk.{}.attn_norm",
        "transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv",
        "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
        "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
        "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
        "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    "implies": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def _hf_names(name: str) -> tuple[str]:
    """The name of one of our tensors in Hugging Face's files."""
    return (name if name == "lm_head.weight" else f"transformer.{name}",)


def _hf_only(fields: Mapping[str, Any]) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    return {
        "n_inner": (None, 4 * fields["hidden_size"]),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # the same formula; our sums are float32 either way
        "add_cross_attention": (False,),
    }


@register
@dataclass(frozen=True)
class GPT2:
    """A GPT-2. `dropout` applies to embeddings, attention weights and both branches, in training only."""

    vocab_size: int = size(50257)
    max_seq_len: int = size(1024)
    num_layers: int = size(12, MAX_LAYERS)
    num_heads: int = size(12)
    hidden_size: int = size(768)
    dropout: float = rate(0.0)
    tie_embeddings: bool = flag(True)

    family: ClassVar[str] = "gpt2"
    special_tokens: ClassVar[tuple[str, ...]] = ()
    continues_text: ClassVar[bool] = True
    hugging_face: ClassVar[Mapping[str, Any]] = {  # see io.format.Format
        "model_types": {"gpt2": "GPT2LMHeadModel"},
        "fields": {
            "vocab_size": ("vocab_size", 50257),
            "max_seq_len": ("n_positions", 1024),
            "num_layers": ("n_layer", 12),
            "num_heads": ("n_head", 12),
            "hidden_size": ("n_embd", 768),
            "tie_embeddings": ("tie_word_embeddings", True),
        },
        "aliases": {
            "max_position_embeddings": "n_positions",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "hidden_size": "n_embd",
        },
        "shared": {"dropout": (("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)},
        "only": _hf_only,
        "names": _hf_names,
        "prefix": "transformer.",
        "transposed": r"h\.\d+\..*\.c_\w+\.weight",  # their blocks store matrices (in, out)
        "ignored": r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight",  # causal masks of old versions, a tied head
        "tied": ("tie_embeddings", "wte.weight", "lm_head.weight"),
        "gguf": GGUF,
    }

    def __post_init__(self) -> None:
        check_fields(self)
        head_columns(self)  # raises unless the heads divide the width

    @property
    def vocab_padded(self) -> int:
        """Rows of the embedding table."""
        return padded(self.vocab_size)

    @property
    def usual_seq_len(self) -> int:
        """All positions, so that training reaches each."""
        return self.max_seq_len

    def predictions(self, seq_len: int) -> int:
        """Every token predicts the next."""
        return seq_len

    def inputs(self, g: Program, batch_size: int, seq_len: int, *, cache: int = 0) -> Batch:
        """Token ids alone."""
        return Batch(g.input("ids", (batch_size * seq_len,), I32), batch_size, seq_len, cache)

    def body(self, g: Program, data: Batch) -> Tensor:
        """Embedding, blocks and the last norm."""
        C, p = self.hidden_size, self.dropout
        # residual projections: the variance of the sum stays put (GPT-2 §2.3)
        std = 0.02 / (2 * self.num_layers) ** 0.5
        with g.block("embed", prefix=False):
            x, h = drop(g, self.embedding(g, data), p), None
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                x, n = layer_norm(g, x, h, "ln_1")
                h = self_attention(g, n, "attn", data, heads=self.num_heads, p=p, std=std)
                x, n = layer_norm(g, x, h, "ln_2")
                h = mlp(g, n, "mlp", size=4 * C, p=p, std=std)
        with g.block("head", prefix=False):
            return layer_norm(g, x, h, "ln_f")[1]

    def embedding(self, g: Program, data: Batch) -> Tensor:
        """Token plus position embeddings (N, C); with a cache, positions continue after its tokens."""
        wte = token_table(g, self)
        wpe = g.param("wpe.weight", (self.max_seq_len, self.hidden_size), normal(0.02))
        return embedding(g, data, wte, wpe)

    def loss(self, g: Program, x: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
        """See `Model.loss`."""
        with g.block("head", prefix=False):
            return lm_head_loss(g, x, head_table(g, self), targets, vocab_size=self.vocab_size, chunks=chunks)

    def logits(self, g: Program, x: Tensor) -> Tensor:
        """See `Model.logits`."""
        with g.block("head", prefix=False):
            return lm_head_logits(g, x, head_table(g, self))

    def flops_per_token(self, num_params: int, seq_len: int) -> int:
        """llm.c's formula: 6 a parameter, and attention over half of T x T.

        num_params: with the padded rows of the vocabulary, positions, norms and biases; a tied head once

        >>> GPT2().flops_per_token(124_475_904, 1024)
        803478528
        """
        return 6 * num_params + 6 * self.num_layers * self.hidden_size * seq_len
