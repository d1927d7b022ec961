"""BERT (Devlin et al. 2018): a bidirectional encoder, norms after the residual sum, trained on masked tokens and on
pairs of sentences, or to classify texts."""

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
    project,
)
from handgrad.models.model import MAX_LAYERS, Batch, check_fields, flag, names, number, padded, rate, size
from handgrad.models.registry import register
from handgrad.ops import embed, pick
from handgrad.ops.act import Act

NSP_CLASSES = 2  # B follows A, or it is random
MOST = 2**16  # classes, whose names a damaged file may give

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
    "classifier": "classifier",
}
HEADS = {  # transformers' class: whether it has the masked-language-model head, the pooler, and the next-sentence head
    "BertForPreTraining": (True, True, True),
    "BertForMaskedLM": (True, False, False),
    "BertModel": (False, True, False),
}
CLASSIFIER = "BertForSequenceClassification"  # the heads of a BertModel, and one on the pooler for the classes
BODY = (False, False, False)  # no head: a BertModel without its pooler
OLDER = {"gamma": "weight", "beta": "bias"}  # of a LayerNorm, in files that come from TensorFlow


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


def _renamed(name: str) -> str:
    """A tensor's name in newer files."""
    module, _, kind = name.rpartition(".")
    return f"{module}.{OLDER[kind]}" if kind in OLDER and module.endswith("LayerNorm") else name


def _decode(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which heads a file has, by its architecture, and the names of its classes."""
    named = config.get("architectures") or ["BertForPreTraining"]
    found = named[0] if isinstance(named, list) else named
    if not isinstance(found, str) or found not in (*HEADS, CLASSIFIER):
        raise HandgradError("hf", f"an architecture {', '.join(HEADS)}, {CLASSIFIER}", shown(found))
    labels: tuple[Any, ...] = ()
    if found == CLASSIFIER:
        count = config.get("num_labels", 2)
        usual = {str(id): f"LABEL_{id}" for id in range(count if type(count) is int and 0 <= count <= MOST else 0)}
        names = config.get("id2label") or usual
        if not isinstance(names, dict) or names.keys() != {str(id) for id in range(len(names))}:
            raise HandgradError("hf", "an id2label that names the classes 0, 1, ...", shown(names))
        labels = tuple(names[str(id)] for id in range(len(names)))
    return dict(zip(("mlm", "pooler", "nsp"), HEADS.get(found, HEADS["BertModel"]))) | {"labels": labels}


def _encode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture that has these heads."""
    labels, heads = fields["labels"], (fields["mlm"], fields["pooler"], fields["nsp"])
    if labels:
        ids = {"id2label": {str(id): name for id, name in enumerate(labels)}}
        return {"architectures": [CLASSIFIER], **ids, "label2id": {name: id for id, name in enumerate(labels)}}
    return {"architectures": [next((name for name, found in HEADS.items() if found == heads), "BertModel")]}


def _only(fields: Mapping[str, Any]) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    of_classes = {
        "problem_type": (None, "single_label_classification"),
        "classifier_dropout": (None, fields["dropout"]),
    }
    return {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    } | (of_classes if fields["labels"] else {})


@register
@dataclass(frozen=True)
class Bert:
    """A BERT. `dropout` applies to embeddings, attention weights and both branches, in training only.

    mlm        the masked-language-model head; training on masked tokens needs it
    pooler     a dense layer with tanh on [CLS];  nsp: the next-sentence head on it
    labels     names of classes, which a head on the pooler tells apart; none: no such head
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
    labels: tuple[str, ...] = names(2, MOST)

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
        "ignored": r"embeddings\.position_ids|cls\..*|pooler\..*",
        "tied": ("", "wte.weight", "wte.weight"),
        "renamed": _renamed,
        "optional": {"pooler": "pooler.weight"},
        "decode": _decode,
        "encode": _encode,
    }

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise HandgradError(
                "model", "hidden_size is a multiple of num_heads", f"{self.hidden_size} and {self.num_heads} heads"
            )
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
            raise HandgradError("train", "a BERT that is trained has the head of masked tokens, or labels", "neither")
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
            tokens = embedding(g, data, self._table(g), wpe)
            x = drop(g, layer_norm(g, tokens, (types, None), "ln", eps)[1], p)
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                with g.scope("attn"):
                    qkv = dense(g, x, "qkv", 3 * self.hidden_size)
                    y = attend(g, qkv, data, heads=self.num_heads, kv_heads=self.num_heads, causal=False, p=p)
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
            pooled = g.output("pooled", dense(g, g.emit(pick, x, starts), "pooler", self.hidden_size, act=Act.TANH))
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
        """See `Model.loss`. With labels, targets are their indices."""
        with g.block("head", prefix=False):
            x, w, b = self._head(g, x)
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
            return x, self._table(g), None
        with g.scope("mlm"):
            h = dense(g, x, "dense", self.hidden_size, act=Act.GELU_ERF)
            n = layer_norm(g, h, None, "ln", self.norm_eps)[1]
            b = g.param("bias", (self.vocab_padded,), Init("zeros", rows=self.vocab_size))
        return n, self._table(g), b

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
