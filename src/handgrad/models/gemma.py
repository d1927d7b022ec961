"""Gemma 3 (Gemma Team 2025), text alone: a decoder whose layers mostly see a window of the text.

It differs from a Llama in this: embeddings are scaled by sqrt(hidden_size); the end of a branch is normed too, before
the residual adds it; the MLP's gate is GELU; every `global_every`-th layer sees the whole text, with rotary positions
of another base, and the others see `window` tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from handgrad.core.dtypes import I32
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
from handgrad.models.gemma_format import HUGGING_FACE
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
    padded,
    size,
)
from handgrad.models.registry import register
from handgrad.ops.act import Act


@register
@dataclass(frozen=True)
class Gemma:
    """A Gemma 3. Sizes that are 0 follow from the others.

    num_kv_heads   heads of keys and values; 0: num_heads
    head_size      columns of a head; 0: hidden_size / num_heads
    mlp_size       columns of the MLP; 0: four times hidden_size
    rope_theta     base of the angles in layers that see the whole text;  local_theta: in the others
    query_size     scores are scaled by query_size^-1/2; 0: head_size
    window         a token sees so many tokens, itself included;  global_every: but the whole text in every so many-th
                   layer
    """

    vocab_size: int = size(262144)
    max_seq_len: int = size(32768)
    num_layers: int = size(18, MAX_LAYERS)
    num_heads: int = size(4)
    num_kv_heads: int = size(0, least=0)
    hidden_size: int = size(640)
    head_size: int = size(0, least=0)
    mlp_size: int = size(0, least=0)
    rope_theta: float = number(1e6)
    local_theta: float = number(1e4)
    query_size: int = size(0, least=0)
    window: int = size(512)
    global_every: int = size(6)
    norm_eps: float = number(1e-6)
    tie_embeddings: bool = flag(True)

    family: ClassVar[str] = "gemma"
    special_tokens: ClassVar[tuple[str, ...]] = ()
    continues_text: ClassVar[bool] = True
    hugging_face: ClassVar[Mapping[str, Any]] = HUGGING_FACE

    def __post_init__(self) -> None:
        check_fields(self)
        found: dict[str, float] = {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_size": head_columns(self),
            "mlp_size": self.mlp_size or 4 * self.hidden_size,
            "query_size": self.query_size or head_columns(self),
        }
        found |= {name: float(getattr(self, name)) for name in ("rope_theta", "local_theta", "norm_eps")}
        for name, value in found.items():
            object.__setattr__(self, name, value)
        check_heads(self)

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
            x = embedding(g, data, token_table(g, self), scale=self.hidden_size**0.5)
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                x, n = rms_norm(g, x, h, "ln_1", eps)
                h = self._normed(g, self._attention(g, n, data, std, is_global=self.sees_all(i)), "ln_attn")
                x, n = rms_norm(g, x, h, "ln_2", eps)
                h = self._normed(
                    g, gated_mlp(g, n, "mlp", size=self.mlp_size, act=Act.GELU_TANH, p=0.0, std=std), "ln_mlp"
                )
        with g.block("head", prefix=False):
            return rms_norm(g, x, h, "ln_f", eps)[1]

    def sees_all(self, layer: int) -> bool:
        """Whether attention of a layer, counted from 0, sees the whole text."""
        return (layer + 1) % self.global_every == 0

    def _normed(self, g: Program, h: Branch, name: str) -> Branch:
        """A branch without a bias, normed."""
        return rms_norm(g, h[0], None, name, self.norm_eps)[1], None

    def _attention(self, g: Program, x: Tensor, data: Batch, std: float, *, is_global: bool) -> Branch:
        """Grouped-query attention with normed and rotated q and k."""
        H, K, D = self.num_heads, self.num_kv_heads, self.head_size
        with g.scope("attn"):
            qkv = rotary(
                g,
                dense(g, x, "qkv", (H + 2 * K) * D, bias=False, parts=packed(H, K, D)),
                data,
                heads=H,
                kv_heads=K,
                table_rows=data.cache or data.seq_len,
                theta=self.rope_theta if is_global else self.local_theta,
                qk_norm_eps=self.norm_eps,
            )
            window = 0 if is_global else self.window
            y = attend(g, qkv, data, heads=H, kv_heads=K, scale=self.query_size**-0.5, window=window)
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
        """6 a parameter that is multiplied, and attention over the keys that a token sees in each layer.

        num_params: with the padded rows of the vocabulary; the table of an untied head is a lookup and does not count

        >>> Gemma(vocab_size=128, num_layers=6, num_heads=2, hidden_size=64, window=4).flops_per_token(60_000, 16)
        379584
        """
        lookup = 0 if self.tie_embeddings else self.vocab_padded * self.hidden_size
        in_all = sum(map(self.sees_all, range(self.num_layers)))
        keys = in_all * keys_seen(seq_len) + (self.num_layers - in_all) * keys_seen(seq_len, self.window)
        return 6 * (num_params - lookup) + int(12 * self.num_heads * self.head_size * keys)
