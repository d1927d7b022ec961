"""T5 (Raffel et al. 2020): an encoder reads a text with gaps, a decoder writes what fills them.

Both are pre-norm stacks with RMS norms and biases of attention by distance, without other biases. Version 1.0 has a
ReLU and a tied head, version 1.1 (Shazeer 2020) a gated GELU and a head of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from handgrad.core.dtypes import I32
from handgrad.core.params import normal
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.models.blocks import (
    Branch,
    attend,
    dense,
    drop,
    head_table,
    lm_head_logits,
    lm_head_loss,
    packed,
    pre_of,
    project,
    rms_norm,
    token_table,
)
from handgrad.models.model import MAX_LAYERS, Batch, check_fields, flag, head_columns, number, padded, rate, size
from handgrad.models.registry import register
from handgrad.models.t5_format import HUGGING_FACE
from handgrad.ops import embed, gated
from handgrad.ops.act import Act

SENTINELS = 100
RELEASED = 32099, 1, 0  # first sentinel, end and padding of the models that were released


@register
@dataclass(frozen=True)
class T5:
    """A T5. `dropout` applies to embeddings, attention weights, branches, inside the MLP and to what a stack returns,
    in training only.

    max_seq_len         tokens of a source, in generation at most; a decoder reads at most as many
    num_decoder_layers  0: num_layers, which the encoder has
    head_size           columns of a head; 0: hidden_size / num_heads
    mlp_size            columns of the MLP; 0: four times hidden_size
    num_buckets         of distances, each with a bias for every head
    gated               the MLP has a gate and GELU, else ReLU;  scaled: the head reads rows times hidden_size^-1/2
    specials_last       the last ids are 100 sentinels, which descend, the end of a text and padding; otherwise those of
                        the released models
    """

    vocab_size: int = size(32128)
    max_seq_len: int = size(512)
    num_layers: int = size(6, MAX_LAYERS)
    num_decoder_layers: int = size(0, MAX_LAYERS, least=0)
    num_heads: int = size(8)
    head_size: int = size(0, least=0)
    hidden_size: int = size(512)
    mlp_size: int = size(0, least=0)
    num_buckets: int = size(32)
    norm_eps: float = number(1e-6)
    dropout: float = rate(0.0)
    tie_embeddings: bool = flag(True)
    gated: bool = flag(False)
    scaled: bool = flag(True)
    specials_last: bool = flag(True)

    family: ClassVar[str] = "t5"
    special_tokens: ClassVar[tuple[str, ...]] = (
        *(f"<extra_id_{i}>" for i in reversed(range(SENTINELS))),
        "</s>",
        "<pad>",
    )
    continues_text: ClassVar[bool] = False
    hugging_face: ClassVar[Mapping[str, Any]] = HUGGING_FACE

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "head_size", head_columns(self))
        object.__setattr__(self, "mlp_size", self.mlp_size or 4 * self.hidden_size)

    @property
    def vocab_padded(self) -> int:
        """Rows of the embedding table."""
        return padded(self.vocab_size)

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """(the first sentinel, from which the others descend, the end of a text, padding)."""
        return (self.vocab_size - 3, self.vocab_size - 2, self.vocab_size - 1) if self.specials_last else RELEASED

    @property
    def start_id(self) -> int:
        """Padding: a decoder reads it first."""
        return self.special_ids[2]

    @property
    def end_id(self) -> int:
        """The end of a source, and of what fills its gaps."""
        return self.special_ids[1]

    @property
    def marks(self) -> Mapping[str, int]:
        """The sentinels by name. They stand for the gaps of a source."""
        return {f"<extra_id_{i}>": self.special_ids[0] - i for i in range(SENTINELS)}

    @property
    def usual_seq_len(self) -> int:
        """The targets of a source of max_seq_len tokens: `data.Spans` with its default rates.

        >>> T5().usual_seq_len
        114
        """
        raw, targets = max(2, int((self.max_seq_len - 1) / 0.9) - 4), 3
        while True:
            noise = min(max(round(0.15 * raw), 1), raw - 1)
            spans = max(round(noise / 3), 1)
            if raw - noise + spans + 1 > self.max_seq_len:
                return targets
            raw, targets = raw + 1, noise + spans + 1

    def predictions(self, seq_len: int) -> int:
        """Every row of the decoder predicts a token."""
        return seq_len

    def inputs(self, g: Program, batch_size: int, seq_len: int, *, cache: int = 0) -> Batch:
        """The source's ids and the decoder's; with a cache, the decoder's and where the source ends."""
        N = batch_size * seq_len
        ids = g.input("ids", (N,), I32)
        if cache:
            return Batch(ids, batch_size, seq_len, cache, source_last=g.input("source_last", (N,), I32))
        return Batch(ids, batch_size, seq_len, source=g.input("source", (batch_size * self.max_seq_len,), I32))

    def body(self, g: Program, data: Batch) -> Tensor:
        """The decoder's rows (N, C)."""
        B, source = data.batch_size, data.source
        with g.block("embed", prefix=False):
            read = None if source is None else self._enter(g, Batch(source, B, self.max_seq_len), "enc")
            written = self._enter(g, data, "dec")
        return self._decode(g, *written, None if read is None else self._encode(g, *read))

    def encode(self, g: Program, batch_size: int) -> None:
        """See `EncoderDecoder.encode`: the states are the keys and values of every cross-attention."""
        N = batch_size * self.max_seq_len
        ids, last = (g.input(name, (N,), I32) for name in ("source", "source_last"))
        with g.block("embed", prefix=False):
            read = self._enter(g, Batch(ids, batch_size, self.max_seq_len, last=last), "enc")
        memory = self._encode(g, *read)
        for i in range(self.num_decoder_layers or self.num_layers):
            with g.block(f"dec.{i}"), g.scope("cross"):
                self._keys_values(g, memory, self._kept(g, batch_size))

    def _enter(self, g: Program, data: Batch, side: str) -> tuple[Tensor, Batch, Tensor]:
        """What a stack reads: embeddings, their batch, and the biases of its attention by distance."""
        x = g.emit(embed, data.ids, token_table(g, self, std=1.0), None, None, T=data.seq_len, decode=False, scale=1.0)
        rel = g.param(f"{side}.rel.weight", (self.num_buckets, self.num_heads), normal(self.hidden_size**-0.5))
        return drop(g, x, self.dropout), data, rel

    def _encode(self, g: Program, x: Tensor, data: Batch, rel: Tensor) -> Tensor:
        """The encoder's output (B S, C)."""
        h: Branch | None = None
        for i in range(self.num_layers):
            with g.block(f"enc.{i}"):
                x, n = rms_norm(g, x, h, "ln_1", self.norm_eps)
                h = self._attention(g, n, data, rel, causal=False)
                x, n = rms_norm(g, x, h, "ln_2", self.norm_eps)
                h = self._mlp(g, n)
        with g.block("memory", prefix=False):
            return drop(g, rms_norm(g, x, h, "enc.ln_f", self.norm_eps)[1], self.dropout)

    def _decode(self, g: Program, x: Tensor, data: Batch, rel: Tensor, memory: Tensor | None) -> Tensor:
        """The decoder's output (N, C). memory: the encoder's; None: its keys and values are in states."""
        h: Branch | None = None
        for i in range(self.num_decoder_layers or self.num_layers):
            with g.block(f"dec.{i}"):
                x, n = rms_norm(g, x, h, "ln_1", self.norm_eps)
                h = self._attention(g, n, data, rel, causal=True)
                x, n = rms_norm(g, x, h, "ln_2", self.norm_eps)
                h = self._cross(g, n, data, memory)
                x, n = rms_norm(g, x, h, "ln_3", self.norm_eps)
                h = self._mlp(g, n)
        with g.block("head", prefix=False):
            return drop(g, rms_norm(g, x, h, "dec.ln_f", self.norm_eps)[1], self.dropout)

    def _attention(self, g: Program, x: Tensor, data: Batch, rel: Tensor, *, causal: bool) -> Branch:
        """Self-attention with biases by distance. Scores are not scaled: the start weights of q are."""
        H, std = self.num_heads, self.hidden_size**-0.5
        with g.scope("attn"):
            A = H * self.head_size
            init = normal(std, first=(A, std * self.head_size**-0.5))
            qkv = dense(g, x, "qkv", 3 * A, bias=False, init=init, parts=packed(H, H, self.head_size))
            y = attend(g, qkv, data, heads=H, kv_heads=H, scale=1.0, causal=causal, p=self.dropout, rel=rel)
            return self._out(g, y)

    def _cross(self, g: Program, x: Tensor, data: Batch, memory: Tensor | None) -> Branch:
        """Attention to what the encoder returned, without biases."""
        H, std = self.num_heads, self.hidden_size**-0.5
        with g.scope("cross"):
            A, (q_part, *_) = H * self.head_size, packed(H, H, self.head_size)
            q = dense(g, x, "q", A, bias=False, init=normal(std * self.head_size**-0.5), parts=(q_part,))
            kv = self._kept(g, data.batch_size) if memory is None else self._keys_values(g, memory)
            y = attend(g, q, data, heads=H, kv_heads=H, scale=1.0, causal=False, p=self.dropout, kv=kv)
            return self._out(g, y)

    def _keys_values(self, g: Program, memory: Tensor, into: Tensor | None = None) -> Tensor:
        """Those of a cross-attention (M, 2 A), in the state `into` if one is given."""
        H, init = self.num_heads, normal(self.hidden_size**-0.5)
        _, *parts = packed(H, H, self.head_size)
        size = 2 * H * self.head_size
        return dense(g, memory, "kv", size, bias=False, init=init, into=into, parts=tuple(parts))

    def _kept(self, g: Program, batch_size: int) -> Tensor:
        """The state with those of the sources."""
        return g.state("kv", (batch_size * self.max_seq_len, 2 * self.num_heads * self.head_size), g.dtype)

    def _out(self, g: Program, y: Tensor) -> Branch:
        return project(g, y, "out", self.hidden_size, std=y.shape[1] ** -0.5, p=self.dropout, bias=False)

    def _mlp(self, g: Program, x: Tensor) -> Branch:
        """down dropout(relu(up x)), or with a gate."""
        F, p, pre = self.mlp_size, self.dropout, None
        init = normal(self.hidden_size**-0.5)
        with g.scope("mlp"):
            if self.gated:
                up = dense(g, x, "gate_up", 2 * F, bias=False, init=init, parts=((F, 1), (F, 1)))
                h = g.emit(gated, up, act=Act.GELU_TANH)
            else:
                h = dense(g, x, "up", F, act=Act.RELU, bias=False, init=init)
                pre = pre_of(g, h) if p == 0.0 else None  # dropout lies between
            h = drop(g, h, p)
            return project(g, h, "down", self.hidden_size, std=F**-0.5, p=p, pre_x=pre, bias=False)

    def loss(self, g: Program, x: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
        """See `Model.loss`."""
        with g.block("head", prefix=False):
            V, scale = self.vocab_size, self._scale
            return lm_head_loss(g, x, head_table(g, self, std=1.0), targets, vocab_size=V, chunks=chunks, scale=scale)

    def logits(self, g: Program, x: Tensor) -> Tensor:
        """See `Model.logits`."""
        with g.block("head", prefix=False):
            return lm_head_logits(g, x, head_table(g, self, std=1.0), scale=self._scale)

    def flops_per_token(self, num_params: int, seq_len: int) -> int:
        """The FLOP of a source and its targets over the targets: 6 a parameter and token, and attention, of which the
        decoder's own is half.

        >>> T5().flops_per_token(0, 114) // 10**6
        929
        """
        C, A, S, T = self.hidden_size, self.num_heads * self.head_size, self.max_seq_len, seq_len
        layers, own = self.num_layers, self.num_decoder_layers or self.num_layers
        mlp = (2 + self.gated) * C * self.mlp_size
        source = S * (layers * (4 * C * A + mlp) + own * 2 * C * A)
        target = T * (own * (6 * C * A + mlp) + self.vocab_padded * C)
        return int((6 * (source + target) + 12 * A * (layers * S * S + own * (T * T / 2 + T * S))) / T)

    @property
    def _scale(self) -> float:
        return self.hidden_size**-0.5 if self.scaled else 1.0
