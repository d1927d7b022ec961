"""Llama and its kin, which differ in a few fields: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3.

A pre-norm decoder with RMS norms, rotary positions, grouped queries and a gated MLP, without biases but for Qwen2's.
Touvron et al. 2023 (Llama), Dubey et al. 2024 (Llama 3), Jiang et al. 2023 (Mistral), Qwen Team 2024, 2025.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from handgrad.core.dtypes import I32
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.models.blocks import (
    Branch,
    attend,
    dense,
    embedding,
    gated_mlp,
    head_table,
    lm_head_logits,
    lm_head_loss,
    packed,
    project,
    rms_norm,
    rotary,
    token_table,
)
from handgrad.models.llama_format import HUGGING_FACE
from handgrad.models.model import (
    MAX_LAYERS,
    USUAL_SEQ_LEN,
    Batch,
    check_fields,
    check_heads,
    flag,
    head_columns,
    keys_seen,
    number,
    numbers,
    padded,
    size,
)
from handgrad.models.registry import register
from handgrad.ops.act import Act

MLP_ALIGN = 64  # the MLP's default width is a multiple of it


@register
@dataclass(frozen=True)
class Llama:
    """A Llama. Sizes that are 0 follow from the others, as Llama 2 has them.

    num_kv_heads  heads of keys and values; 0: num_heads
    head_size     columns of a head; 0: hidden_size / num_heads
    mlp_size      columns of the MLP; 0: 8/3 of hidden_size, rounded up to a multiple of 64
    rope_theta    base of the angles;  rope_scaling: Llama 3's, as `rotary_table` takes it
    qkv_bias      q, k, v have biases (Qwen2);  qk_norm: the heads of q and k are normed (Qwen3)
    window        a token sees so many tokens, itself included (Mistral); 0: all before it
    """

    vocab_size: int = size(32000)
    max_seq_len: int = size(4096)
    num_layers: int = size(32, MAX_LAYERS)
    num_heads: int = size(32)
    num_kv_heads: int = size(0, least=0)
    hidden_size: int = size(4096)
    head_size: int = size(0, least=0)
    mlp_size: int = size(0, least=0)
    rope_theta: float = number(1e4)
    rope_scaling: tuple[float, ...] | None = numbers(4)
    norm_eps: float = number(1e-5)
    tie_embeddings: bool = flag(True)
    qkv_bias: bool = flag(False)
    qk_norm: bool = flag(False)
    window: int = size(0, least=0)

    family: ClassVar[str] = "llama"
    special_tokens: ClassVar[tuple[str, ...]] = ()
    continues_text: ClassVar[bool] = True
    hugging_face: ClassVar[Mapping[str, Any]] = HUGGING_FACE

    def __post_init__(self) -> None:
        check_fields(self)
        found = {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_size": head_columns(self),
            "mlp_size": self.mlp_size or -(-8 * self.hidden_size // (3 * MLP_ALIGN)) * MLP_ALIGN,
            "rope_theta": float(self.rope_theta),
            "rope_scaling": tuple(self.rope_scaling) if self.rope_scaling else None,
            "norm_eps": float(self.norm_eps),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
        check_heads(self)
        if self.rope_scaling and self.rope_scaling[1] >= self.rope_scaling[2]:
            rule = "rope_scaling has a low_freq_factor below its high_freq_factor"
            raise HandgradError("model", rule, self.rope_scaling)

    @property
    def vocab_padded(self) -> int:
        """Rows of the embedding table."""
        return padded(self.vocab_size)

    @property
    def usual_seq_len(self) -> int:
        """See `Model.usual_seq_len`."""
        return min(self.max_seq_len, USUAL_SEQ_LEN)

    def predictions(self, seq_len: int) -> int:
        """Every token predicts the next."""
        return seq_len

    def inputs(self, g: Program, batch_size: int, seq_len: int, *, cache: int = 0) -> Batch:
        """Token ids alone."""
        return Batch(g.input("ids", (batch_size * seq_len,), I32), batch_size, seq_len, cache)

    def body(self, g: Program, data: Batch) -> Tensor:
        """Embedding, blocks and the last norm."""
        eps, std = self.norm_eps, 0.02 / (2 * self.num_layers) ** 0.5
        h: Branch | None = None
        with g.block("embed", prefix=False):
            x = embedding(g, data, token_table(g, self))
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                x, n = rms_norm(g, x, h, "ln_1", eps)
                h = self.attention(g, n, data, std)
                x, n = rms_norm(g, x, h, "ln_2", eps)
                h = gated_mlp(g, n, "mlp", size=self.mlp_size, act=Act.SILU, p=0.0, std=std)
        with g.block("head", prefix=False):
            return rms_norm(g, x, h, "ln_f", eps)[1]

    def attention(self, g: Program, x: Tensor, data: Batch, std: float) -> Branch:
        """Grouped-query attention with rotated q and k."""
        H, K, D = self.num_heads, self.num_kv_heads, self.head_size
        with g.scope("attn"):
            qkv = dense(g, x, "qkv", (H + 2 * K) * D, bias=self.qkv_bias, parts=packed(H, K, D))
            qkv = rotary(
                g,
                qkv,
                data,
                heads=H,
                kv_heads=K,
                table_rows=data.cache or data.seq_len,
                theta=self.rope_theta,
                scaling=self.rope_scaling,
                qk_norm_eps=self.norm_eps if self.qk_norm else None,
            )
            y = attend(g, qkv, data, heads=H, kv_heads=K, window=self.window)
            return project(g, y, "out", self.hidden_size, std=std, p=0.0, bias=False)

    def loss(self, g: Program, x: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
        """See `Model.loss`."""
        with g.block("head", prefix=False):
            return lm_head_loss(g, x, head_table(g, self), targets, vocab_size=self.vocab_size, chunks=chunks)

    def logits(self, g: Program, x: Tensor) -> Tensor:
        """See `Model.logits`."""
        with g.block("head", prefix=False):
            return lm_head_logits(g, x, head_table(g, self))

    def flops_per_token(self, num_params: int, seq_len: int) -> int:
        """6 a parameter that is multiplied, and attention over the keys that a token sees, half of T without a window.

        num_params: with the padded rows of the vocabulary; the table of an untied head is a lookup and does not count

        >>> Llama(vocab_size=128, num_layers=1, num_heads=2, hidden_size=64).flops_per_token(60_000, 16)
        366144
        """
        lookup = 0 if self.tie_embeddings else self.vocab_padded * self.hidden_size
        keys = self.num_layers * keys_seen(seq_len, self.window)
        return 6 * (num_params - lookup) + int(12 * self.num_heads * self.head_size * keys)
