"""BERT (Devlin et al. 2018): a bidirectional encoder, norms after the residual sum, trained on masked tokens and on
pairs of sentences."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from handgrad.core.dtypes import F32, I32
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.core.params import Init, normal
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
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
)
from handgrad.models.model import MAX_LAYERS, Batch, check_fields, flag, number, padded, rate, size
from handgrad.models.registry import register
from handgrad.ops import embed, pick
from handgrad.ops.act import Act

NSP_CLASSES = 2  # B follows A, or it is random

IN_BLOCK = {
    "attn.out": "attention.output.dense",
    "ln_1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "ln_2": "output.LayerNorm",
}
OUTSIDE = {
    "wte": "bert.embeddings.word_embeddings",
    "wpe": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "ln": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "mlm.dense": "cls.predictions.transform.dense",
    "mlm.ln": "cls.predictions.transform.LayerNorm",
    "mlm": "cls.predictions",
    "nsp": "cls.seq_relationship",
}
HEADS = {  # transformers' class: whether it has the masked-language-model head, the pooler, and the next-sentence head
    "BertForPreTraining": (True, True, True),
    "BertForMaskedLM": (True, False, False),
    "BertModel": (False, True, False),
}


def _names(name: str) -> tuple[str, ...]:
    """Their tensors that are the rows of one of ours."""
    module, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"h\.(\d+)\.(.+)", module)
    if block is None:
        return (f"{OUTSIDE[module]}.{kind}",)
    at = f"bert.encoder.layer.{block[1]}."
    if block[2] == "attn.qkv":
        return tuple(f"{at}attention.self.{part}.{kind}" for part in ("query", "key", "value"))
    return (f"{at}{IN_BLOCK[block[2]]}.{kind}",)


def _decode(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which heads a file has, by its architecture."""
    named = config.get("architectures") or ["BertForPreTraining"]
    found = named[0] if isinstance(named, list) else named
    if not isinstance(found, str) or found not in HEADS:
        raise HandgradError("hf", f"an architecture {', '.join(HEADS)}", shown(found))
    return dict(zip(("mlm", "pooler", "nsp"), HEADS[found]))


