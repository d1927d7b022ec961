"""BERT (Devlin et al. 2018): a bidirectional encoder, norms after the residual sum, trained on masked tokens and on
pairs of sentences, or to classify texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from handgrad.core.dtypes import F32, I32
from handgrad.core.errors import HandgradError
from handgrad.core.params import Init, normal
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.models.bert_format import BODY, HEADS, HUGGING_FACE, MOST
from handgrad.models.blocks import (
    attend,
    dense,
    drop,
    embedding,
    layer_norm,
    lm_head_logits,
    lm_head_loss,
    mlp,
    packed,
    project,
    regression_loss,
    token_table,
)
from handgrad.models.model import MAX_LAYERS, Batch, check_fields, flag, head_columns, names, number, padded, rate, size
from handgrad.models.registry import register
from handgrad.ops import embed, pick
from handgrad.ops.act import Act

NSP_CLASSES = 2  # B follows A, or it is random


@register
@dataclass(frozen=True)
class Bert:
    """A BERT. `dropout` applies to embeddings, attention weights and both branches, in training only.

    mlm        the masked-language-model head; training on masked tokens needs it
    pooler     a dense layer with tanh on [CLS];  nsp: the next-sentence head on it
    labels     names of classes, which a head on the pooler tells apart; one: it predicts a number; none: no such head
    mask_rate  fraction of the tokens that are predicted
    """

    vocab_size: int = size(30522)
    max_seq_len: int = size(512)
    num_layers: int = size(12, MAX_LAYERS)
    num_heads: int = size(12)
    hidden_size: int = size(768)
    mlp_size: int = size(0, least=0)
    num_types: int = size(2)
    norm_eps: float = number(1e-12)
    dropout: float = rate(0.0)
    mask_rate: float = rate(0.15)
    mlm: bool = flag(True)
    pooler: bool = flag(False)
    nsp: bool = flag(False)
    labels: tuple[str, ...] = names(1, MOST)

    family: ClassVar[str] = "bert"
    special_tokens: ClassVar[tuple[str, ...]] = ("[MASK]", "[CLS]", "[SEP]", "[PAD]")
    continues_text: ClassVar[bool] = False
    hugging_face: ClassVar[Mapping[str, Any]] = HUGGING_FACE

    def __post_init__(self) -> None:
        check_fields(self)
        head_columns(self)  # raises unless the heads divide the width
        if (self.mlm, self.pooler, self.nsp) not in (BODY, *HEADS.values()):
            got = f"mlm {self.mlm}, pooler {self.pooler}, nsp {self.nsp}"
            raise HandgradError("model", "the heads of a BERT are none, mlm, pooler, or all three", got)
        if self.nsp and self.num_types < NSP_CLASSES:
            raise HandgradError("model", "a BERT with nsp has a type for each of the two texts", self.num_types)
        if self.labels and (self.mlm, self.pooler, self.nsp) != HEADS["BertModel"]:
            raise HandgradError("model", "a BERT with labels has a pooler and no other head", "another")
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "mlp_size", self.mlp_size or 4 * self.hidden_size)

    @property
    def vocab_padded(self) -> int:
        """Rows of the embedding table."""
        return padded(self.vocab_size)

    @property
    def usual_seq_len(self) -> int:
        """All positions, so that training reaches each."""
        return self.max_seq_len

    @property
    def is_regression(self) -> bool:
        """Whether the head predicts a number, which the only label names."""
        return len(self.labels) == 1

    def predictions(self, seq_len: int) -> int:
        """See `Model.predictions`."""
        return 1 if self.labels else max(round(seq_len * self.mask_rate), 1)

    def inputs(self, g: Program, batch_size: int, seq_len: int, *, cache: int = 0) -> Batch:
        """Ids, types and, unless there are labels, the rows to predict; with nsp or labels, whose texts are padded, the
        bounds of attention, too."""
        if cache:
            raise HandgradError("generate", "a BERT fills in masked tokens", "a text to continue")
        if self.labels:
            return self.texts(g, batch_size, seq_len, padded=True)
        rows = g.input("rows", (batch_size * self.predictions(seq_len),), I32)
        return self.texts(g, batch_size, seq_len, padded=self.nsp, rows=rows)

    def texts(self, g: Program, batch_size: int, seq_len: int, *, padded: bool, rows: Tensor | None = None) -> Batch:
        """Ids and types of whole texts; padded: some are shorter, and rows see the keys within bounds."""
        N = batch_size * seq_len
        names = ("ids", "types", "first", "last") if padded else ("ids", "types")
        arrays: dict[str, Any] = {name: g.input(name, (N,), I32) for name in names}
        return Batch(batch_size=batch_size, seq_len=seq_len, rows=rows, **arrays)

    def body(self, g: Program, data: Batch) -> Tensor:
        """The rows to predict (B predictions, C) of the encoder's output; trains the next-sentence head. With labels,
        the rows (B, C) that the classifier reads."""
        if g.trains and not (self.mlm or self.labels):
            hint = "handgrad data labels makes texts with labels"
            raise HandgradError(
                "train", "a BERT that is trained has the head of masked tokens, or labels", "neither", hint=hint
            )
        x = self.encode(g, data)
        if self.labels:
            return self.pool(g, x, data)
        with g.block("head", prefix=False):
            if self.pooler:
                pooled = self.pool(g, x, data)
                if self.nsp:
                    self._follows(g, pooled, data)
            return x if data.rows is None else g.emit(pick, x, data.rows)

    def encode(self, g: Program, data: Batch) -> Tensor:
        """The encoder's output (N, C)."""
        p, eps = self.dropout, self.norm_eps
        with g.block("embed", prefix=False):
            table = g.param("types.weight", (self.num_types, self.hidden_size), normal(0.02))
            wpe = g.param("wpe.weight", (self.max_seq_len, self.hidden_size), normal(0.02))
            sizes: dict[str, Any] = {"T": data.seq_len, "decode": False, "scale": 1.0}
            types = g.emit(embed, data.types, table, None, None, **sizes)
            tokens = embedding(g, data, token_table(g, self), wpe)
            x = drop(g, layer_norm(g, tokens, (types, None), "ln", eps)[1], p)
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                with g.scope("attn"):
                    H, C = self.num_heads, self.hidden_size
                    qkv = dense(g, x, "qkv", 3 * C, parts=packed(H, H, C // H))
                    y = attend(g, qkv, data, heads=H, kv_heads=H, causal=False, p=p)
                    h = project(g, y, "out", self.hidden_size, std=0.02, p=p)
                x = layer_norm(g, x, h, "ln_1", eps)[1]
                h = mlp(g, x, "mlp", size=self.mlp_size, p=p, std=0.02, act=Act.GELU_ERF, up="up", down="down")
                x = layer_norm(g, x, h, "ln_2", eps)[1]
        return x

    def pool(self, g: Program, x: Tensor, data: Batch) -> Tensor:
        """The output "pooled" (B, C) of every text's first token, with dropout where a classifier follows."""
        B, T = data.batch_size, data.seq_len
        with g.block("head", prefix=False):
            starts = g.constant(f"starts {(B, T)}", (B,), I32, partial(range, 0, B * T, T))
            first = g.emit(pick, x, starts)
            pooled = g.output("pooled", dense(g, first, "pooler", self.hidden_size, act=Act.TANH, parts=()))
            return drop(g, pooled, self.dropout if self.labels else 0.0)

    def _follows(self, g: Program, pooled: Tensor, data: Batch) -> None:
        """The next-sentence head, with its loss if there are targets."""
        with g.scope("nsp"):
            w, b = self._classes(g, NSP_CLASSES)
        if data.rows is None:
            return
        B = data.batch_size
        targets, weights = g.input("nsp_targets", (B,), I32), g.input("nsp_weights", (B,), F32)
        sizes: dict[str, Any] = {"vocab_size": NSP_CLASSES, "chunks": 1}
        lm_head_loss(g, pooled, w, targets, b=b, weights=weights, name="nsp_losses", **sizes)

    def _classes(self, g: Program, count: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a head of so many classes."""
        return g.param("weight", (count, self.hidden_size), normal(0.02)), g.param("bias", (count,), Init("zeros"))

    def loss(self, g: Program, x: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
        """See `Model.loss`. With labels, targets are their indices; a regression's losses are squared errors."""
        with g.block("head", prefix=False):
            x, w, b = self._head(g, x)
            if self.is_regression and b is not None:
                return regression_loss(g, x, w, b, targets)
            return lm_head_loss(g, x, w, targets, vocab_size=len(self.labels) or self.vocab_size, chunks=chunks, b=b)

    def logits(self, g: Program, x: Tensor) -> Tensor:
        """See `Model.logits`; with labels (N, labels). Without a head, rows meet the embedding table directly."""
        with g.block("head", prefix=False):
            x, w, b = self._head(g, x)
            return lm_head_logits(g, x, w, b=b)

    def _head(self, g: Program, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows, the matrix that they meet, a bias for every token or class) of the head."""
        if self.labels:
            with g.scope("classifier"):
                return x, *self._classes(g, len(self.labels))
        if not self.mlm:
            return x, token_table(g, self), None
        with g.scope("mlm"):
            h = dense(g, x, "dense", self.hidden_size, act=Act.GELU_ERF, parts=())
            n = layer_norm(g, h, None, "ln", self.norm_eps)[1]
            b = g.param("bias", (self.vocab_padded,), Init("zeros", rows=self.vocab_size))
        return n, token_table(g, self), b

    def flops_per_token(self, num_params: int, seq_len: int) -> int:
        """6 a parameter of the blocks, attention over all of T, and the head for the rows that are predicted.

        >>> Bert().flops_per_token(0, 512) // 10**6
        587
        """
        C, L = self.hidden_size, self.num_layers
        head = (C * C + self.vocab_padded * C) * self.predictions(seq_len) / seq_len * self.mlm
        return int(6 * (L * (4 * C * C + 2 * C * self.mlp_size) + head) + 12 * L * C * seq_len)
