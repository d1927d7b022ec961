"""GPT-2 (Radford et al. 2019) and the GPT-3 shapes: pre-norm decoder, learned positions, tied head."""

from dataclasses import dataclass

from handgrad.core.errors import HandgradError
from handgrad.core.params import normal
from handgrad.core.program import Program
from handgrad.models.blocks import Batch, drop, layer_norm, lm_head, mlp, self_attention
from handgrad.ops import embed

VOCAB_ALIGN = 128  # the vocabulary is padded up to this many rows; padded rows start at zero and never count


@dataclass(frozen=True)
class GPT2:
    """Sizes of a GPT-2. `dropout` applies to embeddings, attention weights and both branches, in training only."""

    vocab_size: int = 50257
    max_seq_len: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    hidden_size: int = 768
    dropout: float = 0.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seq_len", "num_layers", "num_heads", "hidden_size"):
            if getattr(self, name) < 1:
                raise HandgradError("model", f"{name} is at least 1", getattr(self, name))
        if self.hidden_size % self.num_heads:
            raise HandgradError(
                "model", "hidden_size is a multiple of num_heads", f"{self.hidden_size} and {self.num_heads} heads"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise HandgradError("model", "dropout lies in [0, 1)", self.dropout)

    @property
    def vocab_padded(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // VOCAB_ALIGN) * VOCAB_ALIGN

    def forward(self, g: Program, data: Batch, head_chunks: int = 1) -> None:
        """Records the forward pass for g.mode; the losses or logits become outputs of the program."""
        C, p = self.hidden_size, self.dropout
        std = (
            0.02 / (2 * self.num_layers) ** 0.5
        )  # residual projections: the variance of the sum stays put (GPT-2 §2.3)
        with g.block("embed", prefix=False):
            wte = g.param("wte.weight", (self.vocab_padded, C), normal(0.02, rows=self.vocab_size))
            wpe = g.param("wpe.weight", (self.max_seq_len, C), normal(0.02))
            x, h = g.emit(embed, data.ids, wte, wpe, T=data.seq_len, decode=g.mode in ("prefill", "decode")), None
            x = drop(g, x, p)
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                x, n = layer_norm(g, x, h, "ln_1")
                h = self_attention(g, n, "attn", data, heads=self.num_heads, p=p, std=std, max_len=self.max_seq_len)
                x, n = layer_norm(g, x, h, "ln_2")
                h = mlp(g, n, "mlp", size=4 * C, p=p, std=std)
        with g.block("head", prefix=False):
            _, n = layer_norm(g, x, h, "ln_f")
            if not self.tie_embeddings:
                wte = g.param("lm_head.weight", (self.vocab_padded, C), normal(0.02, rows=self.vocab_size))
            lm_head(g, n, wte, data, vocab_size=self.vocab_size, chunks=head_chunks)