def _encode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture that has these heads."""
    heads = fields["mlm"], fields["pooler"], fields["nsp"]
    return {"architectures": [next(name for name, found in HEADS.items() if found == heads)]}


def _only(fields: Mapping[str, Any]) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    return {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }


@register
@dataclass(frozen=True)
class Bert:
    """A BERT. `dropout` applies to embeddings, attention weights and both branches, in training only.

    mlm        the masked-language-model head; training needs it
    pooler     a dense layer with tanh on [CLS];  nsp: the next-sentence head on it
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

    family: ClassVar[str] = "bert"
    special_tokens: ClassVar[tuple[str, ...]] = ("[MASK]", "[CLS]", "[SEP]", "[PAD]")
    continues_text: ClassVar[bool] = False
    hugging_face: ClassVar[Mapping[str, Any]] = {  # see io.format.Format
        "model_types": {"bert": "BertForPreTraining"},
        "fields": {
            "vocab_size": ("vocab_size", 30522),
            "max_seq_len": ("max_position_embeddings", 512),
            "num_layers": ("num_hidden_layers", 12),
            "num_heads": ("num_attention_heads", 12),
            "hidden_size": ("hidden_size", 768),
            "mlp_size": ("intermediate_size", 3072),
            "num_types": ("type_vocab_size", 2),
            "norm_eps": ("layer_norm_eps", 1e-12),
        },
        "aliases": {},
        "shared": {"dropout": (("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)},
        "only": _only,
        "names": _names,
        "rows": lambda name, fields: (fields["hidden_size"],) * 3,
        "prefix": "bert.",
        "transposed": "(?!)",
        "ignored": r"embeddings\.position_ids|cls\.predictions\.decoder\..*|pooler\..*|cls\.seq_relationship\..*",
        "tied": ("", "wte.weight", "wte.weight"),
        "decode": _decode,
        "encode": _encode,
    }

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise HandgradError(
                "model", "hidden_size is a multiple of num_heads", f"{self.hidden_size} and {self.num_heads} heads"
            )
        if (self.mlm, self.pooler, self.nsp) not in HEADS.values():
            got = f"mlm {self.mlm}, pooler {self.pooler}, nsp {self.nsp}"
            raise HandgradError("model", "the heads of a BERT are mlm, pooler, or all three", got)
        if self.nsp and self.num_types < NSP_CLASSES:
            raise HandgradError("model", "a BERT with nsp has a type for each of the two texts", self.num_types)
        object.__setattr__(self, "mlp_size", self.mlp_size or 4 * self.hidden_size)

    @property
    def vocab_padded(self) -> int:
        """Rows of the embedding table."""
        return padded(self.vocab_size)

    @property
    def usual_seq_len(self) -> int:
        """All positions, so that training reaches each."""
        return self.max_seq_len

    def predictions(self, seq_len: int) -> int:
        """See `Model.predictions`."""
        return max(round(seq_len * self.mask_rate), 1)

    def inputs(self, g: Program, batch_size: int, seq_len: int, *, cache: int = 0) -> Batch:
        """Ids, types and the rows to predict; with nsp, whose texts are padded, the bounds of attention, too."""
        if cache:
            raise HandgradError("generate", "a BERT fills in masked tokens", "a text to continue")
        rows = g.input("rows", (batch_size * self.predictions(seq_len),), I32)
        return self.texts(g, batch_size, seq_len, padded=self.nsp, rows=rows)

    def texts(self, g: Program, batch_size: int, seq_len: int, *, padded: bool, rows: Tensor | None = None) -> Batch:
        """Ids and types of whole texts; padded: some are shorter, and rows see the keys within bounds."""
        N = batch_size * seq_len
        names = ("ids", "types", "first", "last") if padded else ("ids", "types")
        arrays: dict[str, Any] = {name: g.input(name, (N,), I32) for name in names}
        return Batch(batch_size=batch_size, seq_len=seq_len, rows=rows, **arrays)

    def body(self, g: Program, data: Batch) -> Tensor:
        """The rows to predict (B predictions, C) of the encoder's output; trains the next-sentence head."""
        if g.trains and not self.mlm:
            raise HandgradError("train", "a BERT that is trained has the head of masked tokens", "mlm False")
        x = self.encode(g, data)
        with g.block("head", prefix=False):
            if self.pooler:
                self._pool(g, x, data)
            return x if data.rows is None else g.emit(pick, x, data.rows)

    def encode(self, g: Program, data: Batch) -> Tensor:
        """The encoder's output (N, C)."""
        p, eps = self.dropout, self.norm_eps
        with g.block("embed", prefix=False):
            table = g.param("types.weight", (self.num_types, self.hidden_size), normal(0.02))
            wpe = g.param("wpe.weight", (self.max_seq_len, self.hidden_size), normal(0.02))
            sizes: dict[str, Any] = {"T": data.seq_len, "decode": False, "scale": 1.0}
            types = g.emit(embed, data.types, table, None, None, **sizes)
            tokens = embedding(g, data, self._table(g), wpe)
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

    def _pool(self, g: Program, x: Tensor, data: Batch) -> None:
        """The output "pooled" (B, C) of every text's first token; with nsp also its loss, if there are targets."""
        B, T = data.batch_size, data.seq_len
        starts = g.constant(f"starts {(B, T)}", (B,), I32, partial(range, 0, B * T, T))
        first = g.emit(pick, x, starts)
        pooled = g.output("pooled", dense(g, first, "pooler", self.hidden_size, act=Act.TANH, parts=()))
        if not self.nsp:
            return
        with g.scope("nsp"):
            w = g.param("weight", (NSP_CLASSES, self.hidden_size), normal(0.02))
            b = g.param("bias", (NSP_CLASSES,), Init("zeros"))
        if data.rows is None:
            return
        targets, weights = g.input("nsp_targets", (B,), I32), g.input("nsp_weights", (B,), F32)
        sizes: dict[str, Any] = {"vocab_size": NSP_CLASSES, "chunks": 1}
        lm_head_loss(g, pooled, w, targets, b=b, weights=weights, name="nsp_losses", **sizes)

    def loss(self, g: Program, x: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
        """See `Model.loss`."""
        with g.block("head", prefix=False):
            x, b = self._head(g, x)
            return lm_head_loss(g, x, self._table(g), targets, vocab_size=self.vocab_size, chunks=chunks, b=b)

    def logits(self, g: Program, x: Tensor) -> Tensor:
        """See `Model.logits`. Without the head of masked tokens rows are multiplied by the embedding table directly."""
        with g.block("head", prefix=False):
            x, b = self._head(g, x)
            return lm_head_logits(g, x, self._table(g), b=b)

    def _head(self, g: Program, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the rows that meet the table, a bias for every token) of the head of masked tokens."""
        if not self.mlm:
            return x, None
        with g.scope("mlm"):
            h = dense(g, x, "dense", self.hidden_size, act=Act.GELU_ERF, parts=())
            n = layer_norm(g, h, None, "ln", self.norm_eps)[1]
            return n, g.param("bias", (self.vocab_padded,), Init("zeros", rows=self.vocab_size))

    def flops_per_token(self, num_params: int, seq_len: int) -> int:
        """6 a parameter of the blocks, attention over all of T, and the head for the rows that are predicted.

        >>> Bert().flops_per_token(0, 512) // 10**6
        587
        """
        C, L = self.hidden_size, self.num_layers
        head = (C * C + self.vocab_padded * C) * self.predictions(seq_len) / seq_len * self.mlm
        return int(6 * (L * (4 * C * C + 2 * C * self.mlp_size) + head) + 12 * L * C * seq_len)

    def _table(self, g: Program) -> Tensor:
        return g.param("wte.weight", (self.vocab_padded, self.hidden_size), normal(0.02, rows=self.vocab_size))
